"""Slot composition in plain PyTorch: the formula itself, and its gradient written out.

    a_k     = softmax over the slots k of alpha_k
    x_hat_c = sum_k a_k rgb_{k,c}
    error   = mean over channels and pixels of (x_hat_c - x_c)^2

at every pixel, with decoded = (rgb, alpha) and the image x. (Locatello et al. 2020, "Object-Centric Learning with Slot
Attention", section 2.2.)

`forward` and `backward` are the pair that `CompositionFunction` calls and every backend offers: between them they keep
nothing that was not asked for. As the reference, autograd differentiates `forward` itself, any number of times.
Arithmetic is at least float32 whatever the storage type and autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iio_kernels.ops.compose.common import Incoming, Operands, Wanted
from iio_kernels.runtime.autograd import without_autocast


def forward(operands: Operands, wanted: Wanted) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """x_hat (B, C, H, W) and a (B, K, H, W) if asked for, and each image's error (B,) if there is an image.

    All in the dtype of the arithmetic.
    """
    decoded, image = operands
    with without_autocast(decoded.device):
        _, a, x_hat = _compose(operands)
        errors = None if image is None else (x_hat - image.to(x_hat.dtype)).square().mean((1, 2, 3))
        return x_hat if wanted.reconstruction else None, a if wanted.masks else None, errors


def backward(incoming: Incoming, operands: Operands, needs_image_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients to decoded and to image, each in its input's dtype, from those to x_hat, a and the errors, g.

    a is recomputed, then

        d_x_hat_c  += 2 g (x_hat_c - x_c) / (C H W),    d_x_c = minus what is added
        da_k       += sum_c d_x_hat_c rgb_{k,c}
        d_rgb_{k,c} = a_k d_x_hat_c
        d_alpha_k   = a_k (da_k - sum_j a_j da_j)
    """
    (d_x_hat, da, g), (decoded, image) = incoming, operands
    with without_autocast(decoded.device):
        rgb, a, x_hat = _compose(operands)
        d_x_hat = torch.zeros_like(x_hat) if d_x_hat is None else d_x_hat
        da = torch.zeros_like(a) if da is None else da
        d_image = None
        if g is not None and image is not None:
            through_error = 2 * g[:, None, None, None] * (x_hat - image.to(x_hat.dtype)) / image.shape[1:].numel()
            d_x_hat = d_x_hat + through_error
            d_image = -through_error.to(image.dtype) if needs_image_gradient else None
        da = da + (d_x_hat.unsqueeze(1) * rgb).sum(2)
        d_rgb = a.unsqueeze(2) * d_x_hat.unsqueeze(1)
        d_alpha = a * (da - (a * da).sum(1, keepdim=True))
        return torch.cat([d_rgb, d_alpha.unsqueeze(2)], 2).to(decoded.dtype), d_image


def _compose(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """rgb (B, K, C, H, W), a (B, K, H, W), x_hat (B, C, H, W), in the dtype of the arithmetic with the image."""
    decoded = operands.decoded.to(operands.dtype())
    rgb, alpha = decoded[:, :, :-1], decoded[:, :, -1]
    a = alpha.softmax(1)
    return rgb, a, (a.unsqueeze(2) * rgb).sum(1)
