"""Slot attention in Triton: one pass over the inputs forward, one backward.

    L[n, s] = scale * <k[n], q[s]> + logit_bias[s]
    A[n, :] = softmax over the slots s of L[n, :]
    W[n, s] = A[n, s] + eps_weights,    S[s] = sum_n W[n, s] + eps_denominator
    U[s]    = sum_n W[n, s] v[n] / S[s]

Each of forward and backward is two kernels: programs that take a chunk of inputs each and leave the sums over it in
memory, and others that add these in the order of the chunks. Nothing is added atomically, so results are repeatable.
The backward pass computes A anew. A third kernel goes before them where the heads are joint: a softmax over the slots
of all heads needs its normaliser before any head can be summed.

What limits it. Bytes are k and v read, and backward dk and dv written; operations those of the dot products. On an
H200 (4.8 TB/s; 67 TFLOP/s in float32, 990 in bfloat16), in microseconds:

                                          forward: bytes  operations   backward: bytes  operations
    Tetrominoes  B64 N1225  K4  D64  float32      8.4        1.2                  17         3.0
    CLEVR6       B64 N16384 K7  D64  float32      112         28                 224          70
    DINOSAUR     B64 N784   K7  D256 bfloat16      11        0.4                  21         0.9
    SAVi         B64 N4096  K24 D192 float32       84         72                 168         180
    SAVi                             bfloat16      42        4.9                  84          12

A product with few slots is too thin for the usual tile of 16 slots. In bfloat16 the tensor cores' time for it is lost
beside that of the bytes (0.8 microseconds of DINOSAUR's 11). In float32 there are no tensor cores: 16 slots for 4
would be four times the operations, and with their operands' loads more than the bytes take. There `tl.dot` multiplies
exactly as many slots as the next power of two: 46 instructions a warp and input forward and 96 backward for K = 4, 67
and 156 for K = 7, of the 99 and 198 that an H200 can issue while the bytes of an input of D = 64 arrive and leave. With
many slots (SAVi) float32 is a matter of operations, and a few times slower than bfloat16; torch's setting for TF32
products, `torch.backends.cuda.matmul.fp32_precision`, is obeyed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iio_kernels.ops.slot_attention import schema
from iio_kernels.ops.slot_attention.reference import Options
from iio_kernels.runtime.numerics import arithmetic_dtype
from iio_kernels.runtime.triton_support import INTERPRETED, index_type, inlined


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


# --- pieces, for one head of one image ----------------------------------------------------------------------------


@inlined
def _head(x, b, h):
    """x[b, h]."""
    return Matrix(x.ptr + (b * x.b + h * x.h), x.row, x.column)


@inlined
def _at(x, row, column):
    """Pointers to x[row, column]."""
    return x.ptr + row * x.row + column * x.column


@inlined
def _load(x, row, column, taken, D, m: Meta):
    """The tile x[row, column] to multiply, 0 in rows that are not `taken` and beyond D columns."""
    mask = taken[:, None] & (column < D)[None, :]
    return tl.load(_at(x, row[:, None], column[None, :]), mask, other=0.0).to(m.OPERAND)


@inlined
def _dot(x, y, sum, m: Meta):
    """sum + x y."""
    return tl.dot(x.to(m.OPERAND), y, sum, input_precision=m.PRECISION, out_dtype=m.DTYPE)


@inlined
def _scores(x, y, n, s, inputs, slots, D, m: Meta):
    """<x[n], y[s]> (n, s), over all D features."""
    scores = tl.zeros([m.BLOCK_N, m.K_PADDED], m.DTYPE)
    for d0 in range(0, D, m.BLOCK_D):
        d = d0 + tl.arange(0, m.BLOCK_D).to(m.INDEX)
        scores = _dot(_load(x, n, d, inputs, D, m), tl.trans(_load(y, s, d, slots, D, m)), scores, m)
    return scores


@inlined
def _mixtures(a, y, sum, s, d, slots, D, m: Meta):
    """sum + sum_s a[n, s] y[s, d] (n, d), over all slots."""
    y = _load(y, s, d, slots, D, m)
    if m.K_PADDED >= 16:
        return _dot(a, y, sum, m)
    # tl.dot adds up no fewer than 16 products, here most of them with 0.
    return sum + tl.sum(tl.trans(a)[:, :, None] * y[:, None, :], 0)


@inlined
def _taking_part(mask, i, size):
    """Which of the slots or inputs i exist and take part."""
    taken = i < size
    if mask is not None:
        taken = tl.load(mask.ptr + i * mask.row, taken, other=0).to(tl.int1)
    return taken


@inlined
def _logits(q, k, logit_bias, n, s, inputs, slots, scale, m: Meta):
    """L (n, s), minus infinity where an input or a slot takes no part."""
    L = tl.full((), scale, m.DTYPE) * _scores(k, q, n, s, inputs, slots, m.DK, m)
    if logit_bias is not None:
        L += tl.load(logit_bias.ptr + s * logit_bias.row, slots, other=0.0).to(m.DTYPE)[None, :]
    return tl.where(inputs[:, None] & slots[None, :], L, float("-inf"))


@inlined
def _softmax(L, normaliser, n, inputs, slots, m: Meta):
    """A (n, s), over the slots of this head, or of all heads where their `normaliser` is given."""
    if normaliser is None:
        A = tl.exp(L - tl.max(L, 1)[:, None])
        A *= (1.0 / tl.sum(A, 1))[:, None]
    else:
        largest = tl.load(_at(normaliser, n, 0), inputs, other=0.0)
        A = tl.exp(L - largest[:, None]) * tl.load(_at(normaliser, n, 1), inputs, other=0.0)[:, None]
    return tl.where(inputs[:, None] & slots[None, :], A, 0.0)


@inlined
def _per_slot(U, S, dU, dS, s, NORMALIZE: tl.constexpr, m: Meta):
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
            dU_tile = tl.load(_at(dU, s[:, None], d[None, :]), taken, other=0.0)
            mean += tl.sum(dU_tile * tl.load(_at(U, s[:, None], d[None, :]), taken, other=0.0), 1)
        mean *= share
    if dS is not None:
        mean -= tl.load(dS.ptr + s * dS.row, s < m.K, other=0.0)
    return filled, share, mean


@inlined
def _attention_gradient(v, dU, dA, n, s, inputs, slots, filled, share, mean, m: Meta):
    """The gradient to A (n, s): <dU[s], v[n] - U[s]> / S[s] + dS[s] and what arrives at A itself, 0 where A is."""
    live = inputs[:, None] & slots[None, :]
    gradient = _scores(v, dU, n, s, inputs, filled, m.DV, m) * share[None, :] - mean[None, :]
    if dA is not None:
        gradient += tl.load(_at(dA, s[None, :], n[:, None]), live, other=0.0).to(m.DTYPE)
    return tl.where(live, gradient, 0.0)


# --- kernels ------------------------------------------------------------------------------------------------------


#: These change from call to call: kernels are not compiled anew when they happen to be 1 or multiples of 16.
varying = triton.jit(do_not_specialize=("N", "chunks", "tiles"))


@varying
def _forward_kernel(
    q, k, v, logit_bias, slot_mask, input_mask, normaliser, A_out, U_sums, S_sums,
    H, N, chunk, chunks, parts, scale: tl.float64, eps_weights: tl.float64, m: Meta,
):  # fmt: skip
    """A chunk of inputs: its share of sum_n W[n, s] v[n] and sum_n W[n, s], and A if asked for.

    Program ((b * H + h) * chunks + c) * parts + part takes the inputs from c * chunk on, and WIDTH features of U.

        q           (B, H, K, Dk)
        k           (B, H, N, Dk)
        v           (B, H, N, Dv), or None: the keys are the values too
        logit_bias  (B, H, K), or None
        slot_mask   (B, H, K) bool, or None
        input_mask  (B, H, N) bool, or None
        normaliser  (B, H, N, 2): the largest L[n, s] over the slots of all heads, and 1 / sum exp(L[n, s] - it);
                    or None: a head is by itself
        A_out       (B, H, K, N), or None                                                                       out
        U_sums      (chunks, B * H, K, Dv)                                                                      out
        S_sums      (chunks, B * H, K)                                                                          out
    """
    program = tl.program_id(0).to(m.INDEX)
    part, c, group = program % parts, program // parts % chunks, program // parts // chunks
    b, h = group // H, group % H
    q, k, U_sums, S_sums = _head(q, b, h), _head(k, b, h), _head(U_sums, c, group), _head(S_sums, c, group)
    v = k if v is None else _head(v, b, h)
    logit_bias = None if logit_bias is None else _head(logit_bias, b, h)
    slot_mask = None if slot_mask is None else _head(slot_mask, b, h)
    input_mask = None if input_mask is None else _head(input_mask, b, h)
    normaliser = None if normaliser is None else _head(normaliser, b, h)
    A_out = None if A_out is None else _head(A_out, b, h)

    s = tl.arange(0, m.K_PADDED).to(m.INDEX)
    d = part * m.WIDTH + tl.arange(0, m.WIDTH).to(m.INDEX)
    slots = _taking_part(slot_mask, s, m.K)
    eps = tl.full((), eps_weights, m.DTYPE)
    U = tl.zeros([m.K_PADDED, m.WIDTH], m.DTYPE)
    S = tl.zeros([m.K_PADDED], m.DTYPE)
    for n0 in range(c * chunk, tl.minimum(N, (c + 1) * chunk), m.BLOCK_N):
        n = n0 + tl.arange(0, m.BLOCK_N).to(m.INDEX)
        inputs = _taking_part(input_mask, n, N)
        L = _logits(q, k, logit_bias, n, s, inputs, slots, scale, m)
        A = _softmax(L, normaliser, n, inputs, slots, m)
        if A_out is not None:
            tl.store(_at(A_out, s[None, :], n[:, None]), A, (n < N)[:, None] & (s < m.K)[None, :])
        W = tl.where(inputs[:, None], A + eps, 0.0)
        S += tl.sum(W, 0)
        U = _dot(tl.trans(W), _load(v, n, d, inputs, m.DV, m), U, m)
    tl.store(_at(U_sums, s[:, None], d[None, :]), U, (s < m.K)[:, None] & (d < m.DV)[None, :])
    if part == 0:
        tl.store(S_sums.ptr + s * S_sums.row, S, s < m.K)


@varying
def _backward_kernel(
    q, k, v, logit_bias, slot_mask, input_mask, normaliser, dots, U, S, dU, dS, dA, dk, dv, dq_sums, dlogit_bias_sums,
    H, N, chunk, chunks, parts, scale: tl.float64, eps_weights: tl.float64, NORMALIZE: tl.constexpr, m: Meta,
):  # fmt: skip
    """A chunk of inputs: their gradients, and its share of those to q and logit_bias.

    Programs and the tensors up to `normaliser` are those of the forward kernel. A program makes WIDTH features of each.

        dots              (B, H, N): sum A[n, s] dA[n, s] over the slots of all heads; or None: a head is by itself
        U, dU             (B, H, K, Dv)
        S, dS             (B, H, K); dS or None
        dA                (B, H, K, N), or None
        dk                (B, H, N, Dk); without v, the gradient to the values is in it                         out
        dv                (B, H, N, Dv), or None without v                                                      out
        dq_sums           (chunks, B * H, K, Dk)                                                                out
        dlogit_bias_sums  (chunks, B * H, K), or None                                                           out
    """
    program = tl.program_id(0).to(m.INDEX)
    part, c, group = program % parts, program // parts % chunks, program // parts // chunks
    b, h = group // H, group % H
    q, k, U, S, dU = _head(q, b, h), _head(k, b, h), _head(U, b, h), _head(S, b, h), _head(dU, b, h)
    dk, dq_sums = _head(dk, b, h), _head(dq_sums, c, group)
    v = k if v is None else _head(v, b, h)
    logit_bias = None if logit_bias is None else _head(logit_bias, b, h)
    slot_mask = None if slot_mask is None else _head(slot_mask, b, h)
    input_mask = None if input_mask is None else _head(input_mask, b, h)
    normaliser = None if normaliser is None else _head(normaliser, b, h)
    dots = None if dots is None else _head(dots, b, h)
    dS = None if dS is None else _head(dS, b, h)
    dA = None if dA is None else _head(dA, b, h)

    s = tl.arange(0, m.K_PADDED).to(m.INDEX)
    d = part * m.WIDTH + tl.arange(0, m.WIDTH).to(m.INDEX)
    slots = _taking_part(slot_mask, s, m.K)
    filled, share, mean = _per_slot(U, S, dU, dS, s, NORMALIZE, m)
    eps = tl.full((), eps_weights, m.DTYPE)
    dq = tl.zeros([m.K_PADDED, m.WIDTH], m.DTYPE)
    dlogit_bias = tl.zeros([m.K_PADDED], m.DTYPE)
    for n0 in range(c * chunk, tl.minimum(N, (c + 1) * chunk), m.BLOCK_N):
        n = n0 + tl.arange(0, m.BLOCK_N).to(m.INDEX)
        inputs = _taking_part(input_mask, n, N)
        L = _logits(q, k, logit_bias, n, s, inputs, slots, scale, m)
        A = _softmax(L, normaliser, n, inputs, slots, m)
        gradient = _attention_gradient(v, dU, dA, n, s, inputs, slots, filled, share, mean, m)
        if dots is None:
            over_slots = tl.sum(A * gradient, 1)
        else:
            over_slots = tl.load(dots.ptr + n * dots.row, inputs, other=0.0)
        dL = tl.where(inputs[:, None] & slots[None, :], A * (gradient - over_slots[:, None]), 0.0)
        dlogit_bias += tl.sum(dL, 0)
        dL *= tl.full((), scale, m.DTYPE)
        W = tl.where(inputs[:, None], A + eps, 0.0) * share[None, :]

        dq = _dot(tl.trans(dL), _load(k, n, d, inputs, m.DK, m), dq, m)
        nothing = tl.zeros([m.BLOCK_N, m.WIDTH], m.DTYPE)
        dk_tile = _mixtures(dL, q, nothing, s, d, slots, m.DK, m)
        dv_tile = _mixtures(W, dU, dk_tile if dv is None else nothing, s, d, filled, m.DV, m)
        if input_mask is not None:
            # dU may be NaN, which a weight of 0 does not take away.
            dv_tile = tl.where(inputs[:, None], dv_tile, 0.0)
        if dv is None:
            dk_tile = dv_tile
        else:
            dv_h = _head(dv, b, h)
            tl.store(_at(dv_h, n[:, None], d[None, :]), dv_tile, (n < N)[:, None] & (d < m.DV)[None, :])
        tl.store(_at(dk, n[:, None], d[None, :]), dk_tile, (n < N)[:, None] & (d < m.DK)[None, :])
    tl.store(_at(dq_sums, s[:, None], d[None, :]), dq, (s < m.K)[:, None] & (d < m.DK)[None, :])
    if dlogit_bias_sums is not None:
        dlogit_bias_sums = _head(dlogit_bias_sums, c, group)
        if part == 0:
            tl.store(dlogit_bias_sums.ptr + s * dlogit_bias_sums.row, dlogit_bias, s < m.K)


@varying
def _heads_kernel(
    q, k, v, logit_bias, slot_mask, input_mask, U, S, dU, dS, dA, normaliser, dots,
    H, N, tiles, scale: tl.float64, NORMALIZE: tl.constexpr, m: Meta,
):  # fmt: skip
    """What joint heads share, for a tile of inputs: the softmax's normaliser, and with dU sum A[n, s] dA[n, s].

    Program b * tiles + tile. The tensors are those of the other kernels, U to dA None in the forward pass, and

        normaliser  (B, 1, N, 2)                     out
        dots        (B, 1, N), or None without dU    out
    """
    program = tl.program_id(0).to(m.INDEX)
    b = program // tiles
    n = program % tiles * m.BLOCK_N + tl.arange(0, m.BLOCK_N).to(m.INDEX)
    s = tl.arange(0, m.K_PADDED).to(m.INDEX)

    # Sums of exponentials are relative to the largest L of the heads so far.
    largest = tl.full([m.BLOCK_N], float("-inf"), m.DTYPE)
    sum_exp = tl.zeros([m.BLOCK_N], m.DTYPE)
    sum_dots = tl.zeros([m.BLOCK_N], m.DTYPE)
    for head in range(H):
        h = tl.cast(head, m.INDEX)
        slots = _taking_part(None if slot_mask is None else _head(slot_mask, b, h), s, m.K)
        inputs = _taking_part(None if input_mask is None else _head(input_mask, b, h), n, N)
        k_h = _head(k, b, h)
        bias_h = None if logit_bias is None else _head(logit_bias, b, h)
        L = _logits(_head(q, b, h), k_h, bias_h, n, s, inputs, slots, scale, m)
        larger = tl.maximum(largest, tl.max(L, 1))
        # Until something takes part the largest is minus infinity, which cannot be subtracted from itself.
        origin = tl.where(larger == float("-inf"), 0.0, larger)
        shrink, E = tl.exp(largest - origin), tl.exp(L - origin[:, None])
        largest, sum_exp = larger, sum_exp * shrink + tl.sum(E, 1)
        if dU is not None:
            v_h = k_h if v is None else _head(v, b, h)
            U_h, S_h, dU_h = _head(U, b, h), _head(S, b, h), _head(dU, b, h)
            dS_h = None if dS is None else _head(dS, b, h)
            dA_h = None if dA is None else _head(dA, b, h)
            filled, share, mean = _per_slot(U_h, S_h, dU_h, dS_h, s, NORMALIZE, m)
            gradient = _attention_gradient(v_h, dU_h, dA_h, n, s, inputs, slots, filled, share, mean, m)
            sum_dots = sum_dots * shrink + tl.sum(E * gradient, 1)
    normaliser = _head(normaliser, b, 0)
    tl.store(_at(normaliser, n, 0), tl.where(largest == float("-inf"), 0.0, largest), n < N)
    tl.store(_at(normaliser, n, 1), 1.0 / sum_exp, n < N)
    if dU is not None:
        dots = _head(dots, b, 0)
        tl.store(dots.ptr + n * dots.row, sum_dots / sum_exp, n < N)


@varying
def _add_kernel(wide_sums, narrow_sums, wide, narrow, H, D, chunks, eps: tl.float64, NORMALIZE: tl.constexpr, m: Meta):
    """The sums of all chunks, in their order, for group program_id(0) and WIDTH features from program_id(1) * WIDTH on.

        wide_sums    (chunks, B * H, K, D)
        narrow_sums  (chunks, B * H, K), or None
        wide         (B, H, K, D): sum wide_sums, and with NORMALIZE its quotient by `narrow`, 0 where that is 0    out
        narrow       (B, H, K), or None: sum narrow_sums + eps                                                      out

    A tile is BLOCK_N chunks of all slots.
    """
    group, block = tl.program_id(0).to(m.INDEX), tl.program_id(1).to(m.INDEX)
    wide = _head(wide, group // H, group % H)
    s = tl.arange(0, m.K_PADDED).to(m.INDEX)
    d = block * m.WIDTH + tl.arange(0, m.WIDTH).to(m.INDEX)
    here = (s < m.K)[:, None] & (d < D)[None, :]
    U = tl.zeros([m.K_PADDED, m.WIDTH], m.DTYPE)
    S = tl.full([m.K_PADDED], eps, m.DTYPE)
    for c0 in range(0, chunks, m.BLOCK_N):
        c = c0 + tl.arange(0, m.BLOCK_N).to(m.INDEX)
        sums = _at(_head(wide_sums, c[:, None, None], group), s[None, :, None], d[None, None, :])
        U += tl.sum(tl.load(sums, (c < chunks)[:, None, None] & here[None, :, :], other=0.0), 0)
        if narrow_sums is not None:
            sums = _head(narrow_sums, c[:, None], group).ptr + s[None, :] * narrow_sums.row
            S += tl.sum(tl.load(sums, (c < chunks)[:, None] & (s < m.K)[None, :], other=0.0), 0)
    if NORMALIZE:
        U = tl.where((S == 0)[:, None], 0.0, U / tl.where(S == 0, 1.0, S)[:, None])
    tl.store(_at(wide, s[:, None], d[None, :]), U, here)
    if narrow is not None:
        narrow = _head(narrow, group // H, group % H)
        if block == 0:
            tl.store(narrow.ptr + s * narrow.row, S, s < m.K)


# --- launches -----------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """The sizes of a kernel's tiles, as in `Meta`, how many warps work on one, and how many loads run ahead of it."""

    K_PADDED: int
    BLOCK_N: int
    BLOCK_D: int
    WIDTH: int
    num_warps: int
    num_stages: int


