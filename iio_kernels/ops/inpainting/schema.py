"""The operators under the inpainting functions, and what torch.compile needs to know of them. Imports no backend.

image (B, C, H, W) and masks (B, K, H, W), any strides. Results are in the dtype of the arithmetic. What was not asked
for has no elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iio_kernels._autograd import not_differentiable_by_itself
from iio_kernels._numerics import arithmetic_dtype


def define(namespace: str) -> None:
    """Define the operators of one backend, which is to register its implementations in the same namespace."""
    for name, (schema, fake) in _OPERATORS.items():
        torch.library.define(f"{namespace}::{name}", schema)
        torch.library.register_fake(f"{namespace}::{name}", fake)
        if not name.endswith("_backward"):
            not_differentiable_by_itself(f"{namespace}::{name}")


def _like(x: Tensor, dtype: torch.dtype, wanted: bool = True) -> Tensor:
    return x.new_empty(x.shape if wanted else (0,), dtype=dtype)


def _iio_loss(image, masks, sigma, kernel_size, repeats, eps, image_gradient, masks_gradient):
    dtype = arithmetic_dtype(image, masks)
    losses = image.new_empty(image.shape[0], dtype=dtype)
    return losses, _like(image, dtype, image_gradient), _like(masks, dtype, masks_gradient)


def _conditional_entropies(image, masks, sigma, kernel_size, repeats, eps):
    shape = (*masks.shape[:2], 2 ** (masks.shape[1] - 1) - 1)
    return masks.new_empty(shape, dtype=arithmetic_dtype(image, masks))


def _conditional_entropies_backward(grad, image, masks, sigma, kernel_size, repeats, eps, image_gradient):
    dtype = arithmetic_dtype(image, masks)
    return _like(image, dtype, image_gradient), _like(masks, dtype)


def _inpaint(image, masks, sigma, kernel_size, repeats, eps):
    return masks.new_empty((*masks.shape[:2], *image.shape[1:]), dtype=arithmetic_dtype(image, masks))


def _inpaint_backward(grad, image, masks, sigma, kernel_size, repeats, eps):
    dtype = arithmetic_dtype(image, masks)
    return _like(image, dtype), _like(masks, dtype)


_INPUTS = "Tensor image, Tensor masks, float sigma, int kernel_size, int repeats, float eps"

_OPERATORS = {
    "iio_loss": (
        f"({_INPUTS}, bool image_gradient, bool masks_gradient) -> (Tensor losses, Tensor dimage, Tensor dmasks)",
        _iio_loss,
    ),
    "conditional_entropies": (f"({_INPUTS}) -> Tensor", _conditional_entropies),
    "conditional_entropies_backward": (
        f"(Tensor grad, {_INPUTS}, bool image_gradient) -> (Tensor dimage, Tensor dmasks)",
        _conditional_entropies_backward,
    ),
    "inpaint": (f"({_INPUTS}) -> Tensor", _inpaint),
    "inpaint_backward": (f"(Tensor grad, {_INPUTS}) -> (Tensor dimage, Tensor dmasks)", _inpaint_backward),
}
