"""The autograd Functions under the inpainting functions: one backend's kernels, differentiated once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iio_kernels.ops.iio_loss.common import Draw, Inpainter
from iio_kernels.runtime import backends
from iio_kernels.runtime.autograd import differentiable_once, signature_kept


@signature_kept
class IIOLossFunction(torch.autograd.Function):
    """The autograd Function under `iio_loss`: a backend's `loss_and_gradient` forward, a scaling backward.

    `IIOLossFunction.apply(image, masks, pairs, weights, inpainter, needs_gradient, backend)` returns each image's loss,
    `(B,)`, its terms summed, and its gradients to image and masks as far as `needs_gradient`, two flags, asks for them;
    only the loss is differentiable. `pairs` and `weights` are those of a `Draw` of subsets, or both None for all
    subsets; `inpainter` is an `Inpainter`. It checks nothing: call `iio_loss`. It differentiates once;
    for second derivatives call `iio_loss` with `backend="reference"`, which plain autograd differentiates any number
    of times.
    """

    @staticmethod
    def forward(
        image: Tensor,
        masks: Tensor,
        pairs: Tensor | None,
        weights: Tensor | None,
        inpainter: Inpainter,
        needs_gradient: tuple[bool, bool],
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernels = backends.implementation("iio_loss", backend)
        draw = None if pairs is None or weights is None else Draw(pairs, weights)
        return kernels.loss_and_gradient(image, masks, inpainter, *needs_gradient, draw)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        image, masks, *_ = inputs
        _, dimage, dmasks = output
        ctx.mark_non_differentiable(dimage, dmasks)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(image, masks, dimage, dmasks)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        image, masks, *gradients = ctx.saved_tensors
        grad = grad[:, None, None, None]
        scaled = tuple(None if x is None else grad * x for x in _needed(ctx, *gradients))
        return *_stored((image.dtype, masks.dtype), scaled), *(None,) * 5


@signature_kept
class ConditionalEntropiesFunction(torch.autograd.Function):
    """The autograd Function under `conditional_entropies`, as `IIOLossFunction` is under `iio_loss`."""

    @staticmethod
    def forward(image: Tensor, masks: Tensor, inpainter: Inpainter, backend: str) -> Tensor:
        return backends.implementation("iio_loss", backend).conditional_entropies(image, masks, inpainter)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        image, masks, ctx.inpainter, ctx.backend = inputs
        ctx.save_for_backward(image, masks)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, masks = ctx.saved_tensors
        kernels = backends.implementation("iio_loss", ctx.backend)
        gradients = kernels.conditional_entropies_backward(grad, image, masks, ctx.inpainter, ctx.needs_input_grad[0])
        return *_stored((image.dtype, masks.dtype), _needed(ctx, *gradients)), None, None


@signature_kept
class InpaintFunction(torch.autograd.Function):
    """The autograd Function under `inpaint`, as `IIOLossFunction` is under `iio_loss`."""

    @staticmethod
    def forward(image: Tensor, masks: Tensor, inpainter: Inpainter, backend: str) -> Tensor:
        return backends.implementation("iio_loss", backend).inpaint(image, masks, inpainter)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        image, masks, ctx.inpainter, ctx.backend = inputs
        ctx.save_for_backward(image, masks)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, masks = ctx.saved_tensors
        kernels = backends.implementation("iio_loss", ctx.backend)
        gradients = kernels.inpaint_backward(grad, image, masks, ctx.inpainter)
        return *_stored((image.dtype, masks.dtype), _needed(ctx, *gradients)), None, None


def _needed(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients to image and masks, None in place of one that nobody needs."""
    return tuple(x if needed else None for x, needed in zip(gradients, ctx.needs_input_grad, strict=False))


def _stored(dtypes: tuple[torch.dtype, torch.dtype], gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Each gradient in its input's dtype."""
    return tuple(None if x is None else x.to(dtype) for x, dtype in zip(gradients, dtypes, strict=True))
