"""All 2^K subsets of a pixel's masks in Triton: the loss and its gradients, or every conditional entropy.

The formulas are those of reference.py, the names those of csrc/subsets.h.
"""

from __future__ import annotations

import triton.language as tl

from iio_kernels.ops.iio_loss.triton_tuples import (
    block_of,
    copies,
    plus,
    read_mask,
    reciprocal_or_0,
    replaced,
    times,
    times_sign,
    varying,
    where,
)
from iio_kernels.runtime.triton_support import inlined


@inlined
def residuals(planes_ptr, X, i, first_c, inside, C: tl.constexpr, pixels):
    """(r_{i,c} for the channels of X, d_i): r = X_c d_i - n_{i,c}."""
    planes_ptr += i * (C + 1) * pixels
    d = tl.load(planes_ptr + C * pixels, inside, 0.0)
    r = ()
    for c in tl.static_range(len(X)):
        n = tl.load(planes_ptr + (first_c + c) * pixels, inside & (first_c + c < C), 0.0)
        r = r + (X[c] * d - n,)
    return r + (d,)


@inlined
def visit(node, w, set, g, T, weights, GRADIENTS: tl.constexpr):
    """What the set at `node` = (R_c .., D) adds: the gradients to R_c and D, and e.

    w_S = sum_{m not in S} g_m and T_m = sum_{S without m} e_S, or where each term has a weight of its own,
    sum G_{m,S} g_m and sum G_{m,S} e_S.
    """
    C: tl.constexpr = len(node) - 1
    norm = tl.abs(node[0])
    for c in tl.static_range(1, C):
        norm += tl.abs(node[c])
    inverse_D = reciprocal_or_0(node[C])
    e = norm * inverse_D
    if weights is not None:
        K: tl.constexpr = len(g)
        w = tl.full(w.shape, 0, w.dtype)
        for m in tl.static_range(K):
            others = ((set >> (m + 1)) << m) | (set & ((1 << m) - 1))
            applies = weights[1] & (set != 0) & (((set >> m) & 1) == 0)
            weight = tl.load(weights[0] + m * ((1 << (K - 1)) - 1) + others - 1, applies, 0.0)
            w += weight * g[m]
            T = replaced(T, m, T[m] + weight * e)
        e = tl.full(e.shape, 0, e.dtype)  # already in T
    sums = ()
    if GRADIENTS:
        w_by_D = w * inverse_D
        for c in tl.static_range(C):
            sums = sums + (times_sign(w_by_D, node[c]),)
        sums = sums + (-w_by_D * norm * inverse_D,)
    return sums, e, T


@inlined
def walk(node, w, set, masks, g, gradients, T, weights, LEVEL: tl.constexpr, GRADIENTS: tl.constexpr):
    """Visits all sets that add some of masks 0 .. LEVEL - 1 to the node's, each one addition from its parent.

    Returns the sums over all of them of the gradients to (R_c .., D) and of e, for the masks above to add to theirs,
    and `gradients` and T with what they add to those of the masks below.
    """
    if LEVEL == 0:
        sums, e, T = visit(node, w, set, g, T, weights, GRADIENTS)
        return sums, e, gradients, T
    else:
        i: tl.constexpr = LEVEL - 1
        sums, e, gradients, T = walk(node, w + g[i], set, masks, g, gradients, T, weights, i, GRADIENTS)
        T = replaced(T, i, T[i] + e)
        with_i, e_with_i, gradients, T = walk(
            plus(node, masks[i]), w, set | (1 << i), masks, g, gradients, T, weights, i, GRADIENTS
        )
        if GRADIENTS:
            gradients = replaced(gradients, i, plus(gradients[i], with_i))
        return plus(sums, with_i), e + e_with_i, gradients, T


