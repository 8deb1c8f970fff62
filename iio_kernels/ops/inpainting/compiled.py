"""Calls of the compiled operators. Which library serves one, torch decides by the tensors' device."""

from __future__ import annotations

import torch
from torch import Tensor

from iio_kernels._numerics import arithmetic_dtype
from iio_kernels.ops.inpainting import schema
from iio_kernels.ops.inpainting.reference import Inpainter

#: Subsets are visited, never held: time is the limit, 2^K a pixel.
MAX_MASKS = 16

schema.define("iio_kernels")
_ops = torch.ops.iio_kernels


def loss_and_gradient(
    image: Tensor, masks: Tensor, inpainter: Inpainter, needs_image_gradient: bool, needs_masks_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Each image's loss (B,) and its gradients: see `reference.loss_and_gradient`."""
    return _ops.iio_loss(*_arguments(image, masks, inpainter), needs_image_gradient, needs_masks_gradient)


def conditional_entropies(image: Tensor, masks: Tensor, inpainter: Inpainter) -> Tensor:
    """H (B, K, 2^(K-1) - 1): see `reference.conditional_entropies`."""
    return _ops.conditional_entropies(*_arguments(image, masks, inpainter))


def conditional_entropies_backward(
    grad: Tensor, image: Tensor, masks: Tensor, inpainter: Inpainter, needs_image_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The gradients to image and masks from that to H."""
    return _ops.conditional_entropies_backward(grad, *_arguments(image, masks, inpainter), needs_image_gradient)


def inpaint(image: Tensor, masks: Tensor, inpainter: Inpainter) -> Tensor:
    """psi (B, M, C, H, W): see `reference.inpaint`."""
    return _ops.inpaint(*_arguments(image, masks, inpainter))


def inpaint_backward(grad: Tensor, image: Tensor, masks: Tensor, inpainter: Inpainter) -> tuple[Tensor, Tensor]:
    """The gradients to image and masks from that to psi."""
    return _ops.inpaint_backward(grad, *_arguments(image, masks, inpainter))


def _arguments(image: Tensor, masks: Tensor, inpainter: Inpainter) -> tuple[Tensor, Tensor, float, int, int, float]:
    dtype = arithmetic_dtype(image, masks)
    options = inpainter.sigma, inpainter.kernel_size, inpainter.repeats, inpainter.eps
    return image.to(dtype), masks.to(dtype), *options
