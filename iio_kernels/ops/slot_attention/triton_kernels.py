"""The Triton kernels of slot attention: one pass over the inputs forward, one backward.

    L[n, s] = scale * <k[n], q[s]> + logit_bias[s]
    A[n, :] = softmax over the slots s of L[n, :]
    W[n, s] = A[n, s] + eps_weights,    S[s] = sum_n W[n, s] + eps_denominator
    U[s]    = sum_n W[n, s] v[n] / S[s]

Each of forward and backward is two kernels: programs that take a chunk of inputs each and leave the sums over it in
memory, and others that add these in the order of the chunks. Nothing is added atomically, so results are repeatable.
The backward pass computes A anew. A third kernel goes before them where the heads are joint: a softmax over the slots
of all heads needs its normaliser before any head can be summed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iio_kernels.ops.slot_attention.triton_pieces import (
    Meta,
    at,
    attention_gradient,
    dot,
    head,
    load,
    logits,
    mixtures,
    per_slot,
    softmax,
    taking_part,
)

#: These change from call to call: kernels are not compiled anew when they happen to be 1 or multiples of 16.
varying = triton.jit(do_not_specialize=("N", "chunks", "tiles"))


@varying
def forward_kernel(
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
    q, k, U_sums, S_sums = head(q, b, h), head(k, b, h), head(U_sums, c, group), head(S_sums, c, group)
    v = k if v is None else head(v, b, h)
    logit_bias = None if logit_bias is None else head(logit_bias, b, h)
    slot_mask = None if slot_mask is None else head(slot_mask, b, h)
    input_mask = None if input_mask is None else head(input_mask, b, h)
    normaliser = None if normaliser is None else head(normaliser, b, h)
    A_out = None if A_out is None else head(A_out, b, h)

    s = tl.arange(0, m.K_PADDED).to(m.INDEX)
    d = part * m.WIDTH + tl.arange(0, m.WIDTH).to(m.INDEX)
    slots = taking_part(slot_mask, s, m.K)
    eps = tl.full((), eps_weights, m.DTYPE)
    U = tl.zeros([m.K_PADDED, m.WIDTH], m.DTYPE)
    S = tl.zeros([m.K_PADDED], m.DTYPE)
    for n0 in range(c * chunk, tl.minimum(N, (c + 1) * chunk), m.BLOCK_N):
        n = n0 + tl.arange(0, m.BLOCK_N).to(m.INDEX)
        inputs = taking_part(input_mask, n, N)
        L = logits(q, k, logit_bias, n, s, inputs, slots, scale, m)
        A = softmax(L, normaliser, n, inputs, slots, m)
        if A_out is not None:
            tl.store(at(A_out, s[None, :], n[:, None]), A, (n < N)[:, None] & (s < m.K)[None, :])
        W = tl.where(inputs[:, None], A + eps, 0.0)
        S += tl.sum(W, 0)
        U = dot(tl.trans(W), load(v, n, d, inputs, m.DV, m), U, m)
    tl.store(at(U_sums, s[:, None], d[None, :]), U, (s < m.K)[:, None] & (d < m.DV)[None, :])
    if part == 0:
        tl.store(S_sums.ptr + s * S_sums.row, S, s < m.K)


@varying
def backward_kernel(
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
    q, k, U, S, dU = head(q, b, h), head(k, b, h), head(U, b, h), head(S, b, h), head(dU, b, h)
    dk, dq_sums = head(dk, b, h), head(dq_sums, c, group)
    v = k if v is None else head(v, b, h)
    logit_bias = None if logit_bias is None else head(logit_bias, b, h)
    slot_mask = None if slot_mask is None else head(slot_mask, b, h)
    input_mask = None if input_mask is None else head(input_mask, b, h)
    normaliser = None if normaliser is None else head(normaliser, b, h)
    dots = None if dots is None else head(dots, b, h)
    dS = None if dS is None else head(dS, b, h)
    dA = None if dA is None else head(dA, b, h)

    s = tl.arange(0, m.K_PADDED).to(m.INDEX)
    d = part * m.WIDTH + tl.arange(0, m.WIDTH).to(m.INDEX)
    slots = taking_part(slot_mask, s, m.K)
    filled, share, mean = per_slot(U, S, dU, dS, s, NORMALIZE, m)
    eps = tl.full((), eps_weights, m.DTYPE)
    dq = tl.zeros([m.K_PADDED, m.WIDTH], m.DTYPE)
    dlogit_bias = tl.zeros([m.K_PADDED], m.DTYPE)
    for n0 in range(c * chunk, tl.minimum(N, (c + 1) * chunk), m.BLOCK_N):
        n = n0 + tl.arange(0, m.BLOCK_N).to(m.INDEX)
        inputs = taking_part(input_mask, n, N)
        L = logits(q, k, logit_bias, n, s, inputs, slots, scale, m)
        A = softmax(L, normaliser, n, inputs, slots, m)
        gradient = attention_gradient(v, dU, dA, n, s, inputs, slots, filled, share, mean, m)
        if dots is None:
            over_slots = tl.sum(A * gradient, 1)
        else:
            over_slots = tl.load(dots.ptr + n * dots.row, inputs, other=0.0)
        dL = tl.where(inputs[:, None] & slots[None, :], A * (gradient - over_slots[:, None]), 0.0)
        dlogit_bias += tl.sum(dL, 0)
        dL *= tl.full((), scale, m.DTYPE)
        W = tl.where(inputs[:, None], A + eps, 0.0) * share[None, :]

        dq = dot(tl.trans(dL), load(k, n, d, inputs, m.DK, m), dq, m)
        nothing = tl.zeros([m.BLOCK_N, m.WIDTH], m.DTYPE)
        dk_tile = mixtures(dL, q, nothing, s, d, slots, m.DK, m)
        dv_tile = mixtures(W, dU, dk_tile if dv is None else nothing, s, d, filled, m.DV, m)
        if input_mask is not None:
            # dU may be NaN, which a weight of 0 does not take away.
            dv_tile = tl.where(inputs[:, None], dv_tile, 0.0)
        if dv is None:
            dk_tile = dv_tile
        else:
            dv_h = head(dv, b, h)
            tl.store(at(dv_h, n[:, None], d[None, :]), dv_tile, (n < N)[:, None] & (d < m.DV)[None, :])
        tl.store(at(dk, n[:, None], d[None, :]), dk_tile, (n < N)[:, None] & (d < m.DK)[None, :])
    tl.store(at(dq_sums, s[:, None], d[None, :]), dq, (s < m.K)[:, None] & (d < m.DK)[None, :])
    if dlogit_bias_sums is not None:
        dlogit_bias_sums = head(dlogit_bias_sums, c, group)
        if part == 0:
            tl.store(dlogit_bias_sums.ptr + s * dlogit_bias_sums.row, dlogit_bias, s < m.K)


@varying
def heads_kernel(
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
    for heads_before in range(H):
        h = tl.cast(heads_before, m.INDEX)
        slots = taking_part(None if slot_mask is None else head(slot_mask, b, h), s, m.K)
        inputs = taking_part(None if input_mask is None else head(input_mask, b, h), n, N)
        k_h = head(k, b, h)
        bias_h = None if logit_bias is None else head(logit_bias, b, h)
        L = logits(head(q, b, h), k_h, bias_h, n, s, inputs, slots, scale, m)
        larger = tl.maximum(largest, tl.max(L, 1))
        # Until something takes part the largest is minus infinity, which cannot be subtracted from itself.
        origin = tl.where(larger == float("-inf"), 0.0, larger)
        shrink, E = tl.exp(largest - origin), tl.exp(L - origin[:, None])
        largest, sum_exp = larger, sum_exp * shrink + tl.sum(E, 1)
        if dU is not None:
            v_h = k_h if v is None else head(v, b, h)
            U_h, S_h, dU_h = head(U, b, h), head(S, b, h), head(dU, b, h)
            dS_h = None if dS is None else head(dS, b, h)
            dA_h = None if dA is None else head(dA, b, h)
            filled, share, mean = per_slot(U_h, S_h, dU_h, dS_h, s, NORMALIZE, m)
            gradient = attention_gradient(v_h, dU_h, dA_h, n, s, inputs, slots, filled, share, mean, m)
            sum_dots = sum_dots * shrink + tl.sum(E * gradient, 1)
    normaliser = head(normaliser, b, 0)
    tl.store(at(normaliser, n, 0), tl.where(largest == float("-inf"), 0.0, largest), n < N)
    tl.store(at(normaliser, n, 1), 1.0 / sum_exp, n < N)
    if dU is not None:
        dots = head(dots, b, 0)
        tl.store(dots.ptr + n * dots.row, sum_dots / sum_exp, n < N)


@varying
def add_kernel(wide_sums, narrow_sums, wide, narrow, H, D, chunks, eps: tl.float64, NORMALIZE: tl.constexpr, m: Meta):
    """The sums of all chunks, in their order, for group program_id(0) and WIDTH features from program_id(1) * WIDTH on.

        wide_sums    (chunks, B * H, K, D)
        narrow_sums  (chunks, B * H, K), or None
        wide         (B, H, K, D): sum wide_sums, and with NORMALIZE its quotient by `narrow`, 0 where that is 0    out
        narrow       (B, H, K), or None: sum narrow_sums + eps                                                      out

    A tile is BLOCK_N chunks of all slots.
    """
    group, block = tl.program_id(0).to(m.INDEX), tl.program_id(1).to(m.INDEX)
    wide = head(wide, group // H, group % H)
    s = tl.arange(0, m.K_PADDED).to(m.INDEX)
    d = block * m.WIDTH + tl.arange(0, m.WIDTH).to(m.INDEX)
    here = (s < m.K)[:, None] & (d < D)[None, :]
    U = tl.zeros([m.K_PADDED, m.WIDTH], m.DTYPE)
    S = tl.full([m.K_PADDED], eps, m.DTYPE)
    for c0 in range(0, chunks, m.BLOCK_N):
        c = c0 + tl.arange(0, m.BLOCK_N).to(m.INDEX)
        sums = at(head(wide_sums, c[:, None, None], group), s[None, :, None], d[None, None, :])
        U += tl.sum(tl.load(sums, (c < chunks)[:, None, None] & here[None, :, :], other=0.0), 0)
        if narrow_sums is not None:
            sums = head(narrow_sums, c[:, None], group).ptr + s[None, :] * narrow_sums.row
            S += tl.sum(tl.load(sums, (c < chunks)[:, None] & (s < m.K)[None, :], other=0.0), 0)
    if NORMALIZE:
        U = tl.where((S == 0)[:, None], 0.0, U / tl.where(S == 0, 1.0, S)[:, None])
    tl.store(at(wide, s[:, None], d[None, :]), U, here)
    if narrow is not None:
        narrow = head(narrow, group // H, group % H)
        if block == 0:
            tl.store(narrow.ptr + s * narrow.row, S, s < m.K)
