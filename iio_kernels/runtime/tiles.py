"""Triton tiles of what a decoder drew for slots, `decoded (B, K, C + 1, H, W)`, for kernels that know no neighbours.

A program takes a block of pixels of one image and holds all their numbers at once, as a tile (slots, pixels, channels)
with sizes rounded up to powers of two. So decoded is read exactly once, plain or channels last (other strides after a
copy), and a kernel is the formula. Along a tile's axes: slots k, pixels p, channels c, the mask's logit behind the
others. Offsets within an image are INDEX, those of images int64. Strides count elements; a tensor that is None is not
asked for, or did not come.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from iio_kernels.runtime.layout import is_channels_last
from iio_kernels.runtime.triton_support import inlined

#: At least so many pixels in a tile, since in a plain layout fewer leave the memory's 32-byte sectors half used, and at
#: most so many. Beyond 64 slots of RGB a thread therefore has more numbers, and in the end keeps some in local memory.
LEAST_PIXELS, MOST_PIXELS = 8, 256


@inlined
def axes(blocks, INDEX: tl.constexpr, SLOTS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's image, and what its tile's axes count."""
    b, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * PIXELS
    k, p, c = tl.arange(0, SLOTS), first + tl.arange(0, PIXELS), tl.arange(0, CHANNELS)
    return b.to(tl.int64), k.to(INDEX), p.to(INDEX), c.to(INDEX)


@inlined
def decoded_at(
    b, k, p, c, blocks, N, K: tl.constexpr, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr
):
    """Where the tile's numbers lie in (B, K, C + 1, N), or with CHANNELS_LAST (B, K, N, C + 1); which there are.

    Channels last, pixels and channels are one axis, as in memory: three axes Triton 3.6 spreads over threads so that
    sums over slots take many exchanges, in another order than those of a plain layout.
    """
    if CHANNELS_LAST:
        j = tl.arange(0, p.shape[0] * c.shape[0]).to(INDEX)[None, :]
        first = (tl.program_id(0) % blocks * p.shape[0]).to(INDEX)
        k, p, c = k[:, None], first + j // c.shape[0], j % c.shape[0]
        at = (k * N + p) * (C + 1) + c
    else:
        k, p, c = k[:, None, None], p[None, :, None], c[None, None, :]
        at = (k * (C + 1) + c) * N + p
    return b * (K * (C + 1)) * N + at, (k < K) & (p < N) & (c < C + 1)


@inlined
def split(tile, k, c, K: tl.constexpr, C: tl.constexpr):
    """Channels (slots, pixels, channels), 0 where the logit was; the logits (slots, pixels), -inf beyond the last."""
    is_logit = (c == C)[None, None, :]
    logits = tl.where((k < K)[:, None], tl.sum(tl.where(is_logit, tile, 0), 2), float("-inf"))
    return tl.where(is_logit, 0, tile), logits


@inlined
def softmax(y):
    """Over slots (slots, pixels)."""
    e = tl.exp(y - tl.max(y, 0)[None, :])
    return e / tl.sum(e, 0)[None, :]


def dense(decoded: Tensor) -> Tensor:
    """(B, K, C + 1, H, W) one number behind the other, or (B, K, H, W, C + 1) where channels are last already."""
    return (decoded.permute(0, 1, 3, 4, 2) if is_channels_last(decoded) else decoded).contiguous()


def evenly_spaced(x: Tensor | None) -> Tensor | None:
    """x itself where one stride leads from each pixel to the next, otherwise a copy."""
    if x is None or 1 in x.shape[2:] or x.stride(2) == x.shape[3] * x.stride(3):
        return x
    return x.contiguous()


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Those of images, of slots or channels, and of pixels."""
    if x is None:
        return 0, 0, 0
    return x.stride(0), x.stride(1), x.stride(2 if x.shape[3] == 1 else 3)


def settings(decoded: Tensor, dtype: torch.dtype, numbers: int, *others: Tensor | None) -> dict[str, Any]:
    """What kernels take by name, with tiles of so many numbers; `others` are other tensors of images, indexed alike."""
    _, K, channels, H, W = decoded.shape
    slots, width = triton.next_power_of_2(K), triton.next_power_of_2(channels)
    pixels = min(max(numbers // (slots * width), LEAST_PIXELS), MOST_PIXELS)
    # How far the last number of an image is from its first.
    spans = [K * channels * H * W]
    for x in others:
        if x is not None:
            spans.append(sum((n - 1) * stride for n, stride in zip(x.shape[1:], x.stride()[1:], strict=True)))
    return {
        "N": H * W,
        "blocks": triton.cdiv(H * W, pixels),
        "K": K,
        "C": channels - 1,
        "CHANNELS_LAST": is_channels_last(decoded),
        "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "INDEX": tl.int64 if max(spans) >= 2**31 else tl.int32,
        "SLOTS": slots,
        "PIXELS": pixels,
        "CHANNELS": width,
    }


def launch(kernel: Any, warps: int, settings: dict[str, Any], decoded: Tensor, *arguments: Any) -> None:
    """Run a program for each block of each image, on the tensors' device, which need not be the current one."""
    programs = len(decoded) * settings["blocks"]
    if programs > 0:
        with torch.cuda.device_of(decoded):
            kernel[(programs,)](decoded, *arguments, **settings, num_warps=warps, enable_fp_fusion=True)
