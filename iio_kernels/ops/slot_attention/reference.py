"""Slot attention in plain PyTorch: the formula itself, and its gradient written out.

    L[n, s] = scale * <k[n], q[s]>
    A[n, :] = softmax over the slots s of L[n, :]
    W[n, s] = (A[n, s] + eps) / S[s],    S[s] = sum_n (A[n, s] + eps)
    U[s]    = sum_n W[n, s] v[n]

(Locatello et al. 2020, "Object-Centric Learning with Slot Attention", eqs. 1 to 3 and algorithm 1.)

`slot_attention` is what every backend is tested against; autograd differentiates it, any number of times.
`forward` and `backward` are the pair that `SlotAttentionFunction` calls and every backend offers: between them
they keep nothing of size N * K. Arithmetic is at least float32 whatever the storage type and autocast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iio_kernels._autograd import without_autocast


@dataclass(frozen=True)
class Options:
    """The options of `iio_kernels.slot_attention`, checked and complete."""

    scale: float
    eps: float
    eps_in: str
    normalize: str
    joint_heads: bool


def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, slot_mask: Tensor | None, input_mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """U (..., K, Dv) and A (..., K, N), both in v's dtype."""
    with without_autocast(v.device):
        out_dtype = v.dtype
        q, k, v = _read(q, k, v, slot_mask, input_mask)
        A = _attention(q, k, slot_mask, input_mask, options)
        W, S = _weights(A, input_mask, options)
        U = _divide(W.mT @ v, S)
        return U.to(out_dtype), A.mT.to(out_dtype)


def forward(
    q: Tensor, k: Tensor, v: Tensor, slot_mask: Tensor | None, input_mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """U (..., K, Dv) and A (..., K, N), both in v's dtype."""
    return slot_attention(q, k, v, slot_mask, input_mask, options)


def backward(
    dU: Tensor,
    dA: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot_mask: Tensor | None,
    input_mask: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to q, k and v, each in its input's dtype, from those to U and (if it was used) to A.

    A is recomputed from q and k, then

        dv[n]    = sum_s W[n, s] dU[s]
        dA[n, s] = <dU[s], v[n] - U[s]> / S[s]           (+ the gradient that arrives at A itself)
        dL[n, s] = A[n, s] * (dA[n, s] - sum_t A[n, t] dA[n, t])
        dk[n]    = scale * sum_s dL[n, s] q[s],    dq[s] = scale * sum_n dL[n, s] k[n]
    """
    with without_autocast(v.device):
        dtypes = q.dtype, k.dtype, v.dtype
        q, k, v = _read(q, k, v, slot_mask, input_mask)
        A = _attention(q, k, slot_mask, input_mask, options)
        W, S = _weights(A, input_mask, options)
        dU = dU.to(v.dtype)

        dv = W @ _divide(dU, S)
        through_U = v @ dU.mT
        if options.normalize == "mean":
            U = _divide(W.mT @ v, S)
            through_U = through_U - (dU * U).sum(-1).unsqueeze(-2)
        through_U = _divide(through_U.mT, S).mT
        dA = through_U if dA is None else through_U + _fill(dA.mT.to(v.dtype), slot_mask, input_mask)

        dots = A * dA
        over_slots = (-3, -1) if options.joint_heads else -1
        dL = dots - A * dots.sum(over_slots, keepdim=True)
        dL = _fill(dL, slot_mask, input_mask)
        dk = options.scale * (dL @ q)
        dq = options.scale * (dL.mT @ k)
        dv = dv if input_mask is None else dv.masked_fill(~input_mask.unsqueeze(-1), 0)
        return dq.to(dtypes[0]), dk.to(dtypes[1]), dv.to(dtypes[2])


def _read(
    q: Tensor, k: Tensor, v: Tensor, slot_mask: Tensor | None, input_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in the dtype of the arithmetic, 0 where masked: what is masked may hold anything, even NaN."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if slot_mask is not None:
        q = q.masked_fill(~slot_mask.unsqueeze(-1), 0)
    if input_mask is not None:
        k = k.masked_fill(~input_mask.unsqueeze(-1), 0)
        v = v.masked_fill(~input_mask.unsqueeze(-1), 0)
    return q, k, v


def _attention(q: Tensor, k: Tensor, slot_mask: Tensor | None, input_mask: Tensor | None, options: Options) -> Tensor:
    """A (..., N, K), 0 for masked slots and masked inputs."""
    L = options.scale * (k @ q.mT)
    if slot_mask is not None:
        L = L.masked_fill(~slot_mask.unsqueeze(-2), float("-inf"))
    if options.joint_heads:
        if input_mask is not None:
            # An input may take part in one head and not in another, whose slots then do not compete for it.
            L = L.masked_fill(~input_mask.unsqueeze(-1), float("-inf"))
        # (..., H, N, K) -> (..., N, H * K): one softmax over the slots of all heads together.
        heads, _, slots = L.shape[-3:]
        A = L.movedim(-3, -2).flatten(-2).softmax(-1).unflatten(-1, (heads, slots)).movedim(-2, -3)
    else:
        A = L.softmax(-1)
    return _fill(A, slot_mask, input_mask)


def _fill(A: Tensor, slot_mask: Tensor | None, input_mask: Tensor | None) -> Tensor:
    """0 at masked slots and inputs: also where all slots are masked, and the softmax of nothing is NaN."""
    if slot_mask is not None:
        A = A.masked_fill(~slot_mask.unsqueeze(-2), 0)
    if input_mask is not None:
        A = A.masked_fill(~input_mask.unsqueeze(-1), 0)
    return A


def _weights(A: Tensor, input_mask: Tensor | None, options: Options) -> tuple[Tensor, Tensor | None]:
    """The unnormalised weights (..., N, K) and their normaliser S (..., K, 1); None for the plain sum."""
    if options.normalize == "sum":
        return A, None
    if options.eps_in == "denominator":
        return A, A.sum(-2).unsqueeze(-1) + options.eps
    W = A + options.eps
    if input_mask is not None:
        W = W.masked_fill(~input_mask.unsqueeze(-1), 0)
    return W, W.sum(-2).unsqueeze(-1)


def _divide(x: Tensor, S: Tensor | None) -> Tensor:
    """x / S, and 0 where S is exactly 0: a slot that nothing attends to. (A NaN is not 0, and stays.)"""
    if S is None:
        return x
    empty = S == 0
    return (x / S.masked_fill(empty, 1)).masked_fill(empty, 0)
