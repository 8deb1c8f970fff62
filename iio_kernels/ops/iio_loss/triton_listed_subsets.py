"""The subsets of a draw in Triton, by pairs that complement each other: the sampled loss and its gradients."""

from __future__ import annotations

import triton.language as tl

from iio_kernels.ops.iio_loss.triton_subsets import residuals, visit
from iio_kernels.ops.iio_loss.triton_tuples import (
    block_of,
    copies,
    plus,
    read_mask,
    reciprocal_or_0,
    replaced,
    varying,
    where,
)
from iio_kernels.runtime.triton_support import inlined


@inlined
def add_mask(pairs, words, i, x, g):
    """The nodes (R_c .., D, w) of each pair's two sets, after mask i = (r_c .., d) went to one of them."""
    result = ()
    for j in tl.static_range(len(pairs)):
        member = ((words[j] >> i) & 1) == 1
        with_i = plus(pairs[j][0], where(member, x) + (tl.where(member, 0.0, g),))
        without_i = plus(pairs[j][1], where(member == 0, x) + (tl.where(member, g, 0.0),))
        result = result + ((with_i, without_i),)
    return result


@inlined
def visit_pair(first, second, weight, GRADIENTS: tl.constexpr):
    """What each of two complements, nodes (R_c .., D, w), has for its masks: the gradients to R_c and D, and the e of
    the other one; and w e of both. All times the pair's weight."""
    last: tl.constexpr = len(first) - 1
    w = first[last] * weight, second[last] * weight
    sums_1, e_1, _ = visit(first[:-1], w[0], 0, (), (), None, GRADIENTS)
    sums_2, e_2, _ = visit(second[:-1], w[1], 0, (), (), None, GRADIENTS)
    if GRADIENTS:
        for c in tl.static_range(last - 1):
            # A residual that is NaN or infinite makes dr of its channel NaN, which no sum of signs would do.
            unknown = 0 * (first[c] + second[c])
            sums_1 = replaced(sums_1, c, sums_1[c] + unknown)
            sums_2 = replaced(sums_2, c, sums_2[c] + unknown)
    return (sums_1 + (e_2 * weight,), sums_2 + (e_1 * weight,)), w[0] * e_1 + w[1] * e_2


@inlined
def of_mask(found, words, i):
    """The sum over pairs of what the set with mask i has for it."""
    total = copies(tl.full(found[0][0][0].shape, 0, found[0][0][0].dtype), len(found[0][0]))
    for j in tl.static_range(len(found)):
        member = ((words[j] >> i) & 1) == 1
        own = ()
        for k in tl.static_range(len(total)):
            own = own + (tl.where(member, found[j][0][k], found[j][1][k]),)
        total = plus(total, own)
    return total


