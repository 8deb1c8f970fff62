"""The spatial-broadcast decoder's first layer in plain PyTorch: the formula itself, and its gradient written out.

A convolution is linear: that of a slot z, the same all over a grid, plus a map of positions is the sum of theirs. That
of the positions is the same for all slots, and is given. That of z is z times a sum of taps, of those that fall inside
the grid: by rows and by columns they are the same for most, so a few vectors make all of it,

    constant[m, r, c] = sum_d z[m, d] * (sum of weight[:, d, t, u] over the taps t inside for r, and u inside for c)
    out[m, y, x]      = relu(constant[m, class of y, class of x] + position_map[y, x])

(Watters et al. 2019, "Spatial Broadcast Decoder".) common.py makes `constant`.

`forward` and `backward` are the pair that `BroadcastFunction` calls and every backend offers. As the reference,
autograd differentiates `forward` itself, any number of times. Arithmetic is at least float32 whatever the storage type
and autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iio_kernels.ops.broadcast_conv2d.common import Classes, Operands, Options, gather
from iio_kernels.runtime.autograd import without_autocast
from iio_kernels.runtime.numerics import cast


def forward(operands: Operands, options: Options) -> Tensor:
    """(M, H, W, O) of the result's dtype."""
    with without_autocast(operands.constant.device):
        out = _sum(operands, options)
        return cast(out.relu() if options.relu else out, options.dtype)


def backward(d_out: Tensor, operands: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """The gradients to constant and to position_map, in their dtype.

    d_sum is d_out where the sum is above 0 (or a NaN), then

        d_constant[m, r, c] = sum over the rows y of class r and the columns x of class c of d_sum[m, y, x]
        d_position_map      = sum_m d_sum[m]
    """
    with without_autocast(d_out.device):
        d_sum = d_out.to(operands.constant.dtype)
        if options.relu:
            d_sum = d_sum.masked_fill(_sum(operands, options) <= 0, 0)
        return gather(gather(d_sum, 1, options.rows), 2, options.columns), d_sum.sum(0)


def _sum(operands: Operands, options: Options) -> Tensor:
    constant, position_map = operands
    H, W, _ = position_map.shape
    return _spread(_spread(constant, 1, options.rows, H), 2, options.columns, W) + position_map


def _spread(x: Tensor, dim: int, kinds: Classes, size: int) -> Tensor:
    """To each of `size` rows what its class has in x, along `dim`: `gather` is its gradient."""
    first, middle, last = x.split(kinds, dim)
    between = size - kinds.head - kinds.tail
    times = [1] * x.dim()
    times[dim] = -(-between // kinds.period)
    return torch.cat([first, middle.repeat(times).narrow(dim, 0, between), last], dim)
