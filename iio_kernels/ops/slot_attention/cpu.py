"""Slot attention on the CPU: calls of the compiled operators (csrc/slot_attention.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from iio_kernels.ops.slot_attention import schema
from iio_kernels.ops.slot_attention.reference import Options
from iio_kernels.runtime.numerics import arithmetic_dtype


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


forward, backward = schema.calls("iio_kernels", _inputs, widens=True)
