"""The Triton kernels of the Slot Attention module: all iterations of one image forward, and backward.

A program goes through all iterations. Its inputs, read anew in each, stay in the second cache, 157 KB of an image of
Tetrominoes. What belongs to the slots passes from one step to the next through the tape, which is kept anyway, so that
weights are read in pieces and registers hold little at a time. Threads then read what others wrote: a barrier stands
between. Backwards, a pass over the inputs for each iteration makes what the iteration before it needs; the gradient to
x is made in a last pass, of all iterations at once, so that it is written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iio_kernels.ops.slot_attention_module.triton_pieces import (
    Meta,
    Strided,
    attention,
    attention_gradient,
    barrier,
    bias,
    load,
    load_inputs,
    load_number,
    mixtures,
    normalise,
    product,
    sigmoid,
    store,
    tanh,
    through_normalise,
)

#: These change from call to call: kernels are not compiled anew when they happen to be 1 or multiples of 16.
varying = triton.jit(do_not_specialize=("N", "T"))


@varying
def forward_kernel(
    x, slots, wp, wi, wj, w1, w2, bp, bi, bj, b1, b2, last_slots, A_out, tape,
    N, T, eps: tl.float64, norm_eps: tl.float64, m: Meta,
):  # fmt: skip
    """All tensors but x, `Strided`, are contiguous.

    x           (B, N, Dx) in any dtype
    slots       (B, K, D)
    wp to b2    `Maps` of common.py
    last_slots  (B, K, D)                      out
    A_out       (B, K, N), or None             out
    tape        (B, T, K, see common.py)    out
    """
    b = tl.program_id(0).to(tl.int64)
    s, e = tl.arange(0, m.K_PADDED).to(m.INDEX), tl.arange(0, m.DX_PADDED).to(m.INDEX)
    d, u = tl.arange(0, m.D_PADDED), tl.arange(0, m.H_PADDED)

    inputs = x.ptr + b * x.b
    last = last_slots + (b * m.K + s) * m.D
    row = tape + (b * T * m.K + s) * m.WIDTH
    store(row, m.S_AT, d, m.D, s, load(slots + (b * m.K + s) * m.D, 0, d, m.D, s, m), m)
    for t in range(T):
        barrier()
        s_hat, share = normalise(load(row, m.S_AT, d, m.D, s, m), norm_eps, d, m.D, m)
        store(row, 0, d, m.D, s, s_hat, m)
        tl.store(row + (m.SHARES_AT + 1), share, s < m.K)
        barrier()
        p = product(row, 0, m.D, wp, 1, m.D, e, m.DX, s, m) + bias(bp, e, m.DX)
        store(row, m.P_AT, e, m.DX, s, p, m)

        M = tl.zeros([m.K_PADDED, m.DX_PADDED], m.DTYPE)
        S = tl.zeros([m.K_PADDED], m.DTYPE)
        for n0 in range(0, N, m.BLOCK_N):
            n = (n0 + tl.arange(0, m.BLOCK_N)).to(m.INDEX)
            x_tile = load_inputs(inputs, x.row, x.column, n, e, N, m)
            A = attention(x_tile, p, s, m)
            if A_out is not None:  # noqa: SIM102
                if t == T - 1:
                    at = A_out + b * m.K * N + (s[None, :] * N + n[:, None])
                    tl.store(at, A, (n < N)[:, None] & (s < m.K)[None, :])
            W = tl.where((n < N)[:, None], A + tl.full((), eps, m.DTYPE), 0.0)
            S += tl.sum(W, 0)
            M = tl.dot(tl.trans(W), x_tile, M, input_precision=m.PRECISION, out_dtype=m.DTYPE)
        M *= tl.where(S == 0, 0.0, 1.0 / tl.where(S == 0, 1.0, S))[:, None]
        store(row, m.M_AT, e, m.DX, s, M, m)
        tl.store(row + m.SHARES_AT, S, s < m.K)
        barrier()

        # Each gate's weights are D rows of wi and wj.
        r = product(row, m.M_AT, m.DX, wi, 1, m.DX, d, m.D, s, m) + bias(bi, d, m.D)
        r = sigmoid(r + product(row, m.S_AT, m.D, wj, 1, m.D, d, m.D, s, m) + bias(bj, d, m.D))
        store(row, m.R_AT, d, m.D, s, r, m)
        j_n = product(row, m.S_AT, m.D, wj + 2 * m.D * m.D, 1, m.D, d, m.D, s, m) + bias(bj + 2 * m.D, d, m.D)
        store(row, m.R_AT + 3 * m.D, d, m.D, s, j_n, m)
        i_n = product(row, m.M_AT, m.DX, wi + 2 * m.D * m.DX, 1, m.DX, d, m.D, s, m) + bias(bi + 2 * m.D, d, m.D)
        new = tanh(i_n + r * j_n)
        store(row, m.R_AT + 2 * m.D, d, m.D, s, new, m)
        z = product(row, m.M_AT, m.DX, wi + m.D * m.DX, 1, m.DX, d, m.D, s, m) + bias(bi + m.D, d, m.D)
        z = sigmoid(z + product(row, m.S_AT, m.D, wj + m.D * m.D, 1, m.D, d, m.D, s, m) + bias(bj + m.D, d, m.D))
        store(row, m.R_AT + m.D, d, m.D, s, z, m)
        h = tl.where((d < m.D)[None, :], (1.0 - z) * new + z * load(row, m.S_AT, d, m.D, s, m), 0.0)
        h_hat, share = normalise(h, norm_eps, d, m.D, m)
        store(row, m.H_AT, d, m.D, s, h_hat, m)
        tl.store(row + (m.SHARES_AT + 2), share, s < m.K)
        barrier()
        y = product(row, m.H_AT, m.D, w1, 1, m.D, u, m.H, s, m) + bias(b1, u, m.H)
        store(row, m.Y_AT, u, m.H, s, tl.where(y < 0, 0.0, y), m)
        barrier()
        h += product(row, m.Y_AT, m.H, w2, 1, m.H, d, m.D, s, m) + bias(b2, d, m.D)
        row += m.K * m.WIDTH
        if t == T - 1:
            store(last, 0, d, m.D, s, h, m)
        else:
            store(row, m.S_AT, d, m.D, s, h, m)


@varying
def backward_kernel(
    d_last_slots, dA, x, tape, wp, wi, wj, w1, w2, dx, d_slots, made, dM_all,
    N, T, eps: tl.float64, m: Meta,
):  # fmt: skip
    """x, dA and dx are `Strided`, the others contiguous.

    d_last_slots  (B, K, D)
    dA            (B, K, N), or None
    x, tape       as in the forward kernel
    dx            (B, N, Dx) in x's dtype             out
    d_slots       (B, K, D)                           out
    made          (B, T, K, see common.py)         out
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
    store(out, m.DS_AT, d, m.D, s, load(d_last_slots + (b * m.K + s) * m.D, 0, d, m.D, s, m), m)
    for back in range(T):
        barrier()
        dy = product(out, m.DS_AT, m.D, w2, m.H, 1, u, m.H, s, m)
        dy = tl.where(load(row, m.Y_AT, u, m.H, s, m) <= 0, 0.0, dy)
        store(out, m.DY_AT, u, m.H, s, dy, m)
        barrier()
        dh = product(out, m.DY_AT, m.H, w1, m.D, 1, d, m.D, s, m)
        dh = through_normalise(dh, load(row, m.H_AT, d, m.D, s, m), load_number(row, m.SHARES_AT + 2, s, m), d, m.D)
        dh += load(out, m.DS_AT, d, m.D, s, m)

        r, z = load(row, m.R_AT, d, m.D, s, m), load(row, m.R_AT + m.D, d, m.D, s, m)
        new = load(row, m.R_AT + 2 * m.D, d, m.D, s, m)
        dn = dh * (1.0 - z) * (1.0 - new * new)
        dz = dh * (load(row, m.S_AT, d, m.D, s, m) - new) * z * (1.0 - z)
        dr = dn * load(row, m.R_AT + 3 * m.D, d, m.D, s, m) * r * (1.0 - r)
        store(out, m.DI_AT, d, m.D, s, dr, m)
        store(out, m.DI_AT + m.D, d, m.D, s, dz, m)
        store(out, m.DI_AT + 2 * m.D, d, m.D, s, dn, m)
        store(out, m.DJ_AT, d, m.D, s, dr, m)
        store(out, m.DJ_AT + m.D, d, m.D, s, dz, m)
        store(out, m.DJ_AT + 2 * m.D, d, m.D, s, dn * r, m)
        store(first, 0, d, m.D, s, dh * z, m)  # for the end of the iteration
        barrier()

        S = load_number(row, m.SHARES_AT, s, m)
        dM = product(out, m.DI_AT, 3 * m.D, wi, m.DX, 1, e, m.DX, s, m)
        dM *= tl.where(S == 0, 0.0, 1.0 / tl.where(S == 0, 1.0, S))[:, None]
        store(dM_row, 0, e, m.DX, s, dM, m)
        dM_M = tl.sum(dM * load(row, m.M_AT, e, m.DX, s, m), 1)
        p = load(row, m.P_AT, e, m.DX, s, m)
        dp = tl.zeros([m.K_PADDED, m.DX_PADDED], m.DTYPE)
        for n0 in range(0, N, m.BLOCK_N):
            n = (n0 + tl.arange(0, m.BLOCK_N)).to(m.INDEX)
            x_tile = load_inputs(inputs, x.row, x.column, n, e, N, m)
            A = attention(x_tile, p, s, m)
            dL = attention_gradient(x_tile, A, dM, dM_M, dA_in, n, s, N, back == 0, m)
            dp = tl.dot(tl.trans(dL), x_tile, dp, input_precision=m.PRECISION, out_dtype=m.DTYPE)
        store(out, 0, e, m.DX, s, dp, m)
        barrier()

        ds = product(out, 0, m.DX, wp, m.D, 1, d, m.D, s, m)
        ds = through_normalise(ds, load(row, 0, d, m.D, s, m), load_number(row, m.SHARES_AT + 1, s, m), d, m.D)
        ds += product(out, m.DJ_AT, 3 * m.D, wj, m.D, 1, d, m.D, s, m) + load(first, 0, d, m.D, s, m)
        row, out, dM_row = row - m.K * m.WIDTH, out - m.K * m.MADE, dM_row - m.K * m.DX
        if back == T - 1:
            store(first, 0, d, m.D, s, ds, m)
        else:
            store(out, m.DS_AT, d, m.D, s, ds, m)

    barrier()
    row, dM_row = row + m.K * m.WIDTH, dM_row + m.K * m.DX
    for n0 in range(0, N, m.BLOCK_N):
        n = (n0 + tl.arange(0, m.BLOCK_N)).to(m.INDEX)
        x_tile = load_inputs(inputs, x.row, x.column, n, e, N, m)
        dx_tile = tl.zeros([m.BLOCK_N, m.DX_PADDED], m.DTYPE)
        for t in range(T):
            row_t = row + t * m.K * m.WIDTH
            p, dM = load(row_t, m.P_AT, e, m.DX, s, m), load(dM_row + t * m.K * m.DX, 0, e, m.DX, s, m)
            dM_M = tl.sum(dM * load(row_t, m.M_AT, e, m.DX, s, m), 1)
            A = attention(x_tile, p, s, m)
            dL = attention_gradient(x_tile, A, dM, dM_M, dA_in, n, s, N, t == T - 1, m)
            dx_tile += mixtures(dL, p, m) + mixtures(A + tl.full((), eps, m.DTYPE), dM, m)
        at = dx.ptr + b * dx.b + (n[:, None] * dx.row + e[None, :])
        tl.store(at, dx_tile.to(dx.ptr.dtype.element_ty), (n < N)[:, None] & (e < m.DX)[None, :])
