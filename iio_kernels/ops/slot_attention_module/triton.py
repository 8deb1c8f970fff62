"""The iterations of Slot Attention in Triton: one launch forward, one backward, a program for each image.

A program goes through all iterations. Its inputs, read anew in each, stay in the second cache, 157 KB of an image of
Tetrominoes. What belongs to the slots passes from one step to the next through the tape, which is kept anyway, so that
weights are read in pieces and registers hold little at a time. Threads then read what others wrote: a barrier stands
between. Backwards, a pass over the inputs for each iteration makes what the iteration before it needs; the gradient to
x is made in a last pass, of all iterations at once, so that it is written once.

All products are in float32, or in TF32 if torch may do so: what counts here is not operations but launches, about
thirty an iteration in PyTorch.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iio_kernels.ops.slot_attention_module import schema
from iio_kernels.ops.slot_attention_module.reference import made_by_maps, on_tape
from iio_kernels.runtime.triton_support import INTERPRETED, index_type, inlined


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


# --- pieces, for one image -----------------------------------------------------------------------------------------
# Slots s, features d of a slot and e of an input. `row` points to where each slot's row of the tape begins, or of what
# the maps make; a column of it follows as an offset.


#: From here on all threads of a program see what each has written. In the interpreter there is but one.
_barrier = (lambda: None) if INTERPRETED else tl.debug_barrier


@inlined
def _load(row, column, d, D, s, m: Meta):
    """The tile (s, d) of rows from `column` on, 0 beyond D features."""
    return tl.load(row[:, None] + (d + column)[None, :], (s < m.K)[:, None] & (d < D)[None, :], other=0.0)


@inlined
def _store(row, column, d, D, s, values, m: Meta):
    tl.store(row[:, None] + (d + column)[None, :], values, (s < m.K)[:, None] & (d < D)[None, :])


@inlined
def _load_number(row, column, s, m: Meta):
    """One column: a number for each slot."""
    return tl.load(row + column, s < m.K, other=0.0)


@inlined
def _product(row, column, number, w, w_in, w_out, d, D, s, m: Meta):
    """sum_i rows[s, column + i] w[i, d] (s, d), of so many numbers i; w's strides lead from i to i and from d to d."""
    total = tl.zeros([m.K_PADDED, d.shape[0]], m.DTYPE)
    for i0 in range(0, number, m.BLOCK_I):
        i = i0 + tl.arange(0, m.BLOCK_I)
        x = _load(row, column, i, number, s, m)
        w_at = w + (i[:, None] * w_in + d[None, :] * w_out)
        w_tile = tl.load(w_at, (i < number)[:, None] & (d < D)[None, :], other=0.0)
        total = tl.dot(x, w_tile, total, input_precision=m.PRECISION, out_dtype=m.DTYPE)
    return total


@inlined
def _bias(b, d, D):
    return tl.load(b + d, d < D, other=0.0)[None, :]


@inlined
def _normalise(x, norm_eps, d, D, m: Meta):
    """x with mean 0 and variance 1 over its D features, and the share of it that this leaves."""
    centred = tl.where((d < D)[None, :], x - (tl.sum(x, 1) / D)[:, None], 0.0)
    share = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + tl.full((), norm_eps, m.DTYPE))
    return centred * share[:, None], share


@inlined
def _through_normalise(dx, x_hat, share, d, D):
    """The gradient to x from that to x̂."""
    mean, slope = tl.sum(dx, 1) / D, tl.sum(dx * x_hat, 1) / D
    return tl.where((d < D)[None, :], (dx - mean[:, None] - x_hat * slope[:, None]) * share[:, None], 0.0)


@inlined
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@inlined
def _tanh(x):
    """For small x the series, as 1 - e^(-2x) then cancels."""
    e, x2 = tl.exp(-2.0 * tl.abs(x)), x * x
    large = (1.0 - e) / (1.0 + e)
    series = x2 * (62 / 2835 + x2 * (-1382 / 155925 + x2 * (21844 / 6081075 + x2 * (-929569 / 638512875))))
    series = x * (1.0 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + series))))
    return tl.where(x2 < 0.015625, series, tl.where(x < 0, -large, large))


@inlined
def _inputs(x, x_row, x_column, n, e, N, m: Meta):
    """The tile x[n, e], 0 beyond the last input."""
    at = x + (n[:, None] * x_row + e[None, :] * x_column)
    return tl.load(at, (n < N)[:, None] & (e < m.DX)[None, :], other=0.0).to(m.DTYPE)


