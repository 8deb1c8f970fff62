"""Slot attention on the CPU: calls of the compiled operators (csrc/slot_attention.cpp)."""

from __future__ import annotations

import torch

from iio_kernels.ops.slot_attention import schema
from iio_kernels.ops.slot_attention.common import Operands
from iio_kernels.runtime.numerics import arithmetic_dtype


def _stored(operands: Operands) -> Operands:
    """The operands in dtypes that the kernels read."""
    q, k, v, logit_bias, slot_mask, input_mask = operands
    dtype = arithmetic_dtype(q, k, v)
    # bfloat16 is read as it is stored where keys and values share it; whatever else differs meets in the arithmetic's.
    in_place = dtype == torch.float32 and k.dtype == torch.bfloat16 and (v is None or v.dtype == torch.bfloat16)
    storage = torch.bfloat16 if in_place else dtype
    return Operands(
        q.to(dtype),
        k.to(storage),
        None if v is None else v.to(storage),
        None if logit_bias is None else logit_bias.to(dtype),
        slot_mask,
        input_mask,
    )


forward, backward = schema.calls("iio_kernels", _stored, widens=True)
