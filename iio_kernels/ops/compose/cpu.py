"""Slot composition on the CPU: calls of the compiled operators (csrc/compose.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from iio_kernels.ops.compose import schema
from iio_kernels.ops.compose.common import Operands


def _inputs(operands: Operands) -> tuple[Tensor, Tensor | None]:
    """Both in dtypes that the kernels read: bfloat16 is read as it is stored."""
    (decoded, image), dtype = operands, operands.dtype()
    in_place = dtype == torch.float32 and decoded.dtype == torch.bfloat16
    return decoded if in_place else decoded.to(dtype), None if image is None else image.to(dtype)


forward, backward = schema.calls("iio_kernels", _inputs)