@inlined
def _scores(x, p, m: Meta):
    """<x[n], p[s]> (n, s)."""
    return tl.dot(x, tl.trans(p), input_precision=m.PRECISION, out_dtype=m.DTYPE)


@inlined
def _mixtures(a, p, m: Meta):
    """sum_s a[n, s] p[s, e] (n, e)."""
    if m.K_PADDED >= 16:
        return tl.dot(a, p, input_precision=m.PRECISION, out_dtype=m.DTYPE)
    # tl.dot adds up no fewer than 16 products, here most of them with 0.
    return tl.sum(tl.trans(a)[:, :, None] * p[:, None, :], 0)


@inlined
def _attention(x, p, s, m: Meta):
    """A (n, s)."""
    L = tl.where((s < m.K)[None, :], _scores(x, p, m), float("-inf"))
    A = tl.exp(L - tl.max(L, 1)[:, None])
    return A * (1.0 / tl.sum(A, 1))[:, None]


@inlined
def _attention_gradient(x, A, dM, dM_M, dA_in, n, s, N, taken, m: Meta):
    """dL (n, s), with dA = <dM[s], x[n] - M[s]> and where `taken` what comes to A itself; dM is divided by S."""
    dA = _scores(x, dM, m) - dM_M[None, :]
    if dA_in is not None:  # noqa: SIM102
        if taken:
            at = dA_in.ptr + (s[None, :] * dA_in.row + n[:, None] * dA_in.column)
            dA += tl.load(at, (n < N)[:, None] & (s < m.K)[None, :], other=0.0)
    dL = A * (dA - tl.sum(A * dA, 1)[:, None])
    return tl.where((n < N)[:, None] & (s < m.K)[None, :], dL, 0.0)


class Strided(NamedTuple):
    """A tensor x[b, row, column] as a kernel takes it: its first element, and its strides in elements."""

    ptr: Any
    b: Any
    row: Any
    column: Any


# --- kernels ------------------------------------------------------------------------------------------------------

#: These change from call to call: kernels are not compiled anew when they happen to be 1 or multiples of 16.
varying = triton.jit(do_not_specialize=("N", "T"))


