"""The decoder's first layer on the CPU: calls of the compiled operators (csrc/broadcast_conv2d.cpp)."""

from __future__ import annotations

import torch

from iio_kernels.ops.broadcast_conv2d import schema


def _stored(dtype: torch.dtype, arithmetic: torch.dtype) -> torch.dtype:
    """The kernels write and read the dtype of the arithmetic, and bfloat16 where that is float32."""
    return dtype if (dtype, arithmetic) == (torch.bfloat16, torch.float32) else arithmetic


forward, backward = schema.calls("iio_kernels", _stored)