ANY = 1 << 30
#: For each way to multiply and pass the first row serves whose K_PADDED and D are not exceeded. Small products have
#: tiles of 32 inputs, which leave registers for three or four thread blocks on a multiprocessor: one's loads hide
#: behind another's work. Wide ones keep the sums of K_PADDED by WIDTH in registers: one pass while that is at most
#: 8192 numbers, but without tensor cores 2048 or fewer where a program makes three gradients at a time. Beyond WIDTH
#: features the others are other programs', which compute A again. BLOCK_D bounds how much of a row the general units
#: hold at a time. No row spills registers, nor takes more shared memory than 64 KiB, which each architecture has:
#: tests/test_triton.py compiles them all.
TILES = (
    # multiply, pass, K_PADDED, D: BLOCK_N, BLOCK_D, WIDTH, num_warps, num_stages
    ("fma", "forward", 16, 64, 32, 64, 64, 4, 2),
    ("fma", "forward", 32, ANY, 16, 32, 256, 8, 2),
    ("fma", "forward", 64, ANY, 16, 16, 128, 8, 2),
    ("fma", "backward", 16, 64, 32, 64, 64, 4, 2),
    ("fma", "backward", 16, ANY, 16, 32, 128, 8, 2),
    ("fma", "backward", 32, ANY, 16, 32, 64, 8, 2),
    ("fma", "backward", 64, ANY, 16, 16, 16, 8, 1),
    ("bf16", "forward", 16, ANY, 64, 64, 256, 4, 2),
    ("bf16", "forward", 32, ANY, 64, 64, 256, 8, 2),
    ("bf16", "forward", 64, ANY, 64, 64, 128, 8, 2),
    ("bf16", "backward", 16, 64, 64, 64, 64, 4, 2),
    ("bf16", "backward", 16, 256, 32, 256, 256, 8, 2),
    ("bf16", "backward", 16, ANY, 32, 64, 128, 8, 2),
    ("bf16", "backward", 32, ANY, 16, 128, 256, 8, 1),
    ("bf16", "backward", 64, ANY, 64, 64, 128, 8, 2),
    ("tf32", "forward", 32, ANY, 32, 64, 256, 8, 2),
    ("tf32", "forward", 64, ANY, 32, 64, 128, 8, 2),
    ("tf32", "backward", 16, ANY, 32, 64, 256, 8, 2),
    ("tf32", "backward", 32, ANY, 16, 64, 256, 8, 1),
    ("tf32", "backward", 64, ANY, 16, 32, 64, 8, 2),
    # Correct rather than fast, and some spill: float64, and more slots than anyone has had.
    ("fp64", "forward", ANY, ANY, 16, 32, 32, 8, 2),
    ("fp64", "backward", ANY, ANY, 16, 16, 32, 8, 2),
    *((how, way, ANY, ANY, 16, 16, 16, 8, 1) for how in ("fma", "bf16", "tf32") for way in ("forward", "backward")),
)


