"""The compiled backends, whose operators have one name: which library serves a call, torch decides by the device."""

from __future__ import annotations

from torch import Tensor

from iio_kernels.ops.iio_loss import schema
from iio_kernels.ops.iio_loss.common import MAX_MASKS
from iio_kernels.runtime.numerics import arithmetic_dtype

__all__ = [
    "MAX_MASKS",
    "conditional_entropies",
    "conditional_entropies_backward",
    "inpaint",
    "inpaint_backward",
    "loss_and_gradient",
]


def _inputs(image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    dtype = arithmetic_dtype(image, masks)
    return image.to(dtype), masks.to(dtype)


loss_and_gradient, conditional_entropies, conditional_entropies_backward, inpaint, inpaint_backward = schema.calls(
    "iio_kernels", _inputs
)
