"""Slot attention in plain PyTorch: the formula itself, and its gradient written out.

    L[n, s] = scale * <k[n], q[s]>
    A[n, :] = softmax over the slots s of L[n, :]
    W[n, s] = (A[n, s] + eps) / S[s],    S[s] = sum_n (A[n, s] + eps)
    U[s]    = sum_n W[n, s] v[n]

(Locatello et al. 2020, "Object-Centric Learning with Slot Attention", eqs. 1 to 3 and algorithm 1.)

`forward` and `backward` are the pair that `SlotAttentionFunction` calls and every backend offers: between them they
keep nothing of size N * K. As the reference, autograd differentiates `forward` itself, any number of times. Arithmetic
is at least float32 whatever the storage type and autocast.
"""

from __future__ import annotations

from torch import Tensor

from iio_kernels.ops.slot_attention.common import Operands, Options, values
from iio_kernels.runtime.autograd import without_autocast
from iio_kernels.runtime.numerics import arithmetic_dtype, cast, divide


def forward(operands: Operands, options: Options, return_attention: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """U (..., K, Dv), the normaliser S (..., K), and A (..., K, N) if asked for.

    U and S are in the arithmetic's dtype, A is in that of the values. Where the weights are not normalised, S is their
    sum all the same.
    """
    out_dtype = values(operands).dtype
    with without_autocast(operands.k.device):
        operands = _read(operands)
        A = _attention(operands, options)
        W, S = _weights(A, operands.input_mask, options)
        U = W.mT @ values(operands)
        if options.normalize == "mean":
            U = divide(U, S.unsqueeze(-1))
        return U, S, cast(A.mT, out_dtype) if return_attention else None


def backward(
    dU: Tensor, dS: Tensor | None, dA: Tensor | None, operands: Operands, U: Tensor, S: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients to q, k, v and logit_bias, each in its dtype, from those to U, S and A, None where not used.

    A is recomputed from q and k, then

        dv[n]    = sum_s W[n, s] dU[s]
        dA[n, s] = <dU[s], v[n] - U[s]> / S[s] + dS[s]   (+ the gradient that arrives at A itself)
        dL[n, s] = A[n, s] * (dA[n, s] - sum_t A[n, t] dA[n, t])
        dk[n]    = scale * sum_s dL[n, s] q[s],    dq[s] = scale * sum_n dL[n, s] k[n]

    and logit_bias has sum_n dL[n, s]. With v = None the gradient to k is the sum of both.
    """
    dtypes = [None if x is None else x.dtype for x in operands]
    with without_autocast(operands.k.device):
        operands = _read(operands)
        q, k, v, logit_bias, slot_mask, input_mask = operands
        V = values(operands)
        A = _attention(operands, options)
        W, _ = _weights(A, input_mask, options)
        dU = dU.to(V.dtype)

        if options.normalize == "mean":
            dv = W @ divide(dU, S.unsqueeze(-1))
            through_U = divide((V @ dU.mT - (dU * U).sum(-1).unsqueeze(-2)).mT, S.unsqueeze(-1)).mT
        else:
            dv = W @ dU
            through_U = V @ dU.mT
        dA = through_U if dA is None else through_U + _fill(dA.mT.to(V.dtype), slot_mask, input_mask)
        dA = dA if dS is None else dA + dS.unsqueeze(-2)

        dots = A * dA
        over_slots = (-3, -1) if options.joint_heads else -1
        dL = dots - A * dots.sum(over_slots, keepdim=True)
        dL = _fill(dL, slot_mask, input_mask)
        dk = options.scale * (dL @ q)
        dq = options.scale * (dL.mT @ k)
        dv = dv if input_mask is None else dv.masked_fill(~input_mask.unsqueeze(-1), 0)
        dlogit_bias = None if logit_bias is None else dL.sum(-2).to(logit_bias.dtype)
        if v is None:
            return dq.to(dtypes[0]), (dk + dv).to(dtypes[1]), None, dlogit_bias
        return dq.to(dtypes[0]), dk.to(dtypes[1]), dv.to(dtypes[2]), dlogit_bias


def _read(operands: Operands) -> Operands:
    """q, k, v in the dtype of the arithmetic, 0 where masked: what is masked may hold anything, even NaN."""
    q, k, v, logit_bias, slot_mask, input_mask = operands
    dtype = arithmetic_dtype(q, k, v)
    q, k, v = q.to(dtype), k.to(dtype), None if v is None else v.to(dtype)
    if slot_mask is not None:
        q = q.masked_fill(~slot_mask.unsqueeze(-1), 0)
    if input_mask is not None:
        off = ~input_mask.unsqueeze(-1)
        k, v = k.masked_fill(off, 0), None if v is None else v.masked_fill(off, 0)
    return Operands(q, k, v, logit_bias, slot_mask, input_mask)


def _attention(operands: Operands, options: Options) -> Tensor:
    """A (..., N, K), 0 for masked slots and masked inputs."""
    q, k, _, logit_bias, slot_mask, input_mask = operands
    L = options.scale * (k @ q.mT)
    if logit_bias is not None:
        L = L + logit_bias.to(L.dtype).unsqueeze(-2)
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


def _weights(A: Tensor, input_mask: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """The unnormalised weights (..., N, K) and their normaliser S (..., K)."""
    if options.normalize == "sum":
        return A, A.sum(-2)
    if options.eps_in == "denominator":
        return A, A.sum(-2) + options.eps
    W = A + options.eps
    if input_mask is not None:
        W = W.masked_fill(~input_mask.unsqueeze(-1), 0)
    return W, W.sum(-2)
