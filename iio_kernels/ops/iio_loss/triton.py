"""Inpainting and the IIO loss in Triton: on a GPU, and for tests in Triton's interpreter on a CPU.

The formulas are those of reference.py, the names those of csrc/subsets.h. Three steps make a loss and its gradient:

    planes <- F(X_c m_i), F(m_i)          filter_planes: products, their totals and the filter, a plane a program
    planes <- dn_{i,c}, dd_i; T; losses   subsets: all 2^K sets of a pixel in registers, a pixel a thread
                                          (or listed_subsets: those of a list)
    planes <- F(dn_{i,c}), F(dd_i)        filter_planes, in place
    dmasks, dimage                        masks_gradient, image_gradient

The filter F is repeated passes of the Gaussian with zeros outside, plus eps times the plane's total.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from iio_kernels.ops.iio_loss import reference, schema
from iio_kernels.ops.iio_loss.reference import Inpainter
from iio_kernels.runtime.numerics import arithmetic_dtype
from iio_kernels.runtime.triton_support import INTERPRETED, index_type, inlined

MAX_MASKS = schema.MAX_MASKS

NEGLIGIBLE = tl.constexpr(reference.NEGLIGIBLE)

# ---- Tuples of tensors, known at compile time -----------------------------------------------------------------------


@inlined
def copies(x, count: tl.constexpr):
    result = ()
    for _ in tl.static_range(count):
        result = result + (x,)
    return result


@inlined
def plus(x, y):
    result = ()
    for k in tl.static_range(len(x)):
        result = result + (x[k] + y[k],)
    return result


@inlined
def times(x, y):
    result = ()
    for k in tl.static_range(len(x)):
        result = result + (x[k] * y[k],)
    return result


@inlined
def where(condition, x):
    """x where the condition holds, otherwise 0."""
    result = ()
    for k in tl.static_range(len(x)):
        result = result + (tl.where(condition, x[k], 0.0),)
    return result


@inlined
def replaced(x, k: tl.constexpr, value):
    return x[:k] + (value,) + x[k + 1 :]


@inlined
def unstacked(x, count: tl.constexpr, planes: tl.constexpr, lanes: tl.constexpr):
    """(count, planes, lanes) -> `count` tensors (planes, lanes)."""
    if count == 1:
        return (tl.reshape(x, (planes, lanes)),)
    else:
        halves = tl.permute(tl.reshape(x, (2, count // 2, planes, lanes)), (1, 2, 3, 0))
        first, second = tl.split(halves)
        return unstacked(first, count // 2, planes, lanes) + unstacked(second, count // 2, planes, lanes)


@inlined
def stacked(x, count: tl.constexpr, planes: tl.constexpr, lanes: tl.constexpr):
    """`count` tensors (planes, lanes) -> (count, planes, lanes)."""
    if count == 1:
        return tl.reshape(x[0], (1, planes, lanes))
    else:
        first = stacked(x[: count // 2], count // 2, planes, lanes)
        second = stacked(x[count // 2 :], count // 2, planes, lanes)
        return tl.reshape(tl.permute(tl.join(first, second), (3, 0, 1, 2)), (count, planes, lanes))


# ---- Numbers --------------------------------------------------------------------------------------------------------


@inlined
def reciprocal_or_0(x):
    return tl.where(x == 0, 0.0, 1 / tl.where(x == 0, 1.0, x))


@inlined
def times_sign(t, x):
    """t sign(x), where a NaN counts as 0."""
    return tl.where(x > 0, t, tl.where(x < 0, -t, 0.0))


@inlined
def block_of(rows, pixels, program, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The rows (ROWS, 1) and pixels (1, BLOCK) of the program of that number, and which of them exist."""
    blocks = (pixels + BLOCK - 1) // BLOCK
    row = program // blocks * ROWS + tl.arange(0, ROWS)[:, None]
    p = program % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, p, (row < rows) & (p < pixels)


