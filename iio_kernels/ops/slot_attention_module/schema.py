"""The operators under `slot_attention_module`: how they are called, and what torch.compile needs to know of them.

x (B, N, Dx) stored in any dtype, slots (B, K, D), incoming gradients and the maps in that of the arithmetic, any
strides. Results are in the arithmetic's dtype, but dx is stored as x is. The tape, the maps and what they make are
those of common.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from iio_kernels.ops.slot_attention_module.common import Operands, Options, made_by_maps, on_tape
from iio_kernels.runtime.autograd import not_differentiable_by_itself


def define(namespace: str) -> None:
    """Define `namespace`::iterations_forward and ::iterations_backward."""
    forward, backward = f"{namespace}::iterations_forward", f"{namespace}::iterations_backward"
    torch.library.define(
        forward,
        "(Tensor x, Tensor slots, Tensor[] weights, Tensor[] biases, int iterations, float eps, float norm_eps,"
        " bool return_attention) -> (Tensor slots, Tensor attention, Tensor tape)",
    )
    torch.library.define(
        backward,
        "(Tensor d_slots, Tensor? d_attention, Tensor x, Tensor tape, Tensor[] weights, float eps)"
        " -> (Tensor dx, Tensor d_slots, Tensor made)",
    )
    torch.library.register_fake(forward, new_results)
    torch.library.register_fake(backward, new_gradients)
    not_differentiable_by_itself(forward)


def calls(
    namespace: str, stored: Callable[[Tensor, torch.dtype], Tensor]
) -> tuple[Callable[..., tuple], Callable[..., tuple]]:
    """Define the operators in a namespace: what calls them there, `forward` and `backward` as in reference.py.

    `stored` makes of x, for arithmetic in a dtype, what that namespace's kernels read.
    """
    define(namespace)
    ops = getattr(torch.ops, namespace)

    def forward(operands: Operands, options: Options, return_attention: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        x, slots, maps = operands
        weights, biases = list(maps[:5]), list(maps[5:])
        slots, A, tape = ops.iterations_forward(
            stored(x, slots.dtype), slots, weights, biases, *options, return_attention
        )
        return slots, A if return_attention else None, tape

    def backward(
        ds: Tensor, dA: Tensor | None, operands: Operands, tape: Tensor, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, weights = operands.x, list(operands.maps[:5])
        dx, ds, made = ops.iterations_backward(ds, dA, stored(x, tape.dtype), tape, weights, options.eps)
        return dx.to(x.dtype), ds, made

    return forward, backward


def new_results(
    x: Tensor, slots: Tensor, weights: list[Tensor], biases: list[Tensor], iterations: int, eps: float,
    norm_eps: float, return_attention: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Room for what iterations_forward returns."""
    (B, K, D), (_, N, Dx), H = slots.shape, x.shape, weights[3].shape[0]
    return (
        slots.new_empty((B, K, D)),
        slots.new_empty((B, K, N) if return_attention else (0,)),
        slots.new_empty((B, iterations, K, sum(on_tape(D, Dx, H)))),
    )


def new_gradients(
    d_slots: Tensor, d_attention: Tensor | None, x: Tensor, tape: Tensor, weights: list[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what iterations_backward returns."""
    (B, K, D), Dx, H = d_slots.shape, x.shape[2], weights[3].shape[0]
    return (
        x.new_empty(x.shape),
        tape.new_empty((B, K, D)),
        tape.new_empty((B, tape.shape[1], K, sum(made_by_maps(D, Dx, H)))),
    )
