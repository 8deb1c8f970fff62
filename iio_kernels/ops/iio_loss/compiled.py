"""Calls of the compiled operators. Which library serves one, torch decides by the tensors' device."""

from __future__ import annotations

from torch import Tensor

from iio_kernels.ops.iio_loss import schema
from iio_kernels.runtime.numerics import arithmetic_dtype

MAX_MASKS = schema.MAX_MASKS


def _inputs(image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    dtype = arithmetic_dtype(image, masks)
    return image.to(dtype), masks.to(dtype)


loss_and_gradient, conditional_entropies, conditional_entropies_backward, inpaint, inpaint_backward = schema.calls(
    "iio_kernels", _inputs
)
