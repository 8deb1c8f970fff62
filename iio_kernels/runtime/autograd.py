"""What the operations share around autograd: no autocast inside, and Functions of one derivative only."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from iio_kernels.runtime.torch_private import constant_when_compiled

AFunction = TypeVar("AFunction", bound=type[Function])


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Switch autocast off; a device that has none (meta) refuses to be asked, and is left alone."""
    return torch.autocast(device.type, enabled=False) if _has_autocast(device.type) else nullcontext()


def autocast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What autocast makes of a result of `dtype`: its own where it is on, but of float64 nothing else."""
    if dtype == torch.float64 or not _has_autocast(device.type) or not torch.is_autocast_enabled(device.type):
        return dtype
    return torch.get_autocast_dtype(device.type)


@constant_when_compiled
def _has_autocast(device_type: str) -> bool:
    """Out of sight of torch.compile: that of torch 2.11 cannot trace the question."""
    return torch.amp.is_autocast_available(device_type)


def signature_kept(function: AFunction) -> AFunction:
    """Decorate a Function so that its `forward` keeps its signature.

    torch binds the arguments of every call to it, and makes it anew for that: a tenth of a millisecond, longer than
    all else that happens before a kernel starts.
    """
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)
    return function


def differentiable_once(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Decorate a Function's `backward` so that differentiating its gradients raises.

    torch's own `once_differentiable` raises only where an incoming gradient requires gradient. That of a
    scalar loss does not: under `create_graph=True` its gradients would pass for constants, and a penalty on
    them do nothing. Here each gradient hangs from the tensors that it depends on by a node whose own backward raises,
    so that whoever asks for a second derivative, of whatever input, comes by it.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *incoming)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return gradients
        sources = [x for x in (*ctx.saved_tensors, *incoming) if x is not None and x.requires_grad]
        return tuple(None if x is None else _Final.apply(x, *sources) for x in gradients)

    return wrapper


def not_differentiable_by_itself(operator: str) -> None:
    """Have whoever differentiates an operator, past the Function that calls it, raise.

    torch.compile of a torch.func transform inlines Functions and finds the operators: without a gradient of their own
    they would pass for constants. (There torch itself refuses what is registered here, in words of its own.)
    """

    def backward(ctx: Any, *incoming: Tensor | None) -> None:
        raise RuntimeError(
            f"{operator} has no gradient outside its autograd Function, past which torch.compile looks in a torch.func "
            'transform: compile the function alone and transform that, or call it with backend="reference"'
        )

    torch.library.register_autograd(operator, backward)


class _Final(Function):
    """The identity on a gradient not to be differentiated, which depends on `sources`."""

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise RuntimeError(
            'this backend differentiates once: for second derivatives call the operation with backend="reference", '
            "or iio_kernels.restore the model if it is accelerated"
        )
