"""What the operations share around autograd: no autocast inside, and Functions of one derivative only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Switch autocast off; a device that has none (meta) refuses to be asked, and is left alone."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


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


class _Final(torch.autograd.Function):
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
            'this backend differentiates once: for second derivatives call the operation with backend="reference"'
        )
