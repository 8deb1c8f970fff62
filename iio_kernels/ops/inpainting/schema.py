"""The operators under the inpainting functions, and what torch.compile needs to know of them. Imports no backend.

image (B, C, H, W) and masks (B, K, H, W) in the arithmetic's dtype, any strides. What was not asked for has no
elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

INPUTS = "Tensor image, Tensor masks, float sigma, int kernel_size, int repeats, float eps"

torch.library.define(
    "iio_kernels::iio_loss",
    f"({INPUTS}, bool image_gradient, bool masks_gradient) -> (Tensor losses, Tensor dimage, Tensor dmasks)",
)
torch.library.define("iio_kernels::conditional_entropies", f"({INPUTS}) -> Tensor")
torch.library.define(
    "iio_kernels::conditional_entropies_backward",
    f"(Tensor grad, {INPUTS}, bool image_gradient) -> (Tensor dimage, Tensor dmasks)",
)
torch.library.define("iio_kernels::inpaint", f"({INPUTS}) -> Tensor")
torch.library.define("iio_kernels::inpaint_backward", f"(Tensor grad, {INPUTS}) -> (Tensor dimage, Tensor dmasks)")


def _like(x: Tensor, wanted: bool = True) -> Tensor:
    return x.new_empty(x.shape if wanted else (0,))


@torch.library.register_fake("iio_kernels::iio_loss")
def _(image, masks, sigma, kernel_size, repeats, eps, image_gradient, masks_gradient):
    return image.new_empty(image.shape[0]), _like(image, image_gradient), _like(masks, masks_gradient)


@torch.library.register_fake("iio_kernels::conditional_entropies")
def _(image, masks, sigma, kernel_size, repeats, eps):
    return masks.new_empty((*masks.shape[:2], 2 ** (masks.shape[1] - 1) - 1))


@torch.library.register_fake("iio_kernels::conditional_entropies_backward")
def _(grad, image, masks, sigma, kernel_size, repeats, eps, image_gradient):
    return _like(image, image_gradient), _like(masks)


@torch.library.register_fake("iio_kernels::inpaint")
def _(image, masks, sigma, kernel_size, repeats, eps):
    return masks.new_empty((*masks.shape[:2], *image.shape[1:]))


@torch.library.register_fake("iio_kernels::inpaint_backward")
def _(grad, image, masks, sigma, kernel_size, repeats, eps):
    return _like(image), _like(masks)