@varying
def _forward(
    x, slots, wp, wi, wj, w1, w2, bp, bi, bj, b1, b2, last_slots, A_out, tape,
    N, T, eps: tl.float64, norm_eps: tl.float64, m: Meta,
):  # fmt: skip
    """All tensors but x, `Strided`, are contiguous.

    x           (B, N, Dx) in any dtype
    slots       (B, K, D)
    wp to b2    the maps of reference.py
    last_slots  (B, K, D)                      out
    A_out       (B, K, N), or None             out
    tape        (B, T, K, see reference.py)    out
    """
    b = tl.program_id(0).to(tl.int64)
    s, e = tl.arange(0, m.K_PADDED).to(m.INDEX), tl.arange(0, m.DX_PADDED).to(m.INDEX)
    d, u = tl.arange(0, m.D_PADDED), tl.arange(0, m.H_PADDED)

    inputs = x.ptr + b * x.b
    last = last_slots + (b * m.K + s) * m.D
    row = tape + (b * T * m.K + s) * m.WIDTH
    _store(row, m.S_AT, d, m.D, s, _load(slots + (b * m.K + s) * m.D, 0, d, m.D, s, m), m)
    for t in range(T):
        _barrier()
        s_hat, share = _normalise(_load(row, m.S_AT, d, m.D, s, m), norm_eps, d, m.D, m)
        _store(row, 0, d, m.D, s, s_hat, m)
        tl.store(row + (m.SHARES_AT + 1), share, s < m.K)
        _barrier()
        p = _product(row, 0, m.D, wp, 1, m.D, e, m.DX, s, m) + _bias(bp, e, m.DX)
        _store(row, m.P_AT, e, m.DX, s, p, m)

        M = tl.zeros([m.K_PADDED, m.DX_PADDED], m.DTYPE)
        S = tl.zeros([m.K_PADDED], m.DTYPE)
        for n0 in range(0, N, m.BLOCK_N):
            n = (n0 + tl.arange(0, m.BLOCK_N)).to(m.INDEX)
            x_tile = _inputs(inputs, x.row, x.column, n, e, N, m)
            A = _attention(x_tile, p, s, m)
            if A_out is not None:  # noqa: SIM102
                if t == T - 1:
                    at = A_out + b * m.K * N + (s[None, :] * N + n[:, None])
                    tl.store(at, A, (n < N)[:, None] & (s < m.K)[None, :])
            W = tl.where((n < N)[:, None], A + tl.full((), eps, m.DTYPE), 0.0)
            S += tl.sum(W, 0)
            M = tl.dot(tl.trans(W), x_tile, M, input_precision=m.PRECISION, out_dtype=m.DTYPE)
        M *= tl.where(S == 0, 0.0, 1.0 / tl.where(S == 0, 1.0, S))[:, None]
        _store(row, m.M_AT, e, m.DX, s, M, m)
        tl.store(row + m.SHARES_AT, S, s < m.K)
        _barrier()

        # Each gate's weights are D rows of wi and wj.
        r = _product(row, m.M_AT, m.DX, wi, 1, m.DX, d, m.D, s, m) + _bias(bi, d, m.D)
        r = _sigmoid(r + _product(row, m.S_AT, m.D, wj, 1, m.D, d, m.D, s, m) + _bias(bj, d, m.D))
        _store(row, m.R_AT, d, m.D, s, r, m)
        j_n = _product(row, m.S_AT, m.D, wj + 2 * m.D * m.D, 1, m.D, d, m.D, s, m) + _bias(bj + 2 * m.D, d, m.D)
        _store(row, m.R_AT + 3 * m.D, d, m.D, s, j_n, m)
        i_n = _product(row, m.M_AT, m.DX, wi + 2 * m.D * m.DX, 1, m.DX, d, m.D, s, m) + _bias(bi + 2 * m.D, d, m.D)
        new = _tanh(i_n + r * j_n)
        _store(row, m.R_AT + 2 * m.D, d, m.D, s, new, m)
        z = _product(row, m.M_AT, m.DX, wi + m.D * m.DX, 1, m.DX, d, m.D, s, m) + _bias(bi + m.D, d, m.D)
        z = _sigmoid(z + _product(row, m.S_AT, m.D, wj + m.D * m.D, 1, m.D, d, m.D, s, m) + _bias(bj + m.D, d, m.D))
        _store(row, m.R_AT + m.D, d, m.D, s, z, m)
        h = tl.where((d < m.D)[None, :], (1.0 - z) * new + z * _load(row, m.S_AT, d, m.D, s, m), 0.0)
        h_hat, share = _normalise(h, norm_eps, d, m.D, m)
        _store(row, m.H_AT, d, m.D, s, h_hat, m)
        tl.store(row + (m.SHARES_AT + 2), share, s < m.K)
        _barrier()
        y = _product(row, m.H_AT, m.D, w1, 1, m.D, u, m.H, s, m) + _bias(b1, u, m.H)
        _store(row, m.Y_AT, u, m.H, s, tl.where(y < 0, 0.0, y), m)
        _barrier()
        h += _product(row, m.Y_AT, m.H, w2, 1, m.H, d, m.D, s, m) + _bias(b2, d, m.D)
        row += m.K * m.WIDTH
        if t == T - 1:
            _store(last, 0, d, m.D, s, h, m)
        else:
            _store(row, m.S_AT, d, m.D, s, h, m)


