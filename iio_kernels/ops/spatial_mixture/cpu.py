"""The spatial mixture on the CPU: calls of the compiled operators (csrc/spatial_mixture.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from iio_kernels.ops.spatial_mixture import schema
from iio_kernels.ops.spatial_mixture.common import Operands


def _inputs(operands: Operands) -> tuple[Tensor, Tensor]:
    """Both in dtypes that the kernels read: bfloat16 is read as it is stored."""
    (image, decoded), dtype = operands, operands.dtype()
    in_place = dtype == torch.float32 and decoded.dtype == torch.bfloat16
    return image.to(dtype), decoded if in_place else decoded.to(dtype)


#: Which of forward's results backward reads, masks, posterior and d_decoded: exponentials take longer than reading what
#: they gave.
SAVED = (1, 2, 4)

forward, backward = schema.calls("iio_kernels", _inputs)
