"""The iterations of Slot Attention in plain PyTorch: the formula itself, and its gradient written out.

With x̂ for x normalised over its features, without weight or bias, each of T iterations takes the slots s to s':

    p       = Wp ŝ + bp
    L[n, s] = <x[n], p[s]>
    A[n, :] = softmax over the slots s of L[n, :]
    S[s]    = sum_n (A[n, s] + eps)
    M[s]    = sum_n (A[n, s] + eps) x[n] / S[s]
    i, j    = Wi M + bi,  Wj s + bj                    each of three parts: r, z, n
    r, z    = sigmoid(i_r + j_r),  sigmoid(i_z + j_z)
    n       = tanh(i_n + r j_n)
    h       = (1 - z) n + z s
    y       = relu(W1 ĥ + b1)
    s'      = h + W2 y + b2

(Locatello et al. 2020, "Object-Centric Learning with Slot Attention", algorithm 1, reassociated.) The five linear maps
are all that is learnt: see `Maps` in common.py.

`forward` and `backward` are the pair that `IterationsFunction` calls and every backend offers. Between them they keep a
tape, some hundred numbers for each iteration and slot, and nothing of size N. As the reference, autograd differentiates
`forward` itself, any number of times. Arithmetic is at least float32 whatever the storage type and autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iio_kernels.ops.slot_attention_module.common import Operands, Options, on_tape
from iio_kernels.runtime.autograd import without_autocast
from iio_kernels.runtime.numerics import divide


def forward(operands: Operands, options: Options, return_attention: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """The slots (B, K, D) after all iterations; the last A (B, K, N) if asked for; the tape (B, T, K, its width).

    All results are in the dtype of the arithmetic.
    """
    maps, eps, norm_eps = operands.maps, options.eps, options.norm_eps
    with without_autocast(operands.x.device):
        x, s, rows = operands.x.to(operands.slots.dtype), operands.slots, []
        for _ in range(options.iterations):
            s_hat, s_share = _normalise(s, norm_eps)
            p = _linear(s_hat, maps.wp) + maps.bp
            A = (x @ p.mT).softmax(-1)
            W = A + eps
            S = W.sum(-2).unsqueeze(-1)
            M = divide(W.mT @ x, S)
            i_r, i_z, i_n = (_linear(M, maps.wi) + maps.bi).chunk(3, -1)
            j_r, j_z, j_n = (_linear(s, maps.wj) + maps.bj).chunk(3, -1)
            r, z = (i_r + j_r).sigmoid(), (i_z + j_z).sigmoid()
            n = (i_n + r * j_n).tanh()
            h = (1 - z) * n + z * s
            h_hat, h_share = _normalise(h, norm_eps)
            y = (_linear(h_hat, maps.w1) + maps.b1).relu()
            rows.append(torch.cat([s_hat, M, s, h_hat, y, p, r, z, n, j_n, S, s_share, h_share], -1).detach())
            s = h + _linear(y, maps.w2) + maps.b2
        return s, A.mT.clone() if return_attention else None, torch.stack(rows, 1)


def backward(
    ds: Tensor, dA: Tensor | None, operands: Operands, tape: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to x, in its dtype, and to the initial slots, from those to the last slots and A, if this was used.

    And those to what the maps make (B, T, K, sum of `made_by_maps`), of which
    `gradients_to_maps` makes those to the maps. Only A
    is recomputed. Backwards through the iterations:

        dy             = W2^T ds'  where y > 0, else 0
        dh             = ds' + through ĥ of W1^T dy
        dn, dz         = (1 - n^2) (1 - z) dh,  z (1 - z) (s - n) dh
        dr             = r (1 - r) j_n dn
        di, dj         = (dr, dz, dn),  (dr, dz, r dn)
        dM             = Wi^T di
        dA[n, s]       = <dM[s], x[n] - M[s]> / S[s]   (+ the gradient that arrives at A itself)
        dL[n, s]       = A[n, s] * (dA[n, s] - sum_t A[n, t] dA[n, t])
        dp[s]          = sum_n dL[n, s] x[n]
        dx[n]         += sum_s dL[n, s] p[s] + (A[n, s] + eps) / S[s] dM[s]
        ds             = z dh + Wj^T dj + through ŝ of Wp^T dp
    """
    x, (wp, wi, wj, w1, w2, *_), eps = operands.x, operands.maps, options.eps
    T, D, Dx, H = tape.shape[1], wj.shape[1], x.shape[2], len(w1)
    with without_autocast(x.device):
        inputs, made = x.to(tape.dtype), []
        dx = torch.zeros_like(inputs)
        for t in reversed(range(T)):
            s_hat, M, s, h_hat, y, p, r, z, n, j_n, S, s_share, h_share = tape[:, t].split(on_tape(D, Dx, H), -1)
            dy = (ds @ w2).masked_fill(y <= 0, 0)
            dh = ds + _through_normalise(dy @ w1, h_hat, h_share)
            dn = dh * (1 - z) * (1 - n * n)
            dz = dh * (s - n) * z * (1 - z)
            dr = dn * j_n * r * (1 - r)
            di, dj = torch.cat([dr, dz, dn], -1), torch.cat([dr, dz, r * dn], -1)
            dM = divide(di @ wi, S)  # from here on with 1 / S
            A = (inputs @ p.mT).softmax(-1)
            through_M = inputs @ dM.mT - (M * dM).sum(-1).unsqueeze(-2)
            through_A = through_M if dA is None or t < T - 1 else through_M + dA.mT
            dL = A * (through_A - (A * through_A).sum(-1, keepdim=True))
            dx = dx + dL @ p + (A + eps) @ dM
            dp = dL.mT @ inputs
            made.append(torch.cat([dp, di, dj, dy, ds], -1))
            ds = z * dh + dj @ wj + _through_normalise(dp @ wp, s_hat, s_share)
        return dx.to(x.dtype), ds, torch.stack(made[::-1], 1)


def _linear(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.mT


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x with mean 0 and variance 1 over its features, and the share of it that this leaves, 1 / its deviation."""
    x = x - x.mean(-1, keepdim=True)
    share = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * share, share


def _through_normalise(d_x_hat: Tensor, x_hat: Tensor, share: Tensor) -> Tensor:
    """The gradient to x from that to `_normalise`'s result."""
    mean, slope = d_x_hat.mean(-1, keepdim=True), (d_x_hat * x_hat).mean(-1, keepdim=True)
    return (d_x_hat - mean - x_hat * slope) * share
