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

(Locatello et al. 2020, "Object-Centric Learning with Slot Attention", algorithm 1, reassociated.) Five linear maps are
all that is learnt: what the module has between the inputs and the slots, and between the slots and the gates, is one
map each, and weights and biases of its normalisations belong to the maps behind them; see `Maps`.

`forward` and `backward` are the pair that `IterationsFunction` calls and every backend offers. Between them they keep a
tape, some hundred numbers for each iteration and slot, and nothing of size N. As the reference, autograd differentiates
`forward` itself, any number of times. Arithmetic is at least float32 whatever the storage type and autocast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from iio_kernels.runtime.autograd import without_autocast
from iio_kernels.runtime.numerics import divide


class Maps(NamedTuple):
    """The five linear maps, weights as in `torch.nn.Linear`, all in the dtype of the arithmetic."""

    wp: Tensor  # (Dx, D): slots to what inputs are compared with
    wi: Tensor  # (3 D, Dx): means of inputs to gates
    wj: Tensor  # (3 D, D): slots to gates
    w1: Tensor  # (H, D): the MLP
    w2: Tensor  # (D, H)
    bp: Tensor
    bi: Tensor
    bj: Tensor
    b1: Tensor
    b2: Tensor


def read_by_maps(D: int, Dx: int, H: int) -> list[int]:
    """How wide what each map reads is: ŝ, M, s, ĥ, y."""
    return [D, Dx, D, D, H]


def made_by_maps(D: int, Dx: int, H: int) -> list[int]:
    """How wide what each map makes is: p, i, j, the MLP's hidden layer and its result."""
    return [Dx, 3 * D, 3 * D, H, D]


def on_tape(D: int, Dx: int, H: int) -> list[int]:
    """The widths of a row of the tape: what the maps read, then p, r, z, n, j_n, and S, 1 / deviations of s and h."""
    return [*read_by_maps(D, Dx, H), Dx, D, D, D, D, 1, 1, 1]


def forward(
    x: Tensor, slots: Tensor, maps: Maps, iterations: int, eps: float, norm_eps: float, return_attention: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The slots (B, K, D) after all iterations; the last A (B, K, N) if asked for; the tape (B, T, K, its width).

    x (B, N, Dx) is stored in any dtype; slots (B, K, D), all maps and all results are in that of the arithmetic.
    """
    with without_autocast(x.device):
        x, s, rows = x.to(slots.dtype), slots, []
        for _ in range(iterations):
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
    ds: Tensor, dA: Tensor | None, x: Tensor, tape: Tensor, wp: Tensor, wi: Tensor, wj: Tensor, w1: Tensor, w2: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients to x, in its dtype, and to the initial slots, from those to the last slots and A, if this was used.

    And those to what the maps make (B, T, K, sum of `made_by_maps`), of which `of_maps` makes those to the maps. Only A
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


def of_maps(tape: Tensor, made: Tensor, D: int, Dx: int, H: int) -> tuple[Tensor, ...]:
    """The gradients to the maps, in the order of `Maps`, from the tape and the gradients to what the maps make.

    Three products and sums over all images, iterations and slots at once: torch's own.
    """
    with without_autocast(tape.device):
        read = tape.flatten(0, 2).split(on_tape(D, Dx, H), -1)
        made = made.flatten(0, 2).split(made_by_maps(D, Dx, H), -1)
        weights = [y.mT @ x for x, y in zip(read, made, strict=False)]
        return *weights, *(y.sum(0) for y in made)


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
