"""The operators under the composition functions: how they are called, and what torch.compile needs to know of them.

decoded (B, K, C + 1, H, W), image (B, C, H, W) and incoming gradients, any strides. Incoming gradients and results are
in the dtype of the arithmetic; but the gradient to decoded is stored as decoded is, in dtype and layout. What was not
asked for has no elements.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from iio_kernels.ops.compose.common import Incoming, Operands, Wanted
from iio_kernels.runtime.autograd import not_differentiable_by_itself
from iio_kernels.runtime.layout import new_like
from iio_kernels.runtime.numerics import arithmetic_dtype


def define(namespace: str) -> None:
    """Define `namespace`::composition_forward and ::composition_backward."""
    torch.library.define(
        f"{namespace}::composition_forward",
        "(Tensor decoded, Tensor? image, bool return_reconstruction, bool return_masks)"
        " -> (Tensor reconstruction, Tensor masks, Tensor errors)",
    )
    torch.library.define(
        f"{namespace}::composition_backward",
        "(Tensor? d_reconstruction, Tensor? d_masks, Tensor? d_errors, Tensor decoded, Tensor? image,"
        " bool image_gradient) -> (Tensor d_decoded, Tensor d_image)",
    )
    torch.library.register_fake(f"{namespace}::composition_forward", new_results)
    torch.library.register_fake(f"{namespace}::composition_backward", new_gradients)
    not_differentiable_by_itself(f"{namespace}::composition_forward")


def calls(namespace: str, inputs: Callable[[Operands], tuple[Tensor, Tensor | None]]) -> tuple[Callable, Callable]:
    """Define the operators in a namespace: what calls them there, `forward` and `backward` as in reference.py.

    `inputs` makes of the operands what that namespace's kernels read.
    """
    define(namespace)
    ops = getattr(torch.ops, namespace)

    def forward(operands: Operands, wanted: Wanted) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_hat, a, errors = ops.composition_forward(*inputs(operands), *wanted)
        return (
            x_hat if wanted.reconstruction else None,
            a if wanted.masks else None,
            None if operands.image is None else errors,
        )

    def backward(incoming: Incoming, operands: Operands, needs_image_gradient: bool) -> tuple[Tensor, Tensor | None]:
        image = operands.image if needs_image_gradient and incoming.errors is not None else None
        d_decoded, d_image = ops.composition_backward(*incoming, *inputs(operands), image is not None)
        return d_decoded.to(operands.decoded.dtype), None if image is None else d_image.to(image.dtype)

    return forward, backward


def new_results(
    decoded: Tensor, image: Tensor | None, return_reconstruction: bool, return_masks: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what composition_forward returns."""
    B, K, channels, H, W = decoded.shape
    dtype = arithmetic_dtype(decoded, image)
    return (
        decoded.new_empty((B, channels - 1, H, W) if return_reconstruction else (0,), dtype=dtype),
        decoded.new_empty((B, K, H, W) if return_masks else (0,), dtype=dtype),
        decoded.new_empty((0,) if image is None else (B,), dtype=dtype),
    )


def new_gradients(
    d_reconstruction: Tensor | None,
    d_masks: Tensor | None,
    d_errors: Tensor | None,
    decoded: Tensor,
    image: Tensor | None,
    image_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Room for what composition_backward returns, the gradient to decoded in decoded's own layout."""
    B, _, channels, H, W = decoded.shape
    shape = (B, channels - 1, H, W) if image_gradient else (0,)
    return new_like(decoded, decoded.dtype), decoded.new_empty(shape, dtype=arithmetic_dtype(decoded, image))
