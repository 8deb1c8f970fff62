"""Inpainting and the IIO loss on NVIDIA GPUs: csrc/inpainting.cu."""

from iio_kernels.ops.inpainting.compiled import (
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
