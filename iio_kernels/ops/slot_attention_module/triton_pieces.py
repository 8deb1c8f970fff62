"""The steps of an iteration that the Triton kernels of the Slot Attention module have in common, for one image.

Slots s, features d of a slot and e of an input. `row` points to where each slot's row of the tape begins, or of what
the maps make; a column of it follows as an offset.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

from iio_kernels.runtime.triton_support import INTERPRETED, inlined


class Meta(NamedTuple):
    """What a kernel is compiled for: all of it `tl.constexpr`."""

    K: Any
    D: Any
    DX: Any
    H: Any
    K_PADDED: Any  # these to powers of two; the slots added have A = 0
    D_PADDED: Any
    DX_PADDED: Any
    H_PADDED: Any
    BLOCK_N: Any  # inputs in a tile
    BLOCK_I: Any  # numbers added up at a time in the products with weights
    DTYPE: Any  # of the arithmetic
    PRECISION: Any  # of tl.dot on float32
    INDEX: Any  # of offsets in x and its gradient
    M_AT: Any  # columns of the tape, of which s_hat is the first, S the first of SHARES
    S_AT: Any
    H_AT: Any
    Y_AT: Any
    P_AT: Any
    R_AT: Any
    SHARES_AT: Any
    WIDTH: Any  # of a row of the tape
    DI_AT: Any  # columns of the gradients to what the maps make, of which dp is the first
    DJ_AT: Any
    DY_AT: Any
    DS_AT: Any
    MADE: Any  # how many these are


class Strided(NamedTuple):
    """A tensor x[b, row, column] as a kernel takes it: its first element, and its strides in elements."""

    ptr: Any
    b: Any
    row: Any
    column: Any


#: From here on all threads of a program see what each has written. In the interpreter there is but one.
barrier = (lambda: None) if INTERPRETED else tl.debug_barrier


@inlined
def load(row, column, d, D, s, m: Meta):
    """The tile (s, d) of rows from `column` on, 0 beyond D features."""
    return tl.load(row[:, None] + (d + column)[None, :], (s < m.K)[:, None] & (d < D)[None, :], other=0.0)


@inlined
def store(row, column, d, D, s, values, m: Meta):
    tl.store(row[:, None] + (d + column)[None, :], values, (s < m.K)[:, None] & (d < D)[None, :])


@inlined
def load_number(row, column, s, m: Meta):
    """One column: a number for each slot."""
    return tl.load(row + column, s < m.K, other=0.0)


@inlined
def product(row, column, number, w, w_in, w_out, d, D, s, m: Meta):
    """sum_i rows[s, column + i] w[i, d] (s, d), of so many numbers i; w's strides lead from i to i and from d to d."""
    total = tl.zeros([m.K_PADDED, d.shape[0]], m.DTYPE)
    for i0 in range(0, number, m.BLOCK_I):
        i = i0 + tl.arange(0, m.BLOCK_I)
        x = load(row, column, i, number, s, m)
        w_at = w + (i[:, None] * w_in + d[None, :] * w_out)
        w_tile = tl.load(w_at, (i < number)[:, None] & (d < D)[None, :], other=0.0)
        total = tl.dot(x, w_tile, total, input_precision=m.PRECISION, out_dtype=m.DTYPE)
    return total


@inlined
def bias(b, d, D):
    return tl.load(b + d, d < D, other=0.0)[None, :]


@inlined
def normalise(x, norm_eps, d, D, m: Meta):
    """x with mean 0 and variance 1 over its D features, and the share of it that this leaves."""
    centred = tl.where((d < D)[None, :], x - (tl.sum(x, 1) / D)[:, None], 0.0)
    share = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + tl.full((), norm_eps, m.DTYPE))
    return centred * share[:, None], share


@inlined
def through_normalise(dx, x_hat, share, d, D):
    """The gradient to x from that to x̂."""
    mean, slope = tl.sum(dx, 1) / D, tl.sum(dx * x_hat, 1) / D
    return tl.where((d < D)[None, :], (dx - mean[:, None] - x_hat * slope[:, None]) * share[:, None], 0.0)


@inlined
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@inlined
def tanh(x):
    """For small x the series, as 1 - e^(-2x) then cancels."""
    e, x2 = tl.exp(-2.0 * tl.abs(x)), x * x
    large = (1.0 - e) / (1.0 + e)
    series = x2 * (62 / 2835 + x2 * (-1382 / 155925 + x2 * (21844 / 6081075 + x2 * (-929569 / 638512875))))
    series = x * (1.0 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + series))))
    return tl.where(x2 < 0.015625, series, tl.where(x < 0, -large, large))


@inlined
def load_inputs(x, x_row, x_column, n, e, N, m: Meta):
    """The tile x[n, e], 0 beyond the last input."""
    at = x + (n[:, None] * x_row + e[None, :] * x_column)
    return tl.load(at, (n < N)[:, None] & (e < m.DX)[None, :], other=0.0).to(m.DTYPE)


@inlined
def scores(x, p, m: Meta):
    """<x[n], p[s]> (n, s)."""
    return tl.dot(x, tl.trans(p), input_precision=m.PRECISION, out_dtype=m.DTYPE)


@inlined
def mixtures(a, p, m: Meta):
    """sum_s a[n, s] p[s, e] (n, e)."""
    if m.K_PADDED >= 16:
        return tl.dot(a, p, input_precision=m.PRECISION, out_dtype=m.DTYPE)
    # tl.dot adds up no fewer than 16 products, here most of them with 0.
    return tl.sum(tl.trans(a)[:, :, None] * p[:, None, :], 0)


@inlined
def attention(x, p, s, m: Meta):
    """A (n, s)."""
    L = tl.where((s < m.K)[None, :], scores(x, p, m), float("-inf"))
    A = tl.exp(L - tl.max(L, 1)[:, None])
    return A * (1.0 / tl.sum(A, 1))[:, None]


@inlined
def attention_gradient(x, A, dM, dM_M, dA_in, n, s, N, taken, m: Meta):
    """dL (n, s), with dA = <dM[s], x[n] - M[s]> and where `taken` what comes to A itself; dM is divided by S."""
    dA = scores(x, dM, m) - dM_M[None, :]
    if dA_in is not None:  # noqa: SIM102
        if taken:
            at = dA_in.ptr + (s[None, :] * dA_in.row + n[:, None] * dA_in.column)
            dA += tl.load(at, (n < N)[:, None] & (s < m.K)[None, :], other=0.0)
    dL = A * (dA - tl.sum(A * dA, 1)[:, None])
    return tl.where((n < N)[:, None] & (s < m.K)[None, :], dL, 0.0)