@varying
def listed_subsets(
    X_ptr, m_ptr, planes_ptr, totals_ptr, pairs_ptr, weights_ptr, sums_ptr, T_ptr, dX_ptr, losses_ptr, dots_ptr,
    X_strides, m_strides, B, K, H, W, P,
    C: tl.constexpr, CHANNELS: tl.constexpr, PAIRS: tl.constexpr, GRADIENTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """As `subsets`, of P pairs of sets that complement each other. All times -1 / C.

    A program takes BLOCK pixels of ROWS images through the list, CHANNELS channels and PAIRS pairs at a time: the nodes
    of these are in registers, while the masks pass by, once to make the nodes and once to get what is theirs.

    X_ptr        (B, C, H, W), X_strides
    m_ptr        (B, K, H, W), m_strides
    planes_ptr   (B, K, C + 1, H, W)         n and d; with GRADIENTS overwritten
    totals_ptr   (B, K, C + 1)               of which that of a mask itself is its norm
    pairs_ptr    (B, P)                      int64: bit i says which of the two sets holds mask i
    weights_ptr  (P,)
    sums_ptr     (B, K, CHANNELS + 1, H, W)  room for dr and dd, with GRADIENTS
    T_ptr        (B, K, H, W)                written; or None
    dX_ptr       (B, C, H, W)                sum_i d_i dr_i, written; or None
    losses_ptr   (B, blocks)                 over each block of pixels, written
    dots_ptr     (B, K, blocks)              <g_i, T_i> over the same, written if T is
    """
    pixels = tl.cast(H, INDEX) * W
    blocks = (pixels + BLOCK - 1) // BLOCK
    program = tl.program_id(0).to(INDEX)
    b, p, inside = block_of(B, pixels, program, ROWS, BLOCK)
    X_ptr += b * X_strides[0] + p // W * X_strides[2] + p % W * X_strides[3]
    m_ptr += b * m_strides[0] + p // W * m_strides[2] + p % W * m_strides[3]
    planes_ptr += b * K * (C + 1) * pixels + p
    norms_ptr = totals_ptr + b * K * (C + 1) + C
    factor: tl.constexpr = -1 / C
    zero = tl.full((ROWS, BLOCK), 0, DTYPE)
    if GRADIENTS:
        sums_ptr += b * K * (CHANNELS + 1) * pixels + p

    loss = zero
    for first_c in range(0, C, CHANNELS):
        X = ()
        for c in tl.static_range(CHANNELS):
            X = X + (tl.load(X_ptr + (first_c + c) * X_strides[1], inside & (first_c + c < C), 0.0).to(DTYPE),)
        for first in range(0, P, PAIRS):
            words = ()
            weights = ()
            for j in tl.static_range(PAIRS):
                place = first + tl.full((ROWS, 1), j, INDEX)
                exists = (b < B) & (place < P)
                words = words + (tl.load(pairs_ptr + b * P + place, exists, 0),)
                weights = weights + (tl.load(weights_ptr + place, exists, 0.0),)
            pairs = copies((copies(zero, CHANNELS + 2), copies(zero, CHANNELS + 2)), PAIRS)
            for i in range(K):
                inverse_norm = reciprocal_or_0(tl.load(norms_ptr + i * (C + 1), b < B, 0.0))
                g = read_mask(m_ptr + i * m_strides[1], inside, DTYPE) * inverse_norm
                pairs = add_mask(pairs, words, i, residuals(planes_ptr, X, i, first_c, inside, C, pixels), g)
            found = ()
            for j in tl.static_range(PAIRS):
                of_pair, error = visit_pair(pairs[j][0], pairs[j][1], weights[j], GRADIENTS)
                found = found + (of_pair,)
                loss += error
            if GRADIENTS:
                for i in range(K):
                    total = of_mask(found, words, i)
                    dr_ptr = sums_ptr + i * (CHANNELS + 1) * pixels
                    for c in tl.static_range(CHANNELS):
                        dr = tl.load(dr_ptr + c * pixels, inside & (first > 0), 0.0)
                        tl.store(dr_ptr + c * pixels, dr + total[c], inside)
                    went_before = inside & ((first > 0) | (first_c > 0))
                    dd = tl.load(dr_ptr + CHANNELS * pixels, went_before, 0.0)
                    tl.store(dr_ptr + CHANNELS * pixels, dd + total[CHANNELS], inside)
                    if T_ptr is not None:
                        T_i_ptr = T_ptr + (b * K + i) * pixels + p
                        tl.store(T_i_ptr, tl.load(T_i_ptr, went_before, 0.0) + total[CHANNELS + 1], inside)

        if GRADIENTS:
            dX = copies(zero, CHANNELS)
            for i in range(K):
                plane_ptr = planes_ptr + i * (C + 1) * pixels
                dr_ptr = sums_ptr + i * (CHANNELS + 1) * pixels
                d = tl.load(plane_ptr + C * pixels, inside, 0.0)
                dd = tl.load(dr_ptr + CHANNELS * pixels, inside, 0.0)
                for c in tl.static_range(CHANNELS):
                    dr = tl.load(dr_ptr + c * pixels, inside, 0.0)
                    dd += X[c] * dr
                    dX = replaced(dX, c, dX[c] + d * dr)
                    tl.store(plane_ptr + (first_c + c) * pixels, -factor * dr, inside & (first_c + c < C))
                tl.store(dr_ptr + CHANNELS * pixels, dd, inside)
            if dX_ptr is not None:
                for c in tl.static_range(CHANNELS):
                    dX_c_ptr = dX_ptr + (b * C + first_c + c) * pixels + p
                    tl.store(dX_c_ptr, factor * dX[c], inside & (first_c + c < C))

    tl.store(losses_ptr + b * blocks + program % blocks, tl.sum(factor * loss, 1, keep_dims=True), b < B)
    if GRADIENTS:
        for i in range(K):
            dd = tl.load(sums_ptr + (i * (CHANNELS + 1) + CHANNELS) * pixels, inside, 0.0)
            tl.store(planes_ptr + (i * (C + 1) + C) * pixels, factor * dd, inside)
            if T_ptr is not None:
                inverse_norm = reciprocal_or_0(tl.load(norms_ptr + i * (C + 1), b < B, 0.0))
                g = read_mask(m_ptr + i * m_strides[1], inside, DTYPE) * inverse_norm
                T_i_ptr = T_ptr + (b * K + i) * pixels + p
                T = factor * tl.load(T_i_ptr, inside, 0.0)
                tl.store(T_i_ptr, T, inside)
                dots_i_ptr = dots_ptr + (b * K + i) * blocks + program % blocks
                tl.store(dots_i_ptr, tl.sum(g * T, 1, keep_dims=True), b < B)
