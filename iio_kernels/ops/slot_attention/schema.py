"""The operators under `slot_attention`: how they are called, and what torch.compile needs to know of them.

Layouts: q (B, H, K, Dk), k (B, H, N, Dk), v (B, H, N, Dv) or None for k itself; biases and masks (B, H, K) and
(B, H, N). U (B, H, K, Dv) and S (B, H, K) are in the arithmetic's dtype (float64 where k is, otherwise float32), A
(B, H, K, N) in the values', and each gradient in its input's. What was not asked for has no elements.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from iio_kernels.ops.slot_attention.common import Operands, Options, batch_and_heads, values, with_batch_and_heads
from iio_kernels.runtime.autograd import not_differentiable_by_itself
from iio_kernels.runtime.numerics import cast

OPTIONS = "float scale, float eps, bool eps_in_weights, bool normalize, bool joint_heads"
INPUTS = "Tensor q, Tensor k, Tensor? v, Tensor? logit_bias, Tensor? slot_mask, Tensor? input_mask"


def define(namespace: str) -> None:
    """Define `slot_attention_forward` and `slot_attention_backward` in a backend's namespace."""
    forward, backward = f"{namespace}::slot_attention_forward", f"{namespace}::slot_attention_backward"
    torch.library.define(forward, f"({INPUTS}, {OPTIONS}, bool return_attention) -> (Tensor U, Tensor S, Tensor A)")
    torch.library.define(
        backward,
        f"(Tensor dU, Tensor? dS, Tensor? dA, {INPUTS}, Tensor U, Tensor S, {OPTIONS})"
        " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dlogit_bias)",
    )
    torch.library.register_fake(forward, _forward)
    torch.library.register_fake(backward, _backward)
    not_differentiable_by_itself(forward)


def calls(
    namespace: str, stored: Callable[[Operands], Operands], widens: bool
) -> tuple[Callable[..., tuple], Callable[..., tuple]]:
    """Define the operators in a namespace: what calls them there, `forward` and `backward` as in reference.py.

    `stored` returns the operands in dtypes that the namespace's kernels read. With `widens` these read the gradient to
    A in the arithmetic's dtype only.
    """
    define(namespace)
    ops = getattr(torch.ops, namespace)

    def forward(operands: Operands, options: Options, return_attention: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        q, k = operands.q, operands.k
        read = with_batch_and_heads(stored(operands), options)
        U, S, A = ops.slot_attention_forward(*read, *arguments(options), return_attention)
        U, S = U.view(*q.shape[:-1], U.shape[-1]), S.view(q.shape[:-1])
        A = cast(A.view(*q.shape[:-1], k.shape[-2]), values(operands).dtype) if return_attention else None
        return U, S, A

    def backward(
        dU: Tensor,
        dS: Tensor | None,
        dA: Tensor | None,
        operands: Operands,
        U: Tensor,
        S: Tensor,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        q, k, v, logit_bias, _, _ = operands
        read = with_batch_and_heads(stored(operands), options)
        if widens:
            dU, dA = dU.to(U.dtype), None if dA is None else dA.to(U.dtype)
        dU, U, S = (batch_and_heads(x, options, own) for x, own in ((dU, 2), (U, 2), (S, 1)))
        dS = None if dS is None else batch_and_heads(dS, options, 1)
        dA = None if dA is None else batch_and_heads(dA, options, 2)
        dq, dk, dv, dlogit_bias = ops.slot_attention_backward(dU, dS, dA, *read, U, S, *arguments(options))
        return (
            dq.view(q.shape).to(q.dtype),
            dk.view(k.shape).to(k.dtype),
            None if v is None else dv.view(v.shape).to(v.dtype),
            None if logit_bias is None else dlogit_bias.view(logit_bias.shape).to(logit_bias.dtype),
        )

    return forward, backward


def _forward(
    q, k, v, logit_bias, slot_mask, input_mask, scale, eps, eps_in_weights, normalize, joint_heads, return_attention
):
    values, dtype = k if v is None else v, torch.float64 if k.dtype == torch.float64 else torch.float32
    return (
        q.new_empty((*q.shape[:3], values.shape[3]), dtype=dtype),
        q.new_empty(q.shape[:3], dtype=dtype),
        values.new_empty((*q.shape[:3], k.shape[2]) if return_attention else (0,)),
    )


def _backward(
    dU, dS, dA, q, k, v, logit_bias, slot_mask, input_mask, U, S, scale, eps, eps_in_weights, normalize, joint_heads
):
    dv = k.new_empty((0,)) if v is None else v.new_empty(v.shape)
    dlogit_bias = S.new_empty((0,)) if logit_bias is None else logit_bias.new_empty(logit_bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), dv, dlogit_bias


def arguments(options: Options) -> tuple[float, float, bool, bool, bool]:
    """The options as the operators take them, `OPTIONS`."""
    weights, mean = options.eps_in == "weights", options.normalize == "mean"
    return options.scale, options.eps, weights, mean, options.joint_heads
