"""The spatial mixture on the CPU: calls of the compiled operators (csrc/spatial_mixture.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from iio_kernels.ops.spatial_mixture import schema
from iio_kernels.runtime.numerics import arithmetic_dtype


def _inputs(image: Tensor, decoded: Tensor) -> tuple[Tensor, Tensor]:
    """Both in dtypes that the kernels read: bfloat16 is read as it is stored."""
    dtype = arithmetic_dtype(image, decoded)
    in_place = dtype == torch.float32 and decoded.dtype == torch.bfloat16
    return image.to(dtype), decoded if in_place else decoded.to(dtype)


#: Those of forward's results that backward reads: exponentials take longer than reading what they gave.
KEPT = (1, 2, 4)

forward, backward = schema.calls("iio_kernels", _inputs)
