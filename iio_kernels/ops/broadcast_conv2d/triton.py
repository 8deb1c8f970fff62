"""The spatial-broadcast decoder's first layer in Triton: the result is written once, and its gradient read once.

A program takes one row of several images, and some channels of it, as a tile (columns, channels): the map's row, and
its gradient, stay in registers while the images pass by. The gradient to the map is then the sum of those of the groups
of images; that to constant the sum of its rows by their classes. Both sums, small ones, are torch's, in fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from iio_kernels.ops.broadcast_conv2d import schema
from iio_kernels.ops.broadcast_conv2d.common import Classes, gather
from iio_kernels.runtime.triton_support import inlined

# ----------------------------------------------------------------------------------------------------------- kernels
# Along a tile's axes: columns x, channels o. Offsets within a row are 32 bits wide, those of rows int64.


@inlined
def _tile(groups, O: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's group of images, its row y, and what its tile's axes count."""
    slices: tl.constexpr = (O + CHANNELS - 1) // CHANNELS
    group, part = tl.program_id(0) % groups, tl.program_id(0) // groups
    y, o = part // slices, part % slices * CHANNELS + tl.arange(0, CHANNELS)
    return group.to(tl.int64), y.to(tl.int64), tl.arange(0, COLUMNS), o


@inlined
def _class_of(y, size, head: tl.constexpr, period: tl.constexpr, tail: tl.constexpr):
    """The class of a row, or of a column."""
    between = head + (y - head) % period
    return tl.where(y < head, y, tl.where(y < size - tail, between, y - size + (head + period + tail)))


@triton.jit
def _forward(
    constant, position_map,  # (M, R, C, O), (H, W, O)
    out,  # result: (M, H, W, O)
    M, groups, H, W, O: tl.constexpr,
    row_head: tl.constexpr, row_period: tl.constexpr, row_tail: tl.constexpr,
    head: tl.constexpr, period: tl.constexpr, tail: tl.constexpr,
    RELU: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = row_head + row_period + row_tail
    C: tl.constexpr = head + period + tail
    group, y, x, o = _tile(groups, O, COLUMNS, CHANNELS)
    r, c = _class_of(y, H, row_head, row_period, row_tail), _class_of(x, W, head, period, tail)
    inside = (x < W)[:, None] & (o < O)[None, :]
    at, constant_at = x[:, None] * O + o[None, :], c[:, None] * O + o[None, :]
    here = tl.load(position_map + y * W * O + at, inside, 0)
    for i in range(GROUP):
        m = group * GROUP + i
        channels = tl.where(m < M, O, 0)  # the last group may have images too few
        there = (x < W)[:, None] & (o < channels)[None, :]
        sum = tl.load(constant + (m * R + r) * (C * O) + constant_at, there, 0) + here
        if RELU:
            sum = tl.where(sum <= 0, 0, sum)
        tl.store(out + (m * H + y) * W * O + at, sum.to(out.dtype.element_ty), there)


@triton.jit
def _backward(
    d_out, constant, position_map,  # (M, H, W, O), (M, R, C, O), (H, W, O)
    d_rows, d_maps,  # results: (M, H, C, O), (groups, H, W, O)
    M, groups, H, W, O: tl.constexpr,
    row_head: tl.constexpr, row_period: tl.constexpr, row_tail: tl.constexpr,
    head: tl.constexpr, period: tl.constexpr, tail: tl.constexpr,
    RELU: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = row_head + row_period + row_tail
    C: tl.constexpr = head + period + tail
    group, y, x, o = _tile(groups, O, COLUMNS, CHANNELS)
    r, c = _class_of(y, H, row_head, row_period, row_tail), _class_of(x, W, head, period, tail)
    inside = (x < W)[:, None] & (o < O)[None, :]
    alone = ((x < head) | (x >= W - tail))[:, None]
    at, constant_at = x[:, None] * O + o[None, :], c[:, None] * O + o[None, :]
    if RELU:
        here = tl.load(position_map + y * W * O + at, inside, 0)
    d_map = tl.zeros((COLUMNS, CHANNELS), d_maps.dtype.element_ty)
    for i in range(GROUP):
        m = group * GROUP + i
        channels = tl.where(m < M, O, 0)  # the last group may have images too few
        there = (x < W)[:, None] & (o < channels)[None, :]
        d_sum = tl.load(d_out + (m * H + y) * W * O + at, there, 0).to(d_map.dtype)
        if RELU:
            sum = tl.load(constant + (m * R + r) * (C * O) + constant_at, there, 0) + here
            d_sum = tl.where(sum <= 0, 0, d_sum)
        d_map += d_sum
        # Before `head` and in `tail` a column is all of its class; those between are added up, class by class.
        d_row = d_rows + (m * H + y) * (C * O)
        tl.store(d_row + constant_at, d_sum, there & alone)
        for j in tl.static_range(head, head + period):
            of_class = tl.where((c == j)[:, None], d_sum, 0)
            tl.store(d_row + j * O + o, tl.sum(of_class, 0), o < channels)
    tl.store(d_maps + (group * H + y) * W * O + at, d_map, inside)


# ---------------------------------------------------------------------------------------------------------- launches

#: Numbers in a tile, unless a row is longer, the warps that work on it, and images in a group.
NUMBERS, WARPS, GROUP = 2048, 4, 8


def _broadcast_forward(
    constant: Tensor, position_map: Tensor, rows: list[int], columns: list[int], relu: bool, dtype: torch.dtype
) -> Tensor:
    out = schema.new_result(constant, position_map, rows, columns, relu, dtype)
    _launch(_forward, out.shape, rows, columns, relu, constant.contiguous(), position_map.contiguous(), out)
    return out


def _broadcast_backward(
    d_out: Tensor, constant: Tensor, position_map: Tensor, rows: list[int], columns: list[int], relu: bool
) -> tuple[Tensor, Tensor]:
    M, H, W, O = d_out.shape
    d_rows = constant.new_empty((M, H, sum(columns), O))
    d_maps = constant.new_empty((triton.cdiv(M, GROUP), H, W, O))
    inputs = d_out.contiguous(), constant.contiguous(), position_map.contiguous()
    _launch(_backward, d_out.shape, rows, columns, relu, *inputs, d_rows, d_maps)
    return gather(d_rows, 1, Classes(*rows)), d_maps.sum(0)


def _launch(kernel: Any, shape: torch.Size, rows: list[int], columns: list[int], relu: bool, *tensors: Tensor) -> None:
    """Run a program for each group of images, row and share of the channels, on the tensors' device, which need not be
    the current one; `shape` is the result's."""
    M, H, W, O = shape
    width = triton.next_power_of_2(W)
    channels = max(1, min(triton.next_power_of_2(O), NUMBERS // width))
    groups = triton.cdiv(M, GROUP)
    programs = groups * H * triton.cdiv(O, channels)
    if programs > 0:
        with torch.cuda.device_of(tensors[0]):
            kernel[(programs,)](
                *tensors, M, groups, H, W, O, *rows, *columns, relu, GROUP, width, channels, num_warps=WARPS,
                enable_fp_fusion=True,
            )  # fmt: skip


forward, backward = schema.calls("iio_kernels_triton", lambda dtype, arithmetic: dtype)
torch.library.impl("iio_kernels_triton::broadcast_forward", ("cpu", "cuda"), _broadcast_forward)
torch.library.impl("iio_kernels_triton::broadcast_backward", ("cpu", "cuda"), _broadcast_backward)
