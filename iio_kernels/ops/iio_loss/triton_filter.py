"""The Gaussian filter of inpainting in Triton: products, their totals and all passes, a plane a program.

It is repeated passes of the taps with zeros outside, plus eps times the plane's total.
"""

from __future__ import annotations

import triton.language as tl

from iio_kernels.ops.iio_loss.triton_tuples import copies, plus, read_mask, stacked, unstacked, varying
from iio_kernels.runtime.triton_support import inlined


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
