"""The spatial-broadcast decoder's first layer in plain PyTorch: the formula itself, and its gradient written out.

A convolution is linear: that of a slot z, the same all over a grid, plus a map of positions is the sum of theirs. That
of the positions is the same for all slots, and is given. That of z is z times a sum of taps, of those that fall inside
the grid: by rows and by columns they are the same for most, so a few vectors make all of it,

    constant[m, r, c] = sum_d z[m, d] * (sum of weight[:, d, t, u] over the taps t inside for r, and u inside for c)
    out[m, y, x]      = relu(constant[m, class of y, class of x] + position_map[y, x])

(Watters et al. 2019, "Spatial Broadcast Decoder".) What follows is said of rows and holds of columns too.

`classes` and `constants` come before what the backends differ in: all of them, differentiated by autograd. `forward`
and `backward` are the pair that `BroadcastFunction` calls and every backend offers. As the reference, autograd
differentiates `forward` itself, any number of times. Arithmetic is at least float32 whatever the storage type and
autocast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from iio_kernels.runtime.autograd import without_autocast
from iio_kernels.runtime.numerics import cast


class Classes(NamedTuple):
    """Which rows of a result see the same taps: `head` first and `tail` last rows are classes of their own, and those
    between them belong to `period` classes in turn. Numbered in this order."""

    head: int
    period: int
    tail: int


def classes(n: int, out: int, k: int, stride: int, padding: int, transposed: bool) -> Classes:
    """Of the `out` rows that a convolution with k taps makes of n.

    Tap t takes part in row y if y stride - padding + t is one of the n; of a transposed convolution, if
    y + padding - t is one of theirs times the stride. A row whose taps are all there is between head and tail.
    """
    if transposed:
        head, whole = k - padding - stride, n * stride - padding
    else:
        head, whole = -(-padding // stride), (n + padding - k) // stride + 1
    head = min(max(head, 0), out)
    return Classes(head, stride if transposed else 1, min(max(out - whole, 0), out - head))


def inside(kinds: Classes, n: int, out: int, k: int, stride: int, padding: int, transposed: bool, x: Tensor) -> Tensor:
    """(classes, k), 1 where the tap takes part and 0 elsewhere, for products with x.

    Made on x's device: what is made elsewhere would have to be waited for.
    """
    c, t = torch.arange(sum(kinds), device=x.device)[:, None], torch.arange(k, device=x.device)
    y = torch.where(c < kinds.head + kinds.period, c, c + (out - sum(kinds)))  # a row of each class
    if transposed:
        i = y + padding - t
        taken = (i % stride == 0) & (i >= 0) & (i < n * stride)
    else:
        i = y * stride - padding + t
        taken = (i >= 0) & (i < n)
    return taken.to(x.dtype)


def constants(z: Tensor, weight: Tensor, row_taps: Tensor, column_taps: Tensor, transposed: bool) -> Tensor:
    """(M, row classes, column classes, O) of z (M, D), the weight and what is `inside`, all of one dtype."""
    with without_autocast(z.device):
        order = "dotu" if transposed else "odtu"
        sums = torch.einsum(f"{order},rt,cu->drco", weight, row_taps, column_taps)
        return torch.tensordot(z, sums, 1)


def forward(
    constant: Tensor, position_map: Tensor, rows: Classes, columns: Classes, relu: bool, dtype: torch.dtype
) -> Tensor:
    """(M, H, W, O) of `dtype`, from constant (M, row classes, column classes, O) and position_map (H, W, O)."""
    with without_autocast(constant.device):
        out = _sum(constant, position_map, rows, columns)
        return cast(out.relu() if relu else out, dtype)


def backward(
    d_out: Tensor, constant: Tensor, position_map: Tensor, rows: Classes, columns: Classes, relu: bool
) -> tuple[Tensor, Tensor]:
    """The gradients to constant and to position_map, in their dtype.

    d_sum is d_out where the sum is above 0 (or a NaN), then

        d_constant[m, r, c] = sum over the rows y of class r and the columns x of class c of d_sum[m, y, x]
        d_position_map      = sum_m d_sum[m]
    """
    with without_autocast(constant.device):
        d_sum = d_out.to(constant.dtype)
        if relu:
            d_sum = d_sum.masked_fill(_sum(constant, position_map, rows, columns) <= 0, 0)
        return gather(gather(d_sum, 1, rows), 2, columns), d_sum.sum(0)


def _sum(constant: Tensor, position_map: Tensor, rows: Classes, columns: Classes) -> Tensor:
    H, W, _ = position_map.shape
    return spread(spread(constant, 1, rows, H), 2, columns, W) + position_map


def spread(x: Tensor, dim: int, kinds: Classes, size: int) -> Tensor:
    """To each of `size` rows what its class has in x, along `dim`."""
    first, middle, last = x.split(kinds, dim)
    between = size - kinds.head - kinds.tail
    times = [1] * x.dim()
    times[dim] = -(-between // kinds.period)
    return torch.cat([first, middle.repeat(times).narrow(dim, 0, between), last], dim)


def gather(x: Tensor, dim: int, kinds: Classes) -> Tensor:
    """To each class the sum over its rows in x, along `dim`: the gradient of `spread`."""
    head, period, tail = kinds
    first, middle, last = x.split([head, x.shape[dim] - head - tail, tail], dim)
    every = [(slice(None),) * dim + (slice(j, None, period),) for j in range(period)]
    return torch.cat([first, *(middle[rows].sum(dim, keepdim=True) for rows in every), last], dim)
