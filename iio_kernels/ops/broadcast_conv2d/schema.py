"""The operators under `broadcast_conv2d`: how they are called, and what torch.compile needs to know of them.

Everything has its channels last: constant (M, row classes, column classes, O), position_map (H, W, O), both in the
dtype of the arithmetic, and their gradients; the result and the gradient that comes to it (M, H, W, O), in that dtype
or a narrower one. `rows` and `columns` are the three numbers of `Classes` in common.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from iio_kernels.ops.broadcast_conv2d.common import Operands, Options
from iio_kernels.runtime.autograd import not_differentiable_by_itself
from iio_kernels.runtime.numerics import cast


def define(namespace: str) -> None:
    """Define `namespace`::broadcast_forward and ::broadcast_backward."""
    torch.library.define(
        f"{namespace}::broadcast_forward",
        "(Tensor constant, Tensor position_map, int[] rows, int[] columns, bool relu, ScalarType dtype) -> Tensor",
    )
    torch.library.define(
        f"{namespace}::broadcast_backward",
        "(Tensor d_out, Tensor constant, Tensor position_map, int[] rows, int[] columns, bool relu)"
        " -> (Tensor d_constant, Tensor d_position_map)",
    )
    torch.library.register_fake(f"{namespace}::broadcast_forward", new_result)
    torch.library.register_fake(f"{namespace}::broadcast_backward", new_gradients)
    not_differentiable_by_itself(f"{namespace}::broadcast_forward")


def calls(
    namespace: str, stored: Callable[[torch.dtype, torch.dtype], torch.dtype]
) -> tuple[Callable[..., Tensor], Callable[..., tuple]]:
    """Define the operators in a namespace: what calls them there, `forward` and `backward` as in reference.py.

    `stored(dtype, arithmetic)` is how that namespace's kernels store what is to be of `dtype`.
    """
    define(namespace)
    ops = getattr(torch.ops, namespace)

    def forward(operands: Operands, options: Options) -> Tensor:
        rows, columns, relu, dtype = options
        kind = stored(dtype, operands.constant.dtype)
        return cast(ops.broadcast_forward(*operands, list(rows), list(columns), relu, kind), dtype)

    def backward(d_out: Tensor, operands: Operands, options: Options) -> tuple[Tensor, Tensor]:
        rows, columns, relu, _ = options
        d_out = d_out.to(stored(d_out.dtype, operands.constant.dtype))
        return ops.broadcast_backward(d_out, *operands, list(rows), list(columns), relu)

    return forward, backward


def new_result(
    constant: Tensor, position_map: Tensor, rows: list[int], columns: list[int], relu: bool, dtype: torch.dtype
) -> Tensor:
    """Room for what broadcast_forward returns."""
    return constant.new_empty((constant.shape[0], *position_map.shape), dtype=dtype)


def new_gradients(
    d_out: Tensor, constant: Tensor, position_map: Tensor, rows: list[int], columns: list[int], relu: bool
) -> tuple[Tensor, Tensor]:
    """Room for what broadcast_backward returns."""
    return constant.new_empty(constant.shape), position_map.new_empty(position_map.shape)
