"""The formula of slot attention in pieces, for one head of one image, that its Triton kernels have in common.

A tile's axes are inputs n, slots s and features d. What of them takes part is `inputs (n,)` and `slots (s,)`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

from iio_kernels.runtime.triton_support import inlined


class Strided(NamedTuple):
    """A tensor x[b, h, row, column] as a kernel takes it: its first element, and its strides in elements."""

    ptr: Any
    b: Any
    h: Any
    row: Any
    column: Any


class Matrix(NamedTuple):
    """x[b, h] of it, a matrix or (without columns) a vector."""

    ptr: Any
    row: Any
    column: Any


class Meta(NamedTuple):
    """What a kernel is compiled for: all of it `tl.constexpr`."""

    K: Any
    DK: Any
    DV: Any
    K_PADDED: Any  # K to a power of two; the slots added have A = 0
    BLOCK_N: Any  # inputs in a tile
    BLOCK_D: Any  # features added up at a time in the dot products of L and dA
    WIDTH: Any  # features of U, dq, dk and dv that one program makes
    DTYPE: Any  # of the arithmetic
    OPERAND: Any  # of what tl.dot multiplies
    PRECISION: Any  # of tl.dot on float32
    INDEX: Any  # of offsets


@inlined
def head(x, b, h):
    """x[b, h]."""
    return Matrix(x.ptr + (b * x.b + h * x.h), x.row, x.column)


@inlined
def at(x, row, column):
    """Pointers to x[row, column]."""
    return x.ptr + row * x.row + column * x.column


@inlined
def load(x, row, column, taken, D, m: Meta):
    """The tile x[row, column] to multiply, 0 in rows that are not `taken` and beyond D columns."""
    mask = taken[:, None] & (column < D)[None, :]
    return tl.load(at(x, row[:, None], column[None, :]), mask, other=0.0).to(m.OPERAND)


@inlined
def dot(x, y, sum, m: Meta):
    """sum + x y."""
    return tl.dot(x.to(m.OPERAND), y, sum, input_precision=m.PRECISION, out_dtype=m.DTYPE)


@inlined
def scores(x, y, n, s, inputs, slots, D, m: Meta):
    """<x[n], y[s]> (n, s), over all D features."""
    total = tl.zeros([m.BLOCK_N, m.K_PADDED], m.DTYPE)
    for d0 in range(0, D, m.BLOCK_D):
        d = d0 + tl.arange(0, m.BLOCK_D).to(m.INDEX)
        total = dot(load(x, n, d, inputs, D, m), tl.trans(load(y, s, d, slots, D, m)), total, m)
    return total


@inlined
def mixtures(a, y, sum, s, d, slots, D, m: Meta):
    """sum + sum_s a[n, s] y[s, d] (n, d), over all slots."""
    y = load(y, s, d, slots, D, m)
    if m.K_PADDED >= 16:
        return dot(a, y, sum, m)
    # tl.dot adds up no fewer than 16 products, here most of them with 0.
    return sum + tl.sum(tl.trans(a)[:, :, None] * y[:, None, :], 0)


@inlined
def taking_part(mask, i, size):
    """Which of the slots or inputs i exist and take part."""
    taken = i < size
    if mask is not None:
        taken = tl.load(mask.ptr + i * mask.row, taken, other=0).to(tl.int1)
    return taken


@inlined
def logits(q, k, logit_bias, n, s, inputs, slots, scale, m: Meta):
    """L (n, s), minus infinity where an input or a slot takes no part."""
    L = tl.full((), scale, m.DTYPE) * scores(k, q, n, s, inputs, slots, m.DK, m)
    if logit_bias is not None:
        L += tl.load(logit_bias.ptr + s * logit_bias.row, slots, other=0.0).to(m.DTYPE)[None, :]
    return tl.where(inputs[:, None] & slots[None, :], L, float("-inf"))


@inlined
def softmax(L, normaliser, n, inputs, slots, m: Meta):
    """A (n, s), over the slots of this head, or of all heads where their `normaliser` is given."""
    if normaliser is None:
        A = tl.exp(L - tl.max(L, 1)[:, None])
        A *= (1.0 / tl.sum(A, 1))[:, None]
    else:
        largest = tl.load(at(normaliser, n, 0), inputs, other=0.0)
        A = tl.exp(L - largest[:, None]) * tl.load(at(normaliser, n, 1), inputs, other=0.0)[:, None]
    return tl.where(inputs[:, None] & slots[None, :], A, 0.0)


@inlined
def per_slot(U, S, dU, dS, s, NORMALIZE: tl.constexpr, m: Meta):
    """What the gradient needs of each slot: whether it has a U at all, 1 / S, and <dU, U> / S - dS, all (s,)."""
    filled = s < m.K
    share = tl.full([m.K_PADDED], 1.0, m.DTYPE)
    mean = tl.zeros([m.K_PADDED], m.DTYPE)
    if NORMALIZE:
        normaliser = tl.load(S.ptr + s * S.row, filled, other=0.0)
        filled = normaliser != 0
        share = tl.where(filled, 1.0 / tl.where(filled, normaliser, 1.0), 0.0)
        for d0 in range(0, m.DV, m.BLOCK_D):
            d = d0 + tl.arange(0, m.BLOCK_D).to(m.INDEX)
            taken = filled[:, None] & (d < m.DV)[None, :]
            dU_tile = tl.load(at(dU, s[:, None], d[None, :]), taken, other=0.0)
            mean += tl.sum(dU_tile * tl.load(at(U, s[:, None], d[None, :]), taken, other=0.0), 1)
        mean *= share
    if dS is not None:
        mean -= tl.load(dS.ptr + s * dS.row, s < m.K, other=0.0)
    return filled, share, mean


@inlined
def attention_gradient(v, dU, dA, n, s, inputs, slots, filled, share, mean, m: Meta):
    """The gradient to A (n, s): <dU[s], v[n] - U[s]> / S[s] + dS[s] and what arrives at A itself, 0 where A is."""
    live = inputs[:, None] & slots[None, :]
    gradient = scores(v, dU, n, s, inputs, filled, m.DV, m) * share[None, :] - mean[None, :]
    if dA is not None:
        gradient += tl.load(at(dA, s[None, :], n[:, None]), live, other=0.0).to(m.DTYPE)
    return tl.where(live, gradient, 0.0)
