"""The spatial mixture in Triton: one pass over memory forward, one backward, on the tiles of `tiles`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from iio_kernels.ops.spatial_mixture import schema
from iio_kernels.ops.spatial_mixture.common import Operands
from iio_kernels.runtime.tiles import axes, decoded_at, dense, evenly_spaced, launch, settings, softmax, split, strides
from iio_kernels.runtime.triton_support import inlined

# ----------------------------------------------------------------------------------------------------------- kernels
# `tiles` says what axes, offsets and strides are.


@inlined
def _mixture(decoded_tile, x, k, c, precision, K: tl.constexpr, C: tl.constexpr):
    """x - mu (slots, pixels, channels), 0 beyond the channels; l and, but for the peak, log p_k (slots, pixels)."""
    mu, l = split(decoded_tile, k, c, K, C)
    difference = x[None, :, :] - mu
    log_p_k = tl.sum(difference * difference, 2) * (-0.5 * precision)
    return difference, l, tl.where((k < K)[:, None], log_p_k, float("-inf"))


@inlined
def _sums(y, k):
    """Of e^y (slots, pixels): the largest y, and over e^largest the sum over all slots, (pixels,); each slot's share of
    it, and the sum over all slots but one as factor * e^exponent (slots, pixels).

    With two scales no sum overflows or vanishes: that of the largest y and that of the next. Where the largest is left
    out, its sum is made at the other's scale; and a slot that is not the largest is taken from a sum with it, which is
    at least 1, so that nothing cancels.
    """
    most = tl.max(y, 0)
    largest = tl.min(tl.where(y == most[None, :], k[:, None], y.shape[0]), 0)[None, :] == k[:, None]
    next = tl.max(tl.where(largest, float("-inf"), y), 0)
    scale = tl.where(next > float("-inf"), next, 0)
    e = tl.where(largest, 0, tl.exp(y - scale[None, :]))
    rest, ratio = tl.sum(e, 0), tl.exp(next - most)
    total = 1 + ratio * rest
    share = tl.where(largest, 1, e * ratio[None, :]) / total[None, :]
    factor = tl.where(largest, rest[None, :], 1 + ratio[None, :] * (rest[None, :] - e))
    return most, total, share, factor, tl.where(largest, (next - most)[None, :], 0)


@triton.jit
def _forward(
    decoded, x, x_image, x_channel, x_pixel,  # x (B, C, N) and its strides
    log_p_out, m_out, q_out, leave_one_out_out, d_decoded,  # results: (B, N), three (B, K, N), laid out as decoded is
    precision: tl.float64, log_peak: tl.float64,  # 1 / sigma^2, sum_c log N(x_c; x_c, sigma^2)
    N, blocks, K: tl.constexpr, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, DTYPE: tl.constexpr,
    INDEX: tl.constexpr, SLOTS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    b, k, p, c = axes(blocks, INDEX, SLOTS, PIXELS, CHANNELS)
    at_decoded, inside_decoded = decoded_at(b, k, p, c, blocks, N, K, C, CHANNELS_LAST, INDEX)
    tile = tl.reshape(tl.load(decoded + at_decoded, inside_decoded, 0), (SLOTS, PIXELS, CHANNELS)).to(DTYPE)
    at_x = b * x_image + (c[None, :] * x_channel + p[:, None] * x_pixel)
    x_tile = tl.load(x + at_x, (p < N)[:, None] & (c < C)[None, :], 0).to(DTYPE)

    precision, log_peak = tl.full((), precision, DTYPE), tl.full((), log_peak, DTYPE)
    difference, l, log_p_k = _mixture(tile, x_tile, k, c, precision, K, C)
    l_most, m_total, m, m_factor, m_exponent = _sums(l, k)
    joint = log_p_k + (l - l_most[None, :])
    most, p_total, r, p_factor, p_exponent = _sums(joint, k)
    tl.store(log_p_out + b * N + p, tl.log(p_total / m_total) + (most + log_peak), p < N)
    if m_out is not None:
        at, inside = b * K * N + (k[:, None] * N + p[None, :]), (k < K)[:, None] & (p < N)[None, :]
        leave_one_out = tl.log(p_factor / m_factor) + (p_exponent - m_exponent) + (most + log_peak)[None, :]
        tl.store(m_out + at, m, inside)
        tl.store(q_out + at, softmax(log_p_k), inside)
        tl.store(leave_one_out_out + at, leave_one_out, inside)
        d_mu = (-r * precision)[:, :, None] * difference
        d_tile = tl.where((c == C)[None, None, :], (m - r)[:, :, None], d_mu)
        tl.store(d_decoded + at_decoded, tl.reshape(d_tile, at_decoded.shape), inside_decoded)


@triton.jit
def _backward(
    decoded, x, x_image, x_channel, x_pixel,  # as in `_forward`
    g_in, g_image, _, g_pixel,  # (B, 1, N) and its strides
    d_m_in, d_m_image, d_m_slot, d_m_pixel,  # (B, K, N) and its strides
    d_q_in, d_q_image, d_q_slot, d_q_pixel,  # (B, K, N) and its strides
    d_x, d_decoded,  # results: (B, C, N), laid out as decoded is
    precision: tl.float64,
    N, blocks, K: tl.constexpr, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, DTYPE: tl.constexpr,
    INDEX: tl.constexpr, SLOTS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    b, k, p, c = axes(blocks, INDEX, SLOTS, PIXELS, CHANNELS)
    at_decoded, inside_decoded = decoded_at(b, k, p, c, blocks, N, K, C, CHANNELS_LAST, INDEX)
    tile = tl.reshape(tl.load(decoded + at_decoded, inside_decoded, 0), (SLOTS, PIXELS, CHANNELS)).to(DTYPE)
    at_x, inside_x = b * x_image + (c[None, :] * x_channel + p[:, None] * x_pixel), (p < N)[:, None] & (c < C)[None, :]
    x_tile = tl.load(x + at_x, inside_x, 0).to(DTYPE)

    precision = tl.full((), precision, DTYPE)
    difference, l, log_p_k = _mixture(tile, x_tile, k, c, precision, K, C)
    m = softmax(l)
    d_log_p_k, d_l = tl.zeros((SLOTS, PIXELS), DTYPE), tl.zeros((SLOTS, PIXELS), DTYPE)
    inside = (k < K)[:, None] & (p < N)[None, :]
    if g_in is not None:
        g = tl.load(g_in + b * g_image + p * g_pixel, p < N, 0)[None, :]
        r = softmax(log_p_k + (l - tl.max(l, 0)[None, :]))
        d_log_p_k += g * r
        d_l += g * (r - m)
    if d_m_in is not None:
        d_m = tl.load(d_m_in + b * d_m_image + (k[:, None] * d_m_slot + p[None, :] * d_m_pixel), inside, 0)
        d_l += m * (d_m - tl.sum(m * d_m, 0)[None, :])
    if d_q_in is not None:
        d_q = tl.load(d_q_in + b * d_q_image + (k[:, None] * d_q_slot + p[None, :] * d_q_pixel), inside, 0)
        q = softmax(log_p_k)
        d_log_p_k += q * (d_q - tl.sum(q * d_q, 0)[None, :])

    d_mu = (d_log_p_k * precision)[:, :, None] * difference
    if d_x is not None:
        tl.store(d_x + b * C * N + (c[None, :] * N + p[:, None]), -tl.sum(d_mu, 0), inside_x)
    d_tile = tl.where((c == C)[None, None, :], d_l[:, :, None], d_mu).to(d_decoded.dtype.element_ty)
    tl.store(d_decoded + at_decoded, tl.reshape(d_tile, at_decoded.shape), inside_decoded)


# ---------------------------------------------------------------------------------------------------------- launches

#: Numbers in a tile, and the warps that work on it: a quarter of composition's, as six tiles (slots, pixels) live
#: beside them. With twice as many, 8 slots in a plain layout spill from registers (as compiled for sm_90).
NUMBERS, WARPS = 512, 1


def _mixture_forward(
    image: Tensor, decoded: Tensor, sigma: float, everything: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    log_p, masks, posterior, leave_one_out, d_decoded = schema.new_results(image, decoded, sigma, everything)
    x = evenly_spaced(image)
    how = settings(decoded, log_p.dtype, NUMBERS, x)
    results = log_p, *((masks, posterior, leave_one_out, d_decoded) if everything else [None] * 4)
    constants = 1 / sigma**2, -image.shape[1] * math.log(sigma * math.sqrt(2 * math.pi))
    launch(_forward, WARPS, how, dense(decoded), x, *strides(x), *results, *constants)
    return log_p, masks, posterior, leave_one_out, d_decoded


def _mixture_backward(
    d_log_likelihood: Tensor | None,
    d_masks: Tensor | None,
    d_posterior: Tensor | None,
    image: Tensor,
    decoded: Tensor,
    sigma: float,
    image_gradient: bool,
    masks: Tensor | None = None,
    posterior: Tensor | None = None,
    d_nll: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    incoming = d_log_likelihood, d_masks, d_posterior
    d_image, d_decoded = schema.new_gradients(*incoming, image, decoded, sigma, image_gradient)
    g = None if d_log_likelihood is None else d_log_likelihood.unsqueeze(1)
    x, g, d_m, d_q = map(evenly_spaced, (image, g, d_masks, d_posterior))
    how = settings(decoded, d_image.dtype, NUMBERS, x, g, d_m, d_q)
    inputs = dense(decoded), x, *strides(x), g, *strides(g), d_m, *strides(d_m), d_q, *strides(d_q)
    launch(_backward, WARPS, how, *inputs, d_image if image_gradient else None, d_decoded, 1 / sigma**2)
    return d_image, d_decoded


def _inputs(operands: Operands) -> tuple[Tensor, Tensor]:
    """Both as they are stored; but what meets a float64 becomes one."""
    if operands.dtype() != torch.float64:
        return operands
    image, decoded = operands
    return image.double(), decoded.double()


#: Which of forward's results backward reads: none, exponentials take less time than reading what they gave.
SAVED = ()

forward, backward = schema.calls("iio_kernels_triton", _inputs)
torch.library.impl("iio_kernels_triton::mixture_forward", ("cpu", "cuda"), _mixture_forward)
torch.library.impl("iio_kernels_triton::mixture_backward", ("cpu", "cuda"), _mixture_backward)
