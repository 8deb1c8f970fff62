"""The operators under the inpainting functions: how they are called, and what torch.compile needs to know of them.

image (B, C, H, W) and masks (B, K, H, W), any strides. Results are in the dtype of the arithmetic. What was not asked
for has no elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iio_kernels.ops.iio_loss.common import Draw, Inpainter
from iio_kernels.runtime.autograd import not_differentiable_by_itself
from iio_kernels.runtime.numerics import arithmetic_dtype


def define(namespace: str) -> None:
    """Define the operators of one backend, which is to register its implementations in the same namespace."""
    for name, (schema, fake) in _OPERATORS.items():
        torch.library.define(f"{namespace}::{name}", schema)
        torch.library.register_fake(f"{namespace}::{name}", fake)
        if not name.endswith("_backward"):
            not_differentiable_by_itself(f"{namespace}::{name}")


def calls(namespace: str, inputs: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[Callable, ...]:
    """Define the operators in a namespace: what calls them there, in the order of this function's own.

    `inputs` makes of image and masks what that namespace's kernels read.
    """
    define(namespace)
    ops = getattr(torch.ops, namespace)

    def loss_and_gradient(
        image: Tensor,
        masks: Tensor,
        inpainter: Inpainter,
        needs_image_gradient: bool,
        needs_masks_gradient: bool,
        draw: Draw | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each image's loss (B,) and its gradients: see `reference.loss_and_gradient`."""
        options = *inpainter, needs_image_gradient, needs_masks_gradient
        if draw is None:
            return ops.iio_loss(*inputs(image, masks), *options)
        weights = draw.weights.to(arithmetic_dtype(image, masks))
        return ops.sampled_iio_loss(*inputs(image, masks), draw.pairs, weights, *options)

    def conditional_entropies(image: Tensor, masks: Tensor, inpainter: Inpainter) -> Tensor:
        """H (B, K, 2^(K-1) - 1): see `reference.conditional_entropies`."""
        return ops.conditional_entropies(*inputs(image, masks), *inpainter)

    def conditional_entropies_backward(
        grad: Tensor, image: Tensor, masks: Tensor, inpainter: Inpainter, needs_image_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """The gradients to image and masks from that to H."""
        options = *inpainter, needs_image_gradient
        return ops.conditional_entropies_backward(grad, *inputs(image, masks), *options)

    def inpaint(image: Tensor, masks: Tensor, inpainter: Inpainter) -> Tensor:
        """psi (B, M, C, H, W): see `reference.inpaint`."""
        return ops.inpaint(*inputs(image, masks), *inpainter)

    def inpaint_backward(grad: Tensor, image: Tensor, masks: Tensor, inpainter: Inpainter) -> tuple[Tensor, Tensor]:
        """The gradients to image and masks from that to psi."""
        return ops.inpaint_backward(grad, *inputs(image, masks), *inpainter)

    return loss_and_gradient, conditional_entropies, conditional_entropies_backward, inpaint, inpaint_backward


def _like(x: Tensor, dtype: torch.dtype, wanted: bool = True) -> Tensor:
    return x.new_empty(x.shape if wanted else (0,), dtype=dtype)


def _iio_loss(image, masks, sigma, kernel_size, repeats, eps, image_gradient, masks_gradient):
    dtype = arithmetic_dtype(image, masks)
    losses = image.new_empty(image.shape[0], dtype=dtype)
    return losses, _like(image, dtype, image_gradient), _like(masks, dtype, masks_gradient)


def _sampled_iio_loss(image, masks, pairs, weights, *options):
    return _iio_loss(image, masks, *options)


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


_OPTIONS = "float sigma, int kernel_size, int repeats, float eps"
_INPUTS = f"Tensor image, Tensor masks, {_OPTIONS}"
_LOSS = "bool image_gradient, bool masks_gradient) -> (Tensor losses, Tensor dimage, Tensor dmasks)"

_OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "iio_loss": (f"({_INPUTS}, {_LOSS}", _iio_loss),
    # pairs (B, P) int64 and weights (P,): see common.Draw.
    "sampled_iio_loss": (
        f"(Tensor image, Tensor masks, Tensor pairs, Tensor weights, {_OPTIONS}, {_LOSS}",
        _sampled_iio_loss,
    ),
    "conditional_entropies": (f"({_INPUTS}) -> Tensor", _conditional_entropies),
    "conditional_entropies_backward": (
        f"(Tensor grad, {_INPUTS}, bool image_gradient) -> (Tensor dimage, Tensor dmasks)",
        _conditional_entropies_backward,
    ),
    "inpaint": (f"({_INPUTS}) -> Tensor", _inpaint),
    "inpaint_backward": (f"(Tensor grad, {_INPUTS}) -> (Tensor dimage, Tensor dmasks)", _inpaint_backward),
}
