"""Slot composition in Triton: one pass over memory forward, one backward.

A program takes a block of pixels of one image and holds all their numbers at once, as a tile (slots, pixels, channels)
with sizes rounded up to powers of two. So decoded is read exactly once, plain or channels last (other strides after a
copy), and a kernel is the formula. The error is two sums in fixed order: that of each program, then for each image that
of its programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from iio_kernels._numerics import arithmetic_dtype
from iio_kernels._triton import inlined
from iio_kernels.ops.composition import schema

# ----------------------------------------------------------------------------------------------------------- kernels
# Along a tile's axes: slots k, pixels p, channels c, alpha behind the colours. Offsets within an image are INDEX, those
# of images int64. Strides count elements; a tensor that is None is not asked for, or did not come.


@inlined
def _axes(blocks, INDEX: tl.constexpr, SLOTS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's image, and what its tile's axes count."""
    b, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * PIXELS
    k, p, c = tl.arange(0, SLOTS), first + tl.arange(0, PIXELS), tl.arange(0, CHANNELS)
    return b.to(tl.int64), k.to(INDEX), p.to(INDEX), c.to(INDEX)


@inlined
def _decoded_at(
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
def _softmax(rgba, k, c, K: tl.constexpr, C: tl.constexpr):
    """rgb (slots, pixels, channels), 0 where alpha was; a (slots, pixels), the softmax over slots of alpha."""
    is_alpha = (c == C)[None, None, :]
    alpha = tl.where((k < K)[:, None], tl.sum(tl.where(is_alpha, rgba, 0), 2), float("-inf"))
    e = tl.exp(alpha - tl.max(alpha, 0)[None, :])
    return tl.where(is_alpha, 0, rgba), e / tl.sum(e, 0)[None, :]


@triton.jit
def _forward(
    decoded, x, x_image, x_channel, x_pixel,  # x (B, C, N) and its strides
    x_hat_out, a_out, squares,  # results: (B, C, N), (B, K, N), (B, blocks)
    N, blocks, K: tl.constexpr, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, DTYPE: tl.constexpr,
    INDEX: tl.constexpr, SLOTS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    b, k, p, c = _axes(blocks, INDEX, SLOTS, PIXELS, CHANNELS)
    decoded_at, decoded_inside = _decoded_at(b, k, p, c, blocks, N, K, C, CHANNELS_LAST, INDEX)
    rgba = tl.reshape(tl.load(decoded + decoded_at, decoded_inside, 0), (SLOTS, PIXELS, CHANNELS))
    rgb, a = _softmax(rgba.to(DTYPE), k, c, K, C)
    if a_out is not None:
        tl.store(a_out + b * K * N + (k[:, None] * N + p[None, :]), a, (k < K)[:, None] & (p < N)[None, :])

    inside = (p < N)[:, None] & (c < C)[None, :]
    x_hat = tl.sum(a[:, :, None] * rgb, 0)
    if x_hat_out is not None:
        tl.store(x_hat_out + b * C * N + (c[None, :] * N + p[:, None]), x_hat, inside)
    if x is not None:
        at = b * x_image + (c[None, :] * x_channel + p[:, None] * x_pixel)
        difference = tl.where(inside, x_hat - tl.load(x + at, inside, 0).to(DTYPE), 0)
        tl.store(squares + tl.program_id(0), tl.sum(tl.sum(difference * difference, 1), 0))


@triton.jit
def _backward(
    decoded, x, x_image, x_channel, x_pixel,  # as in `_forward`
    d_x_hat_in, d_x_hat_image, d_x_hat_channel, d_x_hat_pixel,  # (B, C, N) and its strides
    da_in, da_image, da_slot, da_pixel,  # (B, K, N) and its strides
    g, g_image,  # (B,) and its stride
    d_decoded, d_x,  # results: laid out as decoded is; (B, C, N)
    N, blocks, K: tl.constexpr, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, DTYPE: tl.constexpr,
    INDEX: tl.constexpr, SLOTS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    b, k, p, c = _axes(blocks, INDEX, SLOTS, PIXELS, CHANNELS)
    decoded_at, decoded_inside = _decoded_at(b, k, p, c, blocks, N, K, C, CHANNELS_LAST, INDEX)
    rgba = tl.reshape(tl.load(decoded + decoded_at, decoded_inside, 0), (SLOTS, PIXELS, CHANNELS))
    rgb, a = _softmax(rgba.to(DTYPE), k, c, K, C)

    inside = (p < N)[:, None] & (c < C)[None, :]
    d_x_hat = tl.zeros((PIXELS, CHANNELS), DTYPE)
    if d_x_hat_in is not None:
        at = b * d_x_hat_image + (c[None, :] * d_x_hat_channel + p[:, None] * d_x_hat_pixel)
        d_x_hat += tl.load(d_x_hat_in + at, inside, 0)
    if g is not None:
        at = b * x_image + (c[None, :] * x_channel + p[:, None] * x_pixel)
        x_hat = tl.sum(a[:, :, None] * rgb, 0)
        factor = 2 * tl.load(g + b * g_image) / (C * N)
        through_error = tl.where(inside, factor * (x_hat - tl.load(x + at, inside, 0).to(DTYPE)), 0)
        d_x_hat += through_error
        if d_x is not None:
            tl.store(d_x + b * C * N + (c[None, :] * N + p[:, None]), -through_error, inside)

    da = tl.sum(d_x_hat[None, :, :] * rgb, 2)
    if da_in is not None:
        at = b * da_image + (k[:, None] * da_slot + p[None, :] * da_pixel)
        da += tl.load(da_in + at, (k < K)[:, None] & (p < N)[None, :], 0)
    d_rgb = a[:, :, None] * d_x_hat[None, :, :]
    d_alpha = a * (da - tl.sum(a * da, 0)[None, :])
    d_rgba = tl.where((c == C)[None, None, :], d_alpha[:, :, None], d_rgb)
    d_rgba = tl.reshape(d_rgba.to(d_decoded.dtype.element_ty), decoded_at.shape)
    tl.store(d_decoded + decoded_at, d_rgba, decoded_inside)


# ---------------------------------------------------------------------------------------------------------- launches

#: Numbers in a tile, and the warps that work on it. One warp holds 4 slots of RGB at 128 pixels: then each thread has
#: all numbers of its 4 pixels, and reads them 16 bytes at a time, in either layout; no sum leaves the thread. 64
#: numbers of decoded take up to 166 of its 255 registers backwards (as compiled for sm_90).
NUMBERS, WARPS = 2048, 1
#: At least so many pixels, since in a plain layout fewer leave the memory's 32-byte sectors half used, and at most so
#: many. Beyond 64 slots of RGB a thread therefore has more numbers, and in the end keeps some in local memory.
LEAST_PIXELS, MOST_PIXELS = 8, 256


def _composition_forward(
    decoded: Tensor, image: Tensor | None, return_reconstruction: bool, return_masks: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x_hat, a, errors = schema.new_results(decoded, image, return_reconstruction, return_masks)
    x = _evenly_spaced(image)
    settings = _settings(decoded, errors.dtype, x)
    squares = None if x is None else errors.new_empty((len(errors), settings["blocks"]))
    results = x_hat if return_reconstruction else None, a if return_masks else None, squares
    _launch(_forward, settings, _dense(decoded), x, *_strides(x), *results)
    return x_hat, a, errors if squares is None else squares.sum(1) / image.shape[1:].numel()


def _composition_backward(
    d_reconstruction: Tensor | None,
    d_masks: Tensor | None,
    d_errors: Tensor | None,
    decoded: Tensor,
    image: Tensor | None,
    image_gradient: bool,
) -> tuple[Tensor, Tensor]:
    incoming = d_reconstruction, d_masks, d_errors
    d_decoded, d_image = schema.new_gradients(*incoming, decoded, image, image_gradient)
    d_x_hat, d_a, x = map(_evenly_spaced, (d_reconstruction, d_masks, image))
    g = d_errors, 0 if d_errors is None else d_errors.stride(0)
    settings = _settings(decoded, d_image.dtype, d_x_hat, d_a, x)
    inputs = _dense(decoded), x, *_strides(x), d_x_hat, *_strides(d_x_hat), d_a, *_strides(d_a), *g
    _launch(_backward, settings, *inputs, d_decoded, d_image if image_gradient else None)
    return d_decoded, d_image


def _dense(decoded: Tensor) -> Tensor:
    """(B, K, C + 1, H, W) one number behind the other, or (B, K, H, W, C + 1) where channels are last already."""
    return (decoded.permute(0, 1, 3, 4, 2) if schema.is_channels_last(decoded) else decoded).contiguous()


def _evenly_spaced(x: Tensor | None) -> Tensor | None:
    """x itself where one stride leads from each pixel to the next, otherwise a copy."""
    if x is None or 1 in x.shape[2:] or x.stride(2) == x.shape[3] * x.stride(3):
        return x
    return x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    """Those of images, of slots or channels, and of pixels."""
    return (0, 0, 0) if x is None else (*x.stride()[:2], x.stride(2 if x.shape[3] == 1 else 3))


def _settings(decoded: Tensor, dtype: torch.dtype, *others: Tensor | None) -> dict[str, Any]:
    """The numbers that kernels take by name; `others` are the other tensors of images, indexed as decoded is."""
    _, K, channels, H, W = decoded.shape
    slots, width = triton.next_power_of_2(K), triton.next_power_of_2(channels)
    pixels = min(max(NUMBERS // (slots * width), LEAST_PIXELS), MOST_PIXELS)
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
        "CHANNELS_LAST": schema.is_channels_last(decoded),
        "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "INDEX": tl.int64 if max(spans) >= 2**31 else tl.int32,
        "SLOTS": slots,
        "PIXELS": pixels,
        "CHANNELS": width,
    }


def _launch(kernel: Any, settings: dict[str, Any], decoded: Tensor, *arguments: Any) -> None:
    """Run a program for each block of each image, on the tensors' device, which need not be the current one."""
    programs = len(decoded) * settings["blocks"]
    if programs > 0:
        with torch.cuda.device_of(decoded):
            kernel[(programs,)](decoded, *arguments, **settings, num_warps=WARPS, enable_fp_fusion=True)


def _inputs(decoded: Tensor, image: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both as they are stored; but what meets a float64 becomes one."""
    if arithmetic_dtype(decoded, image) == torch.float64:
        return decoded.double(), None if image is None else image.double()
    return decoded, image


forward, backward = schema.calls("iio_kernels_triton", _inputs)
torch.library.impl("iio_kernels_triton::composition_forward", ("cpu", "cuda"), _composition_forward)
torch.library.impl("iio_kernels_triton::composition_backward", ("cpu", "cuda"), _composition_backward)