@varying
def _backward(
    d_last_slots, dA, x, tape, wp, wi, wj, w1, w2, dx, d_slots, made, dM_all,
    N, T, eps: tl.float64, m: Meta,
):  # fmt: skip
    """x, dA and dx are `Strided`, the others contiguous.

    d_last_slots  (B, K, D)
    dA            (B, K, N), or None
    x, tape       as in the forward kernel
    dx            (B, N, Dx) in x's dtype             out
    d_slots       (B, K, D)                           out
    made          (B, T, K, see reference.py)         out
    dM_all        (B, T, K, Dx): dM / S, on the way
    """
    b = tl.program_id(0).to(tl.int64)
    s, e = tl.arange(0, m.K_PADDED).to(m.INDEX), tl.arange(0, m.DX_PADDED).to(m.INDEX)
    d, u = tl.arange(0, m.D_PADDED), tl.arange(0, m.H_PADDED)

    inputs = x.ptr + b * x.b
    dA_in = None if dA is None else Strided(dA.ptr + b * dA.b, 0, dA.row, dA.column)
    first = d_slots + (b * m.K + s) * m.D
    row = tape + ((b * T + T - 1) * m.K + s) * m.WIDTH
    out = made + ((b * T + T - 1) * m.K + s) * m.MADE
    dM_row = dM_all + ((b * T + T - 1) * m.K + s) * m.DX
    _store(out, m.DS_AT, d, m.D, s, _load(d_last_slots + (b * m.K + s) * m.D, 0, d, m.D, s, m), m)
    for back in range(T):
        _barrier()
        dy = _product(out, m.DS_AT, m.D, w2, m.H, 1, u, m.H, s, m)
        dy = tl.where(_load(row, m.Y_AT, u, m.H, s, m) <= 0, 0.0, dy)
        _store(out, m.DY_AT, u, m.H, s, dy, m)
        _barrier()
        dh = _product(out, m.DY_AT, m.H, w1, m.D, 1, d, m.D, s, m)
        dh = _through_normalise(dh, _load(row, m.H_AT, d, m.D, s, m), _load_number(row, m.SHARES_AT + 2, s, m), d, m.D)
        dh += _load(out, m.DS_AT, d, m.D, s, m)

        r, z = _load(row, m.R_AT, d, m.D, s, m), _load(row, m.R_AT + m.D, d, m.D, s, m)
        new = _load(row, m.R_AT + 2 * m.D, d, m.D, s, m)
        dn = dh * (1.0 - z) * (1.0 - new * new)
        dz = dh * (_load(row, m.S_AT, d, m.D, s, m) - new) * z * (1.0 - z)
        dr = dn * _load(row, m.R_AT + 3 * m.D, d, m.D, s, m) * r * (1.0 - r)
        _store(out, m.DI_AT, d, m.D, s, dr, m)
        _store(out, m.DI_AT + m.D, d, m.D, s, dz, m)
        _store(out, m.DI_AT + 2 * m.D, d, m.D, s, dn, m)
        _store(out, m.DJ_AT, d, m.D, s, dr, m)
        _store(out, m.DJ_AT + m.D, d, m.D, s, dz, m)
        _store(out, m.DJ_AT + 2 * m.D, d, m.D, s, dn * r, m)
        _store(first, 0, d, m.D, s, dh * z, m)  # for the end of the iteration
        _barrier()

        S = _load_number(row, m.SHARES_AT, s, m)
        dM = _product(out, m.DI_AT, 3 * m.D, wi, m.DX, 1, e, m.DX, s, m)
        dM *= tl.where(S == 0, 0.0, 1.0 / tl.where(S == 0, 1.0, S))[:, None]
        _store(dM_row, 0, e, m.DX, s, dM, m)
        dM_M = tl.sum(dM * _load(row, m.M_AT, e, m.DX, s, m), 1)
        p = _load(row, m.P_AT, e, m.DX, s, m)
        dp = tl.zeros([m.K_PADDED, m.DX_PADDED], m.DTYPE)
        for n0 in range(0, N, m.BLOCK_N):
            n = (n0 + tl.arange(0, m.BLOCK_N)).to(m.INDEX)
            x_tile = _inputs(inputs, x.row, x.column, n, e, N, m)
            A = _attention(x_tile, p, s, m)
            dL = _attention_gradient(x_tile, A, dM, dM_M, dA_in, n, s, N, back == 0, m)
            dp = tl.dot(tl.trans(dL), x_tile, dp, input_precision=m.PRECISION, out_dtype=m.DTYPE)
        _store(out, 0, e, m.DX, s, dp, m)
        _barrier()

        ds = _product(out, 0, m.DX, wp, m.D, 1, d, m.D, s, m)
        ds = _through_normalise(ds, _load(row, 0, d, m.D, s, m), _load_number(row, m.SHARES_AT + 1, s, m), d, m.D)
        ds += _product(out, m.DJ_AT, 3 * m.D, wj, m.D, 1, d, m.D, s, m) + _load(first, 0, d, m.D, s, m)
        row, out, dM_row = row - m.K * m.WIDTH, out - m.K * m.MADE, dM_row - m.K * m.DX
        if back == T - 1:
            _store(first, 0, d, m.D, s, ds, m)
        else:
            _store(out, m.DS_AT, d, m.D, s, ds, m)

    _barrier()
    row, dM_row = row + m.K * m.WIDTH, dM_row + m.K * m.DX
    for n0 in range(0, N, m.BLOCK_N):
        n = (n0 + tl.arange(0, m.BLOCK_N)).to(m.INDEX)
        x_tile = _inputs(inputs, x.row, x.column, n, e, N, m)
        dx_tile = tl.zeros([m.BLOCK_N, m.DX_PADDED], m.DTYPE)
        for t in range(T):
            row_t = row + t * m.K * m.WIDTH
            p, dM = _load(row_t, m.P_AT, e, m.DX, s, m), _load(dM_row + t * m.K * m.DX, 0, e, m.DX, s, m)
            dM_M = tl.sum(dM * _load(row_t, m.M_AT, e, m.DX, s, m), 1)
            A = _attention(x_tile, p, s, m)
            dL = _attention_gradient(x_tile, A, dM, dM_M, dA_in, n, s, N, t == T - 1, m)
            dx_tile += _mixtures(dL, p, m) + _mixtures(A + tl.full((), eps, m.DTYPE), dM, m)
        at = dx.ptr + b * dx.b + (n[:, None] * dx.row + e[None, :])
        tl.store(at, dx_tile.to(dx.ptr.dtype.element_ty), (n < N)[:, None] & (e < m.DX)[None, :])


