"""The operators under the mixture functions: how they are called, and what torch.compile needs to know of them.

image (B, C, H, W), decoded (B, K, C + 1, H, W) and incoming gradients, any strides. Incoming gradients and results are
in the dtype of the arithmetic; but the gradient to decoded is stored as decoded is. It and d_decoded have decoded's
layout. What was not asked for has no elements. mixture_backward is given masks, posterior and, as d_nll, d_decoded
where mixture_forward returned them; a backend may compute them again instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from iio_kernels.ops.spatial_mixture.common import Incoming, Operands, Options
from iio_kernels.runtime.autograd import not_differentiable_by_itself
from iio_kernels.runtime.layout import new_like
from iio_kernels.runtime.numerics import arithmetic_dtype


def define(namespace: str) -> None:
    """Define `namespace`::mixture_forward and ::mixture_backward."""
    torch.library.define(
        f"{namespace}::mixture_forward",
        "(Tensor image, Tensor decoded, float sigma, bool everything)"
        " -> (Tensor log_likelihood, Tensor masks, Tensor posterior, Tensor leave_one_out, Tensor d_decoded)",
    )
    torch.library.define(
        f"{namespace}::mixture_backward",
        "(Tensor? d_log_likelihood, Tensor? d_masks, Tensor? d_posterior, Tensor image, Tensor decoded, float sigma,"
        " bool image_gradient, Tensor? masks=None, Tensor? posterior=None, Tensor? d_nll=None)"
        " -> (Tensor d_image, Tensor d_decoded)",
    )
    torch.library.register_fake(f"{namespace}::mixture_forward", new_results)
    torch.library.register_fake(f"{namespace}::mixture_backward", new_gradients)
    not_differentiable_by_itself(f"{namespace}::mixture_forward")


def calls(namespace: str, inputs: Callable[[Operands], tuple[Tensor, Tensor]]) -> tuple[Callable, Callable]:
    """Define the operators in a namespace: what calls them there, `forward` and `backward` as in reference.py.

    `inputs` makes of the operands what that namespace's kernels read.
    """
    define(namespace)
    ops = getattr(torch.ops, namespace)

    def forward(
        operands: Operands, options: Options
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        log_p, *others = ops.mixture_forward(*inputs(operands), *options)
        return (log_p, *others) if options.everything else (log_p, None, None, None, None)

    def backward(
        incoming: Incoming, operands: Operands, sigma: float, needs_image_gradient: bool, *saved: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        arguments = *inputs(operands), sigma, needs_image_gradient, *saved
        d_image, d_decoded = ops.mixture_backward(*incoming, *arguments)
        image, decoded = operands
        return d_image.to(image.dtype) if needs_image_gradient else None, d_decoded.to(decoded.dtype)

    return forward, backward


def new_results(
    image: Tensor, decoded: Tensor, sigma: float, everything: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what mixture_forward returns."""
    B, K, _, H, W = decoded.shape
    dtype = arithmetic_dtype(image, decoded)
    masks, posterior, leave_one_out = (
        decoded.new_empty((B, K, H, W) if everything else (0,), dtype=dtype) for _ in range(3)
    )
    d_decoded = new_like(decoded, dtype) if everything else decoded.new_empty((0,), dtype=dtype)
    return decoded.new_empty((B, H, W), dtype=dtype), masks, posterior, leave_one_out, d_decoded


def new_gradients(
    d_log_likelihood: Tensor | None,
    d_masks: Tensor | None,
    d_posterior: Tensor | None,
    image: Tensor,
    decoded: Tensor,
    sigma: float,
    image_gradient: bool,
    masks: Tensor | None = None,
    posterior: Tensor | None = None,
    d_nll: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Room for what mixture_backward returns."""
    d_image = decoded.new_empty(image.shape if image_gradient else (0,), dtype=arithmetic_dtype(image, decoded))
    return d_image, new_like(decoded, decoded.dtype)