@inlined
def read_mask(pointers, inside, dtype: tl.constexpr):
    m = tl.load(pointers, inside, 0.0).to(dtype)
    return tl.where(tl.abs(m) < NEGLIGIBLE, 0.0, m)


#: The last batch is often smaller: kernels are not compiled anew when these happen to be 1 or multiples of 16.
varying = triton.jit(do_not_specialize=("B", "count", "rows"))


# ---- The filter -----------------------------------------------------------------------------------------------------


@inlined
def gaussian(sigma, radius: tl.constexpr, dtype: tl.constexpr):
    """The filter's taps from its middle outwards."""
    sigma = tl.full((), sigma, dtype)
    taps = (tl.full((), 1, dtype),)
    total = taps[0]
    for t in tl.static_range(1, radius + 1):
        taps = taps + (tl.exp(-0.5 * (t / sigma) * (t / sigma)),)
        total += 2 * taps[t]
    normalised = ()
    for t in tl.static_range(radius + 1):
        normalised = normalised + (taps[t] / total,)
    return normalised


@inlined
def filter_elements(x, windows, first, length, taps):
    """The elements of a line `first`, first + 1, .., and 0 beyond its length, on their way through all passes.

    `windows` holds, for each pass, the 2 radius + 1 elements that it saw last. Returns as many elements of the
    filtered line, those passes x radius places before the ones given, and the windows moved on.
    """
    radius: tl.constexpr = len(taps) - 1
    passes: tl.constexpr = len(windows)
    result = ()
    for s in tl.static_range(len(x)):
        element = x[s]
        moved = ()
        for k in tl.static_range(passes):
            if k > 0:  # zeros surround what the pass before made, too
                place = first + s - k * radius
                element = tl.where((place >= 0) & (place < length), element, 0.0)
            window = windows[k][1:] + (element,)
            moved = moved + (window,)
            element = taps[0] * window[radius]
            for t in tl.static_range(1, radius + 1):
                element = tl.fma(taps[t], window[radius - t] + window[radius + t], element)
        windows = moved
        result = result + (element,)
    return result, windows