# --- launches -----------------------------------------------------------------------------------------------------


def _iterations_forward(
    x: Tensor, slots: Tensor, weights: list[Tensor], biases: list[Tensor], iterations: int, eps: float,
    norm_eps: float, return_attention: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    last, A, tape = schema.new_results(x, slots, weights, biases, iterations, eps, norm_eps, return_attention)
    maps = [w.contiguous() for w in (*weights, *biases)]
    tensors = Strided(x, *x.stride()), slots.contiguous(), *maps, last, A if return_attention else None, tape
    _launch(_forward, x, slots, weights, *tensors, x.shape[1], iterations, eps, norm_eps)
    return last, A, tape


def _iterations_backward(
    d_slots: Tensor, d_attention: Tensor | None, x: Tensor, tape: Tensor, weights: list[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dx, d_first, made = schema.new_gradients(d_slots, d_attention, x, tape, weights, eps)
    dA = None if d_attention is None else Strided(d_attention, *d_attention.stride())
    dM_all = tape.new_empty((*tape.shape[:3], x.shape[2]))
    inputs = d_slots.contiguous(), dA, Strided(x, *x.stride()), tape.contiguous(), *(w.contiguous() for w in weights)
    results = Strided(dx, *dx.stride()), d_first, made, dM_all
    _launch(_backward, x, d_slots, weights, *inputs, *results, x.shape[1], tape.shape[1], eps)
    return dx, d_first, made


#: Inputs in a tile, and the warps that work on it, such that nothing spills from registers: forward with up to 8 slots
#: of up to 128 features, and else.
SMALL, LARGE = (32, 4), (16, 8)


def _launch(kernel: Any, x: Tensor, slots: Tensor, weights: list[Tensor], *arguments: Any) -> None:
    """Run a program for each image, on the tensors' device, which need not be the current one."""
    (B, K, D), Dx, H = slots.shape, x.shape[2], weights[3].shape[0]
    if B == 0:
        return
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and not torch.version.hip
    # Tensor cores multiply 16 slots at a time. Without them tiles need fewer.
    K_PADDED = max(triton.next_power_of_2(K), 16 if tf32 else 4)
    D_PADDED, DX_PADDED, H_PADDED = (max(16, triton.next_power_of_2(width)) for width in (D, Dx, H))
    small = kernel is _forward and K_PADDED <= 8 and max(D_PADDED, H_PADDED) <= 128
    BLOCK_N, num_warps = SMALL if small else LARGE
    _, M, S, H_hat, y_at, p, r, _, _, _, shares, _, _, width = accumulate(on_tape(D, Dx, H), initial=0)
    _, di, dj, dy, ds, made = accumulate(made_by_maps(D, Dx, H), initial=0)
    tensors = [y.ptr if isinstance(y, Strided) else y for y in arguments]
    meta = Meta(
        K, D, Dx, H, K_PADDED, D_PADDED, DX_PADDED, H_PADDED,
        BLOCK_N=BLOCK_N, BLOCK_I=16,
        DTYPE=tl.float64 if slots.dtype == torch.float64 else tl.float32, PRECISION="tf32" if tf32 else "ieee",
        INDEX=index_type(*(y for y in tensors if isinstance(y, Tensor) and y.dim() == 3)),
        M_AT=M, S_AT=S, H_AT=H_hat, Y_AT=y_at, P_AT=p, R_AT=r, SHARES_AT=shares, WIDTH=width,
        DI_AT=di, DJ_AT=dj, DY_AT=dy, DS_AT=ds, MADE=made,
    )  # fmt: skip
    with torch.cuda.device_of(x):
        kernel[(B,)](
            *arguments,
            Meta(*map(tl.constexpr, meta)),
            num_warps=num_warps // 2 if torch.version.hip else num_warps,  # whose warps have 64 threads
            num_stages=1,  # no load runs ahead of a barrier
            enable_fp_fusion=True,
        )


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as it is stored; but what meets float64 becomes one."""
    return x.to(dtype) if dtype == torch.float64 else x


forward, backward = schema.calls("iio_kernels_triton", _stored)
torch.library.impl("iio_kernels_triton::iterations_forward", ("cpu", "cuda"), _iterations_forward)
torch.library.impl("iio_kernels_triton::iterations_backward", ("cpu", "cuda"), _iterations_backward)
