"""What the backends of the broadcast convolution share: the operands and options of a call, and classes of rows.

What is said of rows holds of columns too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from iio_kernels.runtime.autograd import without_autocast


class Classes(NamedTuple):
    """Which rows of a result see the same taps: `head` first and `tail` last rows are classes of their own, and those
    between them belong to `period` classes in turn. Numbered in this order."""

    head: int
    period: int
    tail: int


class Operands(NamedTuple):
    """The tensors of a call, channels last, in the dtype of the arithmetic."""

    constant: Tensor  # (M, row classes, column classes, O): what the convolution makes of each slot
    position_map: Tensor  # (H, W, O)


class Options(NamedTuple):
    """The options of a call, checked."""

    rows: Classes
    columns: Classes
    relu: bool
    dtype: torch.dtype  # of the result


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


def gather(x: Tensor, dim: int, kinds: Classes) -> Tensor:
    """To each class the sum over its rows in x, along `dim`."""
    head, period, tail = kinds
    first, middle, last = x.split([head, x.shape[dim] - head - tail, tail], dim)
    every = [(slice(None),) * dim + (slice(j, None, period),) for j in range(period)]
    return torch.cat([first, *(middle[rows].sum(dim, keepdim=True) for rows in every), last], dim)