@inlined
def filter_lines(
    X, m, planes, exists, lines, length, taps, everywhere,
    PASSES: tl.constexpr, PLANES: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Filter all lines of each plane along their length, a lane following each line, and add `everywhere`.

    X, m and planes are (pointers, stride from line to line, stride along a line), and the lines are those of X m, or
    where m is None those of planes. They may lie where the result goes: an element lives in registers from when it is
    read until no window holds it. Returns the sum of all elements for each plane and lane.
    """
    radius: tl.constexpr = len(taps) - 1
    reach: tl.constexpr = PASSES * radius
    zero = tl.full((PLANES, LANES), 0, DTYPE)
    sums = zero
    for first_line in range(0, lines, LANES):
        line = (first_line + tl.arange(0, LANES)).to(INDEX)[None, None, :]
        of_line = exists & (line < lines)
        windows = copies(copies(zero, 2 * radius + 1), PASSES)
        for first in range(0, length + reach, STEP):
            place = (first + tl.arange(0, STEP)).to(INDEX)[:, None, None]
            inside = of_line & (place < length)
            if m is None:
                x = tl.load(planes[0] + line * planes[1] + place * planes[2], inside, 0.0)
            else:
                x = read_mask(m[0] + line * m[1] + place * m[2], inside, DTYPE)
                x *= tl.load(X[0] + line * X[1] + place * X[2], inside & X[3], 1.0).to(DTYPE)
            x = unstacked(x, STEP, PLANES, LANES)
            for s in tl.static_range(STEP):
                sums += x[s]
            y, windows = filter_elements(x, windows, first, length, taps)
            y = stacked(plus(y, copies(everywhere, STEP)), STEP, PLANES, LANES)
            place -= reach
            tl.store(planes[0] + line * planes[1] + place * planes[2], y, of_line & (place >= 0) & (place < length))
    return sums


@varying
def filter_planes(
    X_ptr, m_ptr, planes_ptr, totals_ptr,
    X_strides, m_strides, count, K, C, H, W, sigma: tl.float64, eps: tl.float64,
    PRODUCTS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, RADIUS: tl.constexpr, PASSES: tl.constexpr,
    PLANES: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """planes <- G x G^T + eps sum(x), the matrix G being all passes along one axis, and x X_c m_i and m_i, or planes.

    A program filters PLANES planes, each in place: first along columns, then along rows.

    X_ptr       (B, C, H, W), X_strides
    m_ptr       (B, K, H, W), m_strides
    planes_ptr  (B, K, C + 1, H, W), count = B K (C + 1) planes; with PRODUCTS they are only written
    totals_ptr  (B, K, C + 1)  sum(x): written by the FIRST of the launches that all passes take, added by the LAST
    """
    plane = (tl.program_id(0).to(INDEX) * PLANES + tl.arange(0, PLANES))[None, :, None]
    exists = plane < count
    c = plane % (C + 1)
    i = plane // (C + 1) % K
    b = plane // (C + 1) // K
    X_ptr += b * X_strides[0] + c * X_strides[1]
    m_ptr += b * m_strides[0] + i * m_strides[1]
    planes_ptr += plane * H * W
    totals_ptr += tl.reshape(plane, (PLANES, 1))
    exists_2d = tl.reshape(exists, (PLANES, 1))
    taps = gaussian(sigma, RADIUS, DTYPE)
    zero = tl.full((PLANES, LANES), 0, DTYPE)

    columns = (planes_ptr, 1, W)
    if PRODUCTS:
        X = (X_ptr, X_strides[3], X_strides[2], c < C)
        m = (m_ptr, m_strides[3], m_strides[2])
        sums = filter_lines(X, m, columns, exists, W, H, taps, zero, PASSES, PLANES, LANES, STEP, DTYPE, INDEX)
    else:
        sums = filter_lines(None, None, columns, exists, W, H, taps, zero, PASSES, PLANES, LANES, STEP, DTYPE, INDEX)
    if FIRST:
        totals = tl.sum(sums, 1, keep_dims=True)
        tl.store(totals_ptr, totals, exists_2d)
    else:
        totals = tl.load(totals_ptr, exists_2d, 0.0)
    everywhere = zero
    if LAST:
        everywhere += tl.full((), eps, DTYPE) * totals
    tl.debug_barrier()  # rows are made of what other threads wrote
    rows = (planes_ptr, W, 1)
    filter_lines(None, None, rows, exists, H, W, taps, everywhere, PASSES, PLANES, LANES, STEP, DTYPE, INDEX)


# ---- Subsets --------------------------------------------------------------------------------------------------------


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


# ---- Predictions ----------------------------------------------------------------------------------------------------


@varying
def predictions(
    planes_ptr, psi_ptr, rows, C, pixels,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """psi = n / d, and 0 where d = 0. The rows are those of all images' masks.

    planes_ptr  (B, M, C + 1, H, W)  n and d
    psi_ptr     (B, M, C, H, W)      written
    """
    i, p, inside = block_of(rows, pixels, tl.program_id(0).to(INDEX), ROWS, BLOCK)
    planes_ptr += i * (C + 1) * pixels + p
    inverse_d = reciprocal_or_0(tl.load(planes_ptr + C * pixels, inside, 0.0))
    for c in range(C):
        n = tl.load(planes_ptr + c * pixels, inside, 0.0)
        tl.store(psi_ptr + (i * C + c) * pixels + p, n * inverse_d, inside)


@varying
def prediction_gradients(
    dpsi_ptr, planes_ptr, rows, C, pixels,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """dn_c = dpsi_c / d and dd = - sum_c psi_c dn_c, and 0 where d = 0. The rows are those of all images' masks.

    dpsi_ptr    (B, M, C, H, W)
    planes_ptr  (B, M, C + 1, H, W)  n and d <- dn and dd
    """
    i, p, inside = block_of(rows, pixels, tl.program_id(0).to(INDEX), ROWS, BLOCK)
    planes_ptr += i * (C + 1) * pixels + p
    inverse_d = reciprocal_or_0(tl.load(planes_ptr + C * pixels, inside, 0.0))
    dd = tl.full(inverse_d.shape, 0, inverse_d.dtype)
    for c in range(C):
        psi = tl.load(planes_ptr + c * pixels, inside, 0.0) * inverse_d
        dn = tl.load(dpsi_ptr + (i * C + c) * pixels + p, inside, 0.0) * inverse_d
        dd -= psi * dn
        tl.store(planes_ptr + c * pixels, dn, inside)
    tl.store(planes_ptr + C * pixels, dd, inside)


# ---- Gradients ------------------------------------------------------------------------------------------------------


@varying
def masks_gradient(
    X_ptr, planes_ptr, totals_ptr, dots_ptr, dmasks_ptr,
    X_strides, rows, K, C, H, W, parts,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """dm_i = F(dd_i) + sum_c X_c F(dn_{i,c}), with T + (T_i - <g_i, T_i>) / ||m_i||. The rows are all images' masks.

    X_ptr       (B, C, H, W), X_strides
    planes_ptr  (B, K, C + 1, H, W)  F(dn) and F(dd)
    totals_ptr  (B, K, C + 1)        of which that of a mask itself is its norm
    dots_ptr    (B, K, parts)        <g_i, T_i> in parts, at most PARTS; or None, there being no T
    dmasks_ptr  (B, K, H, W)         T if there is one; written
    """
    pixels = tl.cast(H, INDEX) * W
    i, p, inside = block_of(rows, pixels, tl.program_id(0).to(INDEX), ROWS, BLOCK)
    X_ptr += i // K * X_strides[0] + p // W * X_strides[2] + p % W * X_strides[3]
    planes_ptr += i * (C + 1) * pixels + p
    dmasks_ptr += i * pixels + p
    dm = tl.load(planes_ptr + C * pixels, inside, 0.0)
    for c in range(C):
        X = tl.load(X_ptr + c * X_strides[1], inside, 0.0).to(DTYPE)
        dm += X * tl.load(planes_ptr + c * pixels, inside, 0.0)
    if dots_ptr is not None:
        part = tl.arange(0, PARTS)[None, :]
        dot = tl.sum(tl.load(dots_ptr + i * parts + part, (i < rows) & (part < parts), 0.0), 1, keep_dims=True)
        inverse_norm = reciprocal_or_0(tl.load(totals_ptr + i * (C + 1) + C, i < rows, 0.0))
        dm += (tl.load(dmasks_ptr, inside, 0.0) - dot) * inverse_norm
    tl.store(dmasks_ptr, dm, inside)


@varying
def image_gradient(
    m_ptr, planes_ptr, dimage_ptr,
    m_strides, rows, K, C, H, W,
    DIRECT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """dX_c = sum_i m_i F(dn_{i,c}), with DIRECT + sum_i d_i dr_{i,c}. The rows are all images' channels.

    m_ptr       (B, K, H, W), m_strides
    planes_ptr  (B, K, C + 1, H, W)  F(dn) and F(dd)
    dimage_ptr  (B, C, H, W)         sum_i d_i dr_i if DIRECT; written
    """
    pixels = tl.cast(H, INDEX) * W
    row, p, inside = block_of(rows, pixels, tl.program_id(0).to(INDEX), ROWS, BLOCK)
    b = row // C
    m_ptr += b * m_strides[0] + p // W * m_strides[2] + p % W * m_strides[3]
    planes_ptr += (b * K * (C + 1) + row % C) * pixels + p
    dimage_ptr += row * pixels + p
    dX = tl.load(dimage_ptr, inside & DIRECT, 0.0)
    for i in range(K):
        m = read_mask(m_ptr + i * m_strides[1], inside, DTYPE)
        dX += m * tl.load(planes_ptr + i * (C + 1) * pixels, inside, 0.0)
    tl.store(dimage_ptr, dX, inside)


# ---- Launches -------------------------------------------------------------------------------------------------------

#: The fewest and the most elements that a program takes at a time. Filter and subsets have a thread for each, which
#: needs most of the registers that it can have; the others give each of 128 threads several loads to wait for at once.
LINES, SETS, PIXELS = (64, 512), (128, 128), (1024, 1024)

#: How many pairs of a list a thread has in registers at a time.
PAIRS = 4


def _block(rows: int, length: int, least: int, most: int) -> tuple[int, int]:
    """The shape of a block: `length`, as far as `most` elements go, and as many rows as it takes to have `least`.

    Never fewer than there are threads: of two that hold the same element one could read what the other has overwritten.
    """
    if INTERPRETED:  # which takes as long for many elements as for one
        most = 2**16
        least = min(triton.next_power_of_2(rows * triton.next_power_of_2(length)), most)
    columns = min(triton.next_power_of_2(length), most)
    return max(least // columns, 1), columns


def _launch(kernel: Any, programs: int, *arguments: Any, threads: int = 128, **constants: Any) -> None:
    """Launch on the tensors' device, which need not be the current one.

    No product is fused with a sum behind the kernels' back: what is equal on paper is to cancel.
    """
    if programs > 0:
        with torch.cuda.device_of(arguments[0]):
            warps = threads // (64 if torch.version.hip else 32)
            kernel[(programs,)](*arguments, **constants, num_warps=warps, num_stages=1, enable_fp_fusion=False)


class _Call:
    """An operator's inputs, its scratch memory, and the launches that operators share."""

    def __init__(self, image: Tensor, masks: Tensor, *inpainter: Any) -> None:
        self.image, self.masks, self.inpainter = image, masks, Inpainter(*inpainter)
        self.B, self.C, self.H, self.W = image.shape
        self.K, self.pixels = masks.shape[1], self.H * self.W
        self.dtype = arithmetic_dtype(image, masks)
        self.planes = self.empty(self.B, self.K, self.C + 1, self.H, self.W)
        # Those of the products, of which the masks' own are their norms, and those of the gradients to n and d.
        self.totals = self.empty(2, self.B, self.K, self.C + 1)
        self.numbers = {
            "DTYPE": tl.float64 if self.dtype == torch.float64 else tl.float32,
            "INDEX": index_type(image, masks, self.planes),
        }

    def empty(self, *shape: int) -> Tensor:
        return self.image.new_empty(shape, dtype=self.dtype)

    def blocks(self, rows: int) -> tuple[int, dict[str, Any]]:
        """How many programs take all pixels of so many rows, and their blocks."""
        ROWS, BLOCK = _block(rows, self.pixels, *PIXELS)
        return triton.cdiv(rows, ROWS) * triton.cdiv(self.pixels, BLOCK), {"ROWS": ROWS, "BLOCK": BLOCK}

    def filter(self, products: bool) -> None:
        """planes <- the filtered products, or themselves filtered."""
        sigma, taps, repeats, eps = schema.arguments(self.inpainter)
        count = self.B * self.K * (self.C + 1)
        PLANES, LANES = _block(count, max(self.H, self.W), *LINES)
        most = max(66 // taps, 1)
        for first in range(0, repeats, most):
            passes = min(most, repeats - first)
            _launch(
                filter_planes, triton.cdiv(count, PLANES),
                self.image, self.masks, self.planes, self.totals[0 if products else 1],
                self.image.stride(), self.masks.stride(), count, self.K, self.C, self.H, self.W, sigma, eps,
                PRODUCTS=products and first == 0, FIRST=first == 0, LAST=first + passes == repeats,
                RADIUS=taps // 2, PASSES=passes, PLANES=PLANES, LANES=LANES, STEP=8, threads=PLANES * LANES,
                **self.numbers,
            )  # fmt: skip

    def subsets(self, weights: Tensor | None, dimage: Tensor | None, T: Tensor | None) -> Tensor:
        """planes <- dn and dd if a gradient is wanted; T, and dimage but for its filtered part. Returns dots."""
        ROWS, BLOCK = _block(self.B, self.pixels, *SETS)
        parts = triton.cdiv(self.pixels, BLOCK)
        dots = self.empty(self.B, self.K, parts)
        # The tree's gradients and T are to stay in registers: more masks, weights or AMD's compiler need more of them.
        LOW = 4 if self.K <= 8 and weights is None and not torch.version.hip else 3
        _launch(
            subsets, triton.cdiv(self.B, ROWS) * parts,
            self.image, self.masks, self.planes, self.totals, weights, T, dimage, dots,
            self.image.stride(), self.masks.stride(), self.B, self.H, self.W,
            K=self.K, C=self.C, CHANNELS=triton.cdiv(self.C, triton.cdiv(self.C, 3)), LOW=min(self.K, LOW),
            GRADIENTS=dimage is not None or T is not None, ROWS=ROWS, BLOCK=BLOCK, **self.numbers,
        )  # fmt: skip
        return dots

    def listed_subsets(
        self, pairs: Tensor, weights: Tensor, dimage: Tensor | None, T: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `subsets`, of a list of pairs. Returns the losses in parts and dots."""
        P, gradients = pairs.shape[1], dimage is not None or T is not None
        ROWS, BLOCK = _block(self.B, self.pixels, *SETS)
        parts = triton.cdiv(self.pixels, BLOCK)
        losses, dots = self.empty(self.B, parts), self.empty(self.B, self.K, parts)
        CHANNELS = triton.cdiv(self.C, triton.cdiv(self.C, 3))
        sums = self.empty(self.B, self.K, CHANNELS + 1, self.H, self.W) if gradients else None
        _launch(
            listed_subsets, triton.cdiv(self.B, ROWS) * parts,
            self.image, self.masks, self.planes, self.totals, pairs, weights, sums, T, dimage, losses, dots,
            self.image.stride(), self.masks.stride(), self.B, self.K, self.H, self.W, P,
            C=self.C, CHANNELS=CHANNELS, PAIRS=PAIRS, GRADIENTS=gradients, ROWS=ROWS, BLOCK=BLOCK, **self.numbers,
        )  # fmt: skip
        return losses, dots

    def gradients(self, dimage: Tensor | None, dmasks: Tensor | None, dots: Tensor | None) -> None:
        """Of planes dn and dd, and of what subsets left in dimage and dmasks where there are dots."""
        self.filter(products=False)
        if dmasks is not None:
            programs, block = self.blocks(self.B * self.K)
            parts = 1 if dots is None else dots.shape[2]
            _launch(
                masks_gradient, programs,
                self.image, self.planes, self.totals, dots, dmasks,
                self.image.stride(), self.B * self.K, self.K, self.C, self.H, self.W, parts,
                PARTS=triton.next_power_of_2(parts), **block, **self.numbers,
            )  # fmt: skip
        if dimage is not None:
            programs, block = self.blocks(self.B * self.C)
            _launch(
                image_gradient, programs,
                self.masks, self.planes, dimage,
                self.masks.stride(), self.B * self.C, self.K, self.C, self.H, self.W,
                DIRECT=dots is not None, **block, **self.numbers,
            )  # fmt: skip


# ---- Operators ------------------------------------------------------------------------------------------------------


def _iio_loss(image: Tensor, masks: Tensor, *options: float) -> tuple[Tensor, Tensor, Tensor]:
    return _loss(image, masks, None, *options)


def _sampled_iio_loss(
    image: Tensor, masks: Tensor, pairs: Tensor, weights: Tensor, *options: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _loss(image, masks, (pairs.contiguous(), weights.contiguous()), *options)


def _loss(
    image: Tensor, masks: Tensor, listed: tuple[Tensor, Tensor] | None, *options: float
) -> tuple[Tensor, Tensor, Tensor]:
    *inpainter, image_gradient, masks_gradient = options
    call = _Call(image, masks, *inpainter)
    dimage = call.empty(*image.shape) if image_gradient else None
    dmasks = call.empty(*masks.shape) if masks_gradient else None
    if listed is not None:
        call.numbers["INDEX"] = index_type(image, masks, call.planes, listed[0])
    call.filter(products=True)
    if listed is None:
        dots = call.subsets(None, dimage, dmasks)
        losses = dots.sum((1, 2))
    else:
        parts, dots = call.listed_subsets(*listed, dimage, dmasks)
        losses = parts.sum(1)
    if image_gradient or masks_gradient:
        call.gradients(dimage, dmasks, dots)
    dimage, dmasks = (call.empty(0) if x is None else x for x in (dimage, dmasks))
    return losses, dimage, dmasks


def _conditional_entropies(image: Tensor, masks: Tensor, *inpainter: float) -> Tensor:
    call = _Call(image, masks, *inpainter)
    result = call.empty(call.B, call.K, 2 ** (call.K - 1) - 1)
    call.numbers["INDEX"] = index_type(image, masks, call.planes, result)
    call.filter(products=True)
    ROWS, BLOCK = _block(call.B, call.pixels, *SETS)
    _launch(
        entropies, triton.cdiv(call.B, ROWS) * 2 ** (call.K - 2),
        image, masks, call.planes, call.totals, result,
        image.stride(), masks.stride(), call.B, call.H, call.W,
        K=call.K, C=call.C, ROWS=ROWS, BLOCK=BLOCK, **call.numbers,
    )  # fmt: skip
    return result


def _conditional_entropies_backward(grad: Tensor, image: Tensor, masks: Tensor, *options) -> tuple[Tensor, Tensor]:
    *inpainter, image_gradient = options
    call = _Call(image, masks, *inpainter)
    weights = grad.contiguous()
    call.numbers["INDEX"] = index_type(image, masks, call.planes, weights)
    dimage = call.empty(*image.shape) if image_gradient else None
    dmasks = call.empty(*masks.shape)
    call.filter(products=True)
    dots = call.subsets(weights, dimage, dmasks)
    call.gradients(dimage, dmasks, dots)
    return call.empty(0) if dimage is None else dimage, dmasks


def _inpaint(image: Tensor, masks: Tensor, *inpainter: float) -> Tensor:
    call = _Call(image, masks, *inpainter)
    psi = call.empty(call.B, call.K, *image.shape[1:])
    call.filter(products=True)
    programs, block = call.blocks(call.B * call.K)
    sizes = call.B * call.K, call.C, call.pixels
    _launch(predictions, programs, call.planes, psi, *sizes, **block, INDEX=call.numbers["INDEX"])
    return psi


def _inpaint_backward(grad: Tensor, image: Tensor, masks: Tensor, *inpainter: float) -> tuple[Tensor, Tensor]:
    call = _Call(image, masks, *inpainter)
    dimage, dmasks = call.empty(*image.shape), call.empty(*masks.shape)
    call.filter(products=True)
    programs, block = call.blocks(call.B * call.K)
    sizes = call.B * call.K, call.C, call.pixels
    dpsi = grad.contiguous()
    _launch(prediction_gradients, programs, dpsi, call.planes, *sizes, **block, INDEX=call.numbers["INDEX"])
    call.gradients(dimage, dmasks, None)
    return dimage, dmasks


#: The kernels read any storage type.
loss_and_gradient, conditional_entropies, conditional_entropies_backward, inpaint, inpaint_backward = schema.calls(
    "iio_kernels_triton", lambda image, masks: (image, masks)
)
for _implementation in (
    _iio_loss,
    _sampled_iio_loss,
    _conditional_entropies,
    _conditional_entropies_backward,
    _inpaint,
    _inpaint_backward,
):
    torch.library.impl(f"iio_kernels_triton::{_implementation.__name__[1:]}", ("cpu", "cuda"), _implementation)
