"""The iterations of Slot Attention on the CPU: calls of the compiled operators (csrc/slot_attention_module.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from iio_kernels.ops.slot_attention_module import schema


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype that the kernels read: bfloat16 is read as it is stored."""
    in_place = dtype == torch.float32 and x.dtype == torch.bfloat16
    return x if in_place else x.to(dtype)


forward, backward = schema.calls("iio_kernels", _stored)
