"""Inpainting and the IIO loss on the CPU: csrc/iio_loss.cpp."""

from iio_kernels.ops.iio_loss.compiled import (
    MAX_MASKS,
    conditional_entropies,
    conditional_entropies_backward,
    inpaint,
    inpaint_backward,
    loss_and_gradient,
)

__all__ = [
    "MAX_MASKS",
    "conditional_entropies",
    "conditional_entropies_backward",
    "inpaint",
    "inpaint_backward",
    "loss_and_gradient",
]
