"""What the kernels of inpainting are made of: tuples of tensors, known at compile time; numbers; blocks of pixels."""

from __future__ import annotations

import triton
import triton.language as tl

from iio_kernels.ops.iio_loss import common
from iio_kernels.runtime.triton_support import inlined

NEGLIGIBLE = tl.constexpr(common.NEGLIGIBLE)

# ---- Tuples of tensors -----------------------------------------------------------------------------------------------


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


# ---- Numbers and blocks ----------------------------------------------------------------------------------------------


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
