"""Slot composition on the CPU: calls of the compiled operators (csrc/composition.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from iio_kernels._numerics import arithmetic_dtype
from iio_kernels.ops.composition import schema

schema.define("iio_kernels")
_ops = torch.ops.iio_kernels


def forward(
    decoded: Tensor, image: Tensor | None, return_reconstruction: bool, return_masks: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """x_hat, a and errors: see `reference.forward`."""
    inputs = _inputs(decoded, image)
    x_hat, a, errors = _ops.composition_forward(*inputs, return_reconstruction, return_masks)
    return x_hat if return_reconstruction else None, a if return_masks else None, None if image is None else errors


def backward(
    d_x_hat: Tensor | None,
    da: Tensor | None,
    g: Tensor | None,
    decoded: Tensor,
    image: Tensor | None,
    needs_image_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients to decoded and image: see `reference.backward`."""
    needs_image_gradient = needs_image_gradient and g is not None
    inputs = _inputs(decoded, image)
    d_decoded, d_image = _ops.composition_backward(d_x_hat, da, g, *inputs, needs_image_gradient)
    return d_decoded.to(decoded.dtype), d_image.to(image.dtype) if needs_image_gradient else None


def _inputs(decoded: Tensor, image: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both in dtypes that the kernels read: bfloat16 is read as it is stored."""
    dtype = arithmetic_dtype(decoded, image)
    in_place = dtype == torch.float32 and decoded.dtype == torch.bfloat16
    return decoded if in_place else decoded.to(dtype), None if image is None else image.to(dtype)