def tile(how: str, way: str, K: int, D: int) -> Tile:
    """The table's for K slots and D = max(Dk, Dv) features."""
    # Tensor cores multiply 16 slots at a time, and `tl.dot` adds no fewer up. Without them, small tiles need neither.
    K_PADDED = max(triton.next_power_of_2(K), 4 if how == "fma" and D <= 64 else 16)
    D_PADDED = max(triton.next_power_of_2(D), 16)
    rows = (row[4:] for row in TILES if row[:2] == (how, way) and row[2] >= K_PADDED and row[3] >= D)
    BLOCK_N, BLOCK_D, WIDTH, num_warps, num_stages = next(rows)
    if torch.version.hip:  # whose warps have 64 threads
        num_warps //= 2
    return Tile(K_PADDED, BLOCK_N, min(BLOCK_D, D_PADDED), min(WIDTH, D_PADDED), num_warps, num_stages)


def multiplication(k: Tensor, v: Tensor) -> str:
    """How keys and values of these dtypes are multiplied: what `TILES` calls it.

    bfloat16 by the tensor cores, W and dL rounded to it. Not so float16, in which 1e-8 is 0, as are many gradients: it
    is multiplied in TF32, which holds every number of either 16 bits and has float32's range. float32 by the general
    units, or in TF32 if torch may do so. (AMD's matrix units multiply float32 as it is.)
    """
    if k.dtype == torch.float64:
        return "fp64"
    if k.dtype == v.dtype == torch.bfloat16 and not INTERPRETED:  # the interpreter cannot multiply it
        return "bf16"
    halves = k.dtype.itemsize == v.dtype.itemsize == 2
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if (halves or allowed) and not torch.version.hip else "fma"