@varying
def subsets(
    X_ptr, m_ptr, planes_ptr, totals_ptr, weights_ptr, T_ptr, dX_ptr, dots_ptr,
    X_strides, m_strides, B, H, W,
    K: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr, LOW: tl.constexpr, GRADIENTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """T, dots <g, T>, and with GRADIENTS planes <- dn = - dr and dd, all times -1 / C (1 / C if weighted).

    A program takes BLOCK pixels of ROWS images through all subsets, CHANNELS channels at a time (all is linear in them;
    T and dd add up): a loop over the sets of masks LOW .. K - 1, whose residuals it reads anew each time, and below
    each the tree over masks 0 .. LOW - 1, unrolled.

    X_ptr        (B, C, H, W), X_strides
    m_ptr        (B, K, H, W), m_strides
    planes_ptr   (B, K, C + 1, H, W)   n and d; overwritten
    totals_ptr   (B, K, C + 1)         of which that of a mask itself is its norm
    weights_ptr  (B, K, 2^(K-1) - 1)   the weight of each term; or None, all being 1
    T_ptr        (B, K, H, W)          written; or None
    dX_ptr       (B, C, H, W)          sum_i d_i dr_i, written; or None
    dots_ptr     (B, K, blocks)        <g_i, T_i> over each block of pixels, written
    """
    pixels = tl.cast(H, INDEX) * W
    blocks = (pixels + BLOCK - 1) // BLOCK
    program = tl.program_id(0).to(INDEX)
    b, p, inside = block_of(B, pixels, program, ROWS, BLOCK)
    X_ptr += b * X_strides[0] + p // W * X_strides[2] + p % W * X_strides[3]
    m_ptr += b * m_strides[0] + p // W * m_strides[2] + p % W * m_strides[3]
    planes_ptr += b * K * (C + 1) * pixels + p
    norms_ptr = totals_ptr + b * K * (C + 1) + C
    if weights_ptr is None:
        factor: tl.constexpr = -1 / C
        weights = None
    else:
        weights = (weights_ptr + b * K * ((1 << (K - 1)) - 1), b < B)
        factor: tl.constexpr = 1 / C
    zero = tl.full((ROWS, BLOCK), 0, DTYPE)

    g = ()
    for i in tl.static_range(K):
        inverse_norm = reciprocal_or_0(tl.load(norms_ptr + i * (C + 1), b < B, 0.0))
        g = g + (read_mask(m_ptr + i * m_strides[1], inside, DTYPE) * inverse_norm,)
    T = copies(zero, K)
    dd = copies(zero, K)
    for first_c in range(0, C, CHANNELS):
        X = ()
        for c in tl.static_range(CHANNELS):
            X = X + (tl.load(X_ptr + (first_c + c) * X_strides[1], inside & (first_c + c < C), 0.0).to(DTYPE),)
        masks = ()
        for i in tl.static_range(LOW):
            masks = masks + (residuals(planes_ptr, X, i, first_c, inside, C, pixels),)
        gradients = ()
        for i in tl.static_range(K):
            gradients = gradients + (copies(zero, CHANNELS) + (dd[i],),)

        node = copies(zero, CHANNELS + 1)
        for upper in range(1 << (K - LOW)):
            node = copies(zero, CHANNELS + 1)
            w = zero
            for j in range(LOW, K):
                member = ((upper >> (j - LOW)) & 1) == 1
                node = plus(node, residuals(planes_ptr, X, j, first_c, inside & member, C, pixels))
            for i in tl.static_range(LOW, K):
                member = ((upper >> (i - LOW)) & 1) == 1
                w += tl.where(member, 0.0, g[i])
            sums, e, gradients, T = walk(node, w, upper << LOW, masks, g, gradients, T, weights, LOW, GRADIENTS)
            for i in tl.static_range(LOW, K):
                member = ((upper >> (i - LOW)) & 1) == 1
                T = replaced(T, i, T[i] + tl.where(member, 0.0, e))
                if GRADIENTS:
                    gradients = replaced(gradients, i, plus(gradients[i], where(member, sums)))

        if GRADIENTS:
            for i in tl.static_range(LOW):
                node = plus(node, masks[i])  # the last one becomes the set of all
            dd = ()
            dX = copies(zero, CHANNELS)
            for i in tl.static_range(K):
                plane_ptr = planes_ptr + i * (C + 1) * pixels
                dd_i = gradients[i][CHANNELS]
                for c in tl.static_range(CHANNELS):
                    # A residual that is NaN or infinite makes dr of its channel NaN, which no sum of signs would do.
                    dr = gradients[i][c] + 0 * node[c]
                    dd_i += X[c] * dr
                    if dX_ptr is not None:
                        dX = replaced(dX, c, dX[c] + tl.load(plane_ptr + C * pixels, inside, 0.0) * dr)
                    tl.store(plane_ptr + (first_c + c) * pixels, -factor * dr, inside & (first_c + c < C))
                dd = dd + (dd_i,)
            if dX_ptr is not None:
                for c in tl.static_range(CHANNELS):
                    dX_c_ptr = dX_ptr + (b * C + first_c + c) * pixels + p
                    tl.store(dX_c_ptr, factor * dX[c], inside & (first_c + c < C))

    for i in tl.static_range(K):
        if GRADIENTS:
            tl.store(planes_ptr + (i * (C + 1) + C) * pixels, factor * dd[i], inside)
        if T_ptr is not None:
            tl.store(T_ptr + (b * K + i) * pixels + p, factor * T[i], inside)
        dot = tl.sum(factor * g[i] * T[i], 1, keep_dims=True)
        tl.store(dots_ptr + (b * K + i) * blocks + program % blocks, dot, b < B)


@inlined
def four_nodes(planes_ptr, X, upper, c, inside, K: tl.constexpr, C: tl.constexpr, pixels):
    """(R_c, D) of the sets of which `upper` says which of masks 2 .. K - 1 they hold, without and with 0 and 1."""
    node = copies(tl.full(X[0].shape, 0, X[0].dtype), 2)
    for i in tl.static_range(2, K):
        member = ((upper >> (i - 2)) & 1) == 1
        node = plus(node, residuals(planes_ptr, X, i, c, inside & member, C, pixels))
    with_0 = plus(node, residuals(planes_ptr, X, 0, c, inside, C, pixels))
    r_and_d = residuals(planes_ptr, X, 1, c, inside, C, pixels)
    return node, with_0, plus(node, r_and_d), plus(with_0, r_and_d)


@varying
def entropies(
    X_ptr, m_ptr, planes_ptr, totals_ptr, entropies_ptr,
    X_strides, m_strides, B, H, W,
    K: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """<g_m, e_S> / C of ROWS images, for the four sets S that hold the same of masks 2 .. K - 1, and every m not in S.

    X_ptr          (B, C, H, W), X_strides
    m_ptr          (B, K, H, W), m_strides
    planes_ptr     (B, K, C + 1, H, W)   n and d
    totals_ptr     (B, K, C + 1)         of which that of a mask itself is its norm
    entropies_ptr  (B, K, 2^(K-1) - 1)   row m: the nonempty sets without m, ordered as numbers; written
    """
    pixels = tl.cast(H, INDEX) * W
    program = tl.program_id(0).to(INDEX)
    upper = tl.full((ROWS, 1), program & ((1 << (K - 2)) - 1), INDEX)
    b = (program >> (K - 2)) * ROWS + tl.arange(0, ROWS)[:, None]
    X_ptr += b * X_strides[0]
    m_ptr += b * m_strides[0]
    planes_ptr += b * K * (C + 1) * pixels
    zero = tl.full((ROWS, BLOCK), 0, DTYPE)
    dots = copies(copies(zero, 4), K)
    for first in range(0, pixels, BLOCK):
        p = first + tl.arange(0, BLOCK)[None, :]
        inside = (b < B) & (p < pixels)
        norms = copies(zero, 4)
        D = copies(zero, 4)
        for c in range(C):
            X = tl.load(X_ptr + c * X_strides[1] + p // W * X_strides[2] + p % W * X_strides[3], inside, 0.0).to(DTYPE)
            nodes = four_nodes(planes_ptr + p, (X,), upper, c, inside, K, C, pixels)
            norms = plus(norms, (tl.abs(nodes[0][0]), tl.abs(nodes[1][0]), tl.abs(nodes[2][0]), tl.abs(nodes[3][0])))
            D = (nodes[0][1], nodes[1][1], nodes[2][1], nodes[3][1])
        e = ()
        for low in tl.static_range(4):
            e = e + (norms[low] * reciprocal_or_0(D[low]),)
        for m in tl.static_range(K):
            m_m_ptr = m_ptr + m * m_strides[1] + p // W * m_strides[2] + p % W * m_strides[3]
            m_m = copies(read_mask(m_m_ptr, inside, DTYPE), 4)
            dots = replaced(dots, m, plus(dots[m], times(m_m, e)))
    for m in tl.static_range(K):
        norm = tl.load(totals_ptr + (b * K + m) * (C + 1) + C, b < B, 0.0)
        for low in tl.static_range(4):
            set = upper << 2 | low
            others = ((set >> (m + 1)) << m) | (set & ((1 << m) - 1))
            entropy = tl.sum(dots[m][low], 1, keep_dims=True) * reciprocal_or_0(norm) / C
            entropy = tl.where(norm == 0, 0.0, entropy)
            row_ptr = entropies_ptr + (b * K + m) * ((1 << (K - 1)) - 1)
            tl.store(row_ptr + others - 1, entropy, (b < B) & (set != 0) & (((set >> m) & 1) == 0))
