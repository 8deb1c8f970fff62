"""Calls of every operation: the value and the gradients to all inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu.part import DEVICE, SIZES
from bench.operations import MEASURED, TESTED
from iio_kernels.runtime.backends import BACKENDS

CASES = [(operation, case) for operation, tested in TESTED.items() for case in tested.BENCHMARKS[SIZES]]

Call = Callable[[], tuple[Tensor, ...]]


def call_of(operation: str, case: Any, dtype: torch.dtype, arithmetic: torch.dtype, backend: str) -> Call:
    """The value and the gradients to all inputs, which are rounded to `dtype` and then of type `arithmetic`."""
    tensors, incoming = MEASURED[operation].inputs(case, DEVICE)
    return differentiated(
        functools.partial(MEASURED[operation].function(case), backend=backend),
        tuple(x.to(dtype).to(arithmetic) for x in tensors),
        None if incoming is None else incoming.to(dtype),
    )


def differentiated(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], incoming: Tensor | None = None) -> Call:
    """A call that returns the function's value and its gradients to all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def call() -> tuple[Tensor, ...]:
        y = function(*leaves)
        grad = torch.ones_like(y) if incoming is None else incoming.to(y)
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    return call


def serving(operation: str) -> list[str]:
    """The kernels that there are for this device."""
    here = torch.device(DEVICE)
    return [
        name
        for name in ("triton", "cuda")
        if operation in BACKENDS[name].operations and BACKENDS[name].refuses(here) is None
    ]