def chunking(N: int, groups: int, K: int, BLOCK_N: int) -> tuple[int, int]:
    """How many inputs of a group a program takes, and how many such chunks there are.

    2048 programs are enough to end together. But a chunk's sums, K rows, are written and read again: it has at least
    32 * K inputs, of which these are a few percent, unless that left fewer than two programs for each of 132
    multiprocessors. Nothing of the machine goes in, so that all add up in the same order.
    """
    inputs = max(triton.cdiv(N * groups, 2048), min(32 * K, triton.cdiv(N * groups, 264)), 1)
    chunk = triton.cdiv(inputs, BLOCK_N) * BLOCK_N
    return chunk, max(1, triton.cdiv(N, chunk))


class Call:
    """What the launches of an operator's call have in common."""

    def __init__(self, way: str, q: Tensor, k: Tensor, v: Tensor | None) -> None:
        values = k if v is None else v
        (self.B, self.H, self.K, self.DK), (self.N, self.DV) = q.shape, values.shape[2:]
        self.groups = self.B * self.H
        self.dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        self.how = multiplication(k, values)
        self.tile = tile(self.how, way, self.K, max(self.DK, self.DV))
        self.chunk, self.chunks = chunking(self.N, self.groups, self.K, self.tile.BLOCK_N)
        width = self.DV if way == "forward" else max(self.DK, self.DV)
        self.parts = max(1, triton.cdiv(width, self.tile.WIDTH))
        self.device = k.device

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def launch(self, kernel: Any, grid: tuple[int, ...], tile: Tile, *arguments: Any) -> None:
        """Run a kernel on tensors, numbers and None, and `Meta` after them."""
        if 0 in grid:
            return
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        arithmetic = tl.float64 if self.dtype == torch.float64 else tl.float32
        meta = Meta(
            self.K, self.DK, self.DV, tile.K_PADDED, tile.BLOCK_N, tile.BLOCK_D, tile.WIDTH, DTYPE=arithmetic,
            OPERAND=tl.bfloat16 if self.how == "bf16" else arithmetic,
            PRECISION="tf32" if self.how == "tf32" else "ieee", INDEX=index_type(*tensors),
        )  # fmt: skip
        with torch.cuda.device_of(tensors[0]):
            kernel[grid](
                *(Strided(x, *x.stride(), *(0,) * (4 - x.dim())) if isinstance(x, Tensor) else x for x in arguments),
                Meta(*map(tl.constexpr, meta)),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                enable_fp_fusion=True,
            )

    def launch_chunks(self, kernel: Any, *arguments: Any) -> None:
        """The kernel of a pass, a program for each group, chunk and part."""
        sizes = self.H, self.N, self.chunk, self.chunks, self.parts
        self.launch(kernel, (self.groups * self.chunks * self.parts,), self.tile, *arguments[0], *sizes, *arguments[1:])

    def launch_heads(self, inputs: tuple, incoming: tuple, scale: float, normalize: bool) -> tuple[Tensor | None, ...]:
        """The normaliser of joint heads, and `dots` if there are incoming gradients; both expanded to all heads."""
        normaliser = self.new(self.B, 1, self.N, 2)
        dots = None if incoming[0] is None else self.new(self.B, 1, self.N)
        tiles = triton.cdiv(self.N, self.tile.BLOCK_N)
        sizes = self.H, self.N, tiles
        self.launch(
            _heads_kernel, (self.B * tiles,), self.tile, *inputs, *incoming, normaliser, dots, *sizes, scale, normalize
        )
        return tuple(None if x is None else x.expand(-1, self.H, *x.shape[2:]) for x in (normaliser, dots))

    def add(
        self, wide_sums: Tensor, narrow_sums: Tensor | None, wide: Tensor, narrow: Tensor | None, eps: float = 0.0,
        normalize: bool = False,
    ) -> None:  # fmt: skip
        """The second stage: 8192 numbers at a time, 16 features of all slots."""
        K_PADDED, D = triton.next_power_of_2(self.K), wide.shape[3]
        tile = Tile(K_PADDED, BLOCK_N=max(1, 512 // K_PADDED), BLOCK_D=16, WIDTH=16, num_warps=8, num_stages=1)
        grid = self.groups, max(1, triton.cdiv(D, tile.WIDTH))
        tensors = wide_sums, narrow_sums, wide, narrow
        self.launch(_add_kernel, grid, tile, *tensors, self.H, D, self.chunks, eps, normalize)


def slot_attention_forward(
    q, k, v, logit_bias, slot_mask, input_mask, scale, eps, eps_in_weights, normalize, joint_heads, return_attention
):
    """The operator of schema.py."""
    call, inputs = Call("forward", q, k, v), (q, k, v, logit_bias, slot_mask, input_mask)
    eps_weights, eps_denominator = (eps if normalize and here else 0.0 for here in (eps_in_weights, not eps_in_weights))
    U, S = call.new(*q.shape[:3], call.DV), call.new(*q.shape[:3])
    A_shape = (*q.shape[:3], call.N) if return_attention else (0,)
    A = call.new(*A_shape, dtype=(k if v is None else v).dtype)
    U_sums, S_sums = (call.new(call.chunks, call.groups, *x.shape[2:]) for x in (U, S))
    normaliser = call.launch_heads(inputs, (None,) * 5, scale, normalize)[0] if joint_heads else None
    tensors = *inputs, normaliser, A if return_attention else None, U_sums, S_sums
    call.launch_chunks(_forward_kernel, tensors, scale, eps_weights)
    call.add(U_sums, S_sums, U, S, eps_denominator, normalize)
    return U, S, A


def slot_attention_backward(
    dU, dS, dA, q, k, v, logit_bias, slot_mask, input_mask, U, S, scale, eps, eps_in_weights, normalize, joint_heads
):
    """The operator of schema.py."""
    call, inputs = Call("backward", q, k, v), (q, k, v, logit_bias, slot_mask, input_mask)
    incoming = U, S, dU, dS, dA
    dq, dk = (call.new(*x.shape, dtype=x.dtype) for x in (q, k))
    dv, dlogit_bias = (None if x is None else call.new(*x.shape, dtype=x.dtype) for x in (v, logit_bias))
    dq_sums = call.new(call.chunks, call.groups, call.K, call.DK)
    dlogit_bias_sums = None if logit_bias is None else call.new(call.chunks, call.groups, call.K)
    normaliser, dots = call.launch_heads(inputs, incoming, scale, normalize) if joint_heads else (None, None)
    tensors = *inputs, normaliser, dots, *incoming, dk, dv, dq_sums, dlogit_bias_sums
    call.launch_chunks(_backward_kernel, tensors, scale, eps if normalize and eps_in_weights else 0.0, normalize)
    call.add(dq_sums, dlogit_bias_sums, dq, dlogit_bias)
    return dq, dk, call.new(0, dtype=k.dtype) if dv is None else dv, call.new(0) if dlogit_bias is None else dlogit_bias


# --- the operators, and what calls them ---------------------------------------------------------------------------


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    logit_bias: Tensor | None,
    slot_mask: Tensor | None,
    input_mask: Tensor | None,
    options: Options,
) -> tuple[Tensor | None, ...]:
    """All of them with two batch dimensions, the second that of joint heads. Only float64 asks it of all."""
    if arithmetic_dtype(q, k, v) == torch.float64:
        q, k, v = q.double(), k.double(), None if v is None else v.double()
    matrices, vectors = (q, k, v), (logit_bias, slot_mask, input_mask)
    return tuple(
        None if x is None else schema.four(x, options, own)
        for own, group in ((2, matrices), (1, vectors))
        for x in group
    )


forward, backward = schema.calls("iio_kernels_triton", _inputs, widens=False)
for operator in (slot_attention_forward, slot_attention_backward):
    torch.library.impl(f"iio_kernels_triton::{operator.__name__}", ("cpu", "cuda"), operator)
