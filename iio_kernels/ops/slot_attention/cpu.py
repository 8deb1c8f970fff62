"""Slot attention on the CPU: calls of the compiled operators (csrc/slot_attention.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from iio_kernels._numerics import arithmetic_dtype, cast
from iio_kernels.ops.slot_attention import schema
from iio_kernels.ops.slot_attention.reference import Options

schema.define("iio_kernels")
_ops = torch.ops.iio_kernels


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    logit_bias: Tensor | None,
    slot_mask: Tensor | None,
    input_mask: Tensor | None,
    options: Options,
    return_attention: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """U, S and A: see `reference.forward`."""
    inputs = _inputs(q, k, v, logit_bias, slot_mask, input_mask, options)
    U, S, A = _ops.slot_attention_forward(*inputs, *schema.arguments(options), return_attention)
    out_dtype = (k if v is None else v).dtype
    U, S = U.view(*q.shape[:-1], U.shape[-1]), S.view(q.shape[:-1])
    return U, S, cast(A.view(*q.shape[:-1], k.shape[-2]), out_dtype) if return_attention else None


def backward(
    dU: Tensor,
    dS: Tensor | None,
    dA: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    logit_bias: Tensor | None,
    slot_mask: Tensor | None,
    input_mask: Tensor | None,
    U: Tensor,
    S: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients to q, k, v and logit_bias: see `reference.backward`."""
    inputs = _inputs(q, k, v, logit_bias, slot_mask, input_mask, options)
    incoming = (None if x is None else schema.four(x.to(U.dtype), options, 2) for x in (dU, dA))
    dU, dA = incoming
    dS = None if dS is None else schema.four(dS, options, 1)
    U4, S4 = schema.four(U, options, 2), schema.four(S, options, 1)
    dq, dk, dv, dlogit_bias = _ops.slot_attention_backward(dU, dS, dA, *inputs, U4, S4, *schema.arguments(options))
    return (
        dq.view(q.shape).to(q.dtype),
        dk.view(k.shape).to(k.dtype),
        None if v is None else dv.view(v.shape).to(v.dtype),
        None if logit_bias is None else dlogit_bias.view(logit_bias.shape).to(logit_bias.dtype),
    )


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    logit_bias: Tensor | None,
    slot_mask: Tensor | None,
    input_mask: Tensor | None,
    options: Options,
) -> tuple[Tensor | None, ...]:
    """All of them with two batch dimensions, the second that of joint heads, in dtypes that the kernels read."""
    dtype = arithmetic_dtype(q, k, v)
    # bfloat16 is read as it is stored where keys and values share it; whatever else differs meets in the arithmetic's.
    in_place = dtype == torch.float32 and k.dtype == torch.bfloat16 and (v is None or v.dtype == torch.bfloat16)
    storage = torch.bfloat16 if in_place else dtype
    return (
        schema.four(q.to(dtype), options, 2),
        schema.four(k.to(storage), options, 2),
        None if v is None else schema.four(v.to(storage), options, 2),
        None if logit_bias is None else schema.four(logit_bias.to(dtype), options, 1),
        None if slot_mask is None else schema.four(slot_mask, options, 1),
        None if input_mask is None else schema.four(input_mask, options, 1),
    )
