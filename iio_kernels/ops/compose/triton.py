"""Slot composition in Triton: one pass over memory forward, one backward, on the tiles of `tiles`.

The error is two sums in fixed order: that of each program, then for each image that of its programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iio_kernels.ops.compose import schema
from iio_kernels.ops.compose.common import Operands
from iio_kernels.runtime.tiles import axes, decoded_at, dense, evenly_spaced, launch, settings, softmax, split, strides

# ----------------------------------------------------------------------------------------------------------- kernels
# `tiles` says what axes, offsets and strides are.


@triton.jit
def _forward(
    decoded, x, x_image, x_channel, x_pixel,  # x (B, C, N) and its strides
    x_hat_out, a_out, squares,  # results: (B, C, N), (B, K, N), (B, blocks)
    N, blocks, K: tl.constexpr, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, DTYPE: tl.constexpr,
    INDEX: tl.constexpr, SLOTS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    b, k, p, c = axes(blocks, INDEX, SLOTS, PIXELS, CHANNELS)
    at_decoded, inside_decoded = decoded_at(b, k, p, c, blocks, N, K, C, CHANNELS_LAST, INDEX)
    rgba = tl.reshape(tl.load(decoded + at_decoded, inside_decoded, 0), (SLOTS, PIXELS, CHANNELS))
    rgb, alpha = split(rgba.to(DTYPE), k, c, K, C)
    a = softmax(alpha)
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
    b, k, p, c = axes(blocks, INDEX, SLOTS, PIXELS, CHANNELS)
    at_decoded, inside_decoded = decoded_at(b, k, p, c, blocks, N, K, C, CHANNELS_LAST, INDEX)
    rgba = tl.reshape(tl.load(decoded + at_decoded, inside_decoded, 0), (SLOTS, PIXELS, CHANNELS))
    rgb, alpha = split(rgba.to(DTYPE), k, c, K, C)
    a = softmax(alpha)

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
    d_rgba = tl.reshape(d_rgba.to(d_decoded.dtype.element_ty), at_decoded.shape)
    tl.store(d_decoded + at_decoded, d_rgba, inside_decoded)


# ---------------------------------------------------------------------------------------------------------- launches

#: Numbers in a tile, and the warps that work on it. One warp holds 4 slots of RGB at 128 pixels: then each thread has
#: all numbers of its 4 pixels, and reads them 16 bytes at a time, in either layout; no sum leaves the thread. 64
#: numbers of decoded take up to 166 of its 255 registers backwards (as compiled for sm_90).
NUMBERS, WARPS = 2048, 1


def _composition_forward(
    decoded: Tensor, image: Tensor | None, return_reconstruction: bool, return_masks: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x_hat, a, errors = schema.new_results(decoded, image, return_reconstruction, return_masks)
    x = evenly_spaced(image)
    how = settings(decoded, errors.dtype, NUMBERS, x)
    squares = None if x is None else errors.new_empty((len(errors), how["blocks"]))
    results = x_hat if return_reconstruction else None, a if return_masks else None, squares
    launch(_forward, WARPS, how, dense(decoded), x, *strides(x), *results)
    return x_hat, a, errors if image is None or squares is None else squares.sum(1) / image.shape[1:].numel()


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
    d_x_hat, d_a, x = map(evenly_spaced, (d_reconstruction, d_masks, image))
    g = d_errors, 0 if d_errors is None else d_errors.stride(0)
    how = settings(decoded, d_image.dtype, NUMBERS, d_x_hat, d_a, x)
    inputs = dense(decoded), x, *strides(x), d_x_hat, *strides(d_x_hat), d_a, *strides(d_a), *g
    launch(_backward, WARPS, how, *inputs, d_decoded, d_image if image_gradient else None)
    return d_decoded, d_image


def _inputs(operands: Operands) -> tuple[Tensor, Tensor | None]:
    """Both as they are stored; but what meets a float64 becomes one."""
    if operands.dtype() != torch.float64:
        return operands
    decoded, image = operands
    return decoded.double(), None if image is None else image.double()


forward, backward = schema.calls("iio_kernels_triton", _inputs)
torch.library.impl("iio_kernels_triton::composition_forward", ("cpu", "cuda"), _composition_forward)
torch.library.impl("iio_kernels_triton::composition_backward", ("cpu", "cuda"), _composition_backward)
