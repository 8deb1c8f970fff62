"""What the inpainting functions check before any work, and what they choose by it: the backend, the draw of subsets."""

from __future__ import annotations

import torch
from torch import Tensor

from iio_kernels.ops.iio_loss import sampling
from iio_kernels.ops.iio_loss.common import Draw, Inpainter
from iio_kernels.runtime import backends, checks


def backend_for(
    image: Tensor,
    masks: Tensor,
    inpainter: Inpainter,
    backend: str,
    *,
    min_masks: int,
    enumerates: bool = True,
) -> str:
    """Check tensors and options and return the name of the backend that will serve."""
    checks.tensor("image", image, "(B, C, H, W)")
    checks.tensor("masks", masks, "(B, K, H, W)")
    B, C, H, W = image.shape
    if min(C, H, W) == 0:
        raise ValueError(f"image: expected at least one channel and one pixel, got shape {tuple(image.shape)}")
    K = masks.shape[1]
    if (masks.shape[0], *masks.shape[2:]) != (B, H, W):
        raise ValueError(
            f"masks: expected shape ({B}, K, {H}, {W}) to match image {tuple(image.shape)}, got {tuple(masks.shape)}"
        )
    if min_masks > K:
        raise ValueError(f"masks: expected at least {min_masks} masks in dimension 1, got {K}")
    checks.number("sigma", inpainter.sigma, above=0)
    checks.integer("kernel_size", inpainter.kernel_size, at_least=1)
    if inpainter.kernel_size % 2 == 0:
        raise ValueError(f"kernel_size: expected an odd number of taps, got {inpainter.kernel_size}")
    if inpainter.kernel_size > min(H, W):
        raise ValueError(
            f"kernel_size: expected at most the image's smaller side, {min(H, W)}, got {inpainter.kernel_size}"
        )
    checks.integer("repeats", inpainter.repeats, at_least=1)
    checks.number("eps", inpainter.eps, at_least=0)
    name = backends.choose("iio_loss", backend, checks.same_device(image=image, masks=masks))
    limit = backends.implementation("iio_loss", name).MAX_MASKS
    if enumerates and limit < K:
        gibibytes, visits = ((C + 1) * B * H * W * 2.0 ** min(K - shift, 1000) for shift in (28, 0))
        cost = f"{gibibytes:.3g} GiB in float32, several times over" if name == "reference" else f"{visits:.3g} sums"
        raise ValueError(
            f"masks: expected at most {limit} masks for backend {name!r}, got {K}: their 2**{K} subsets would take "
            f"about {cost}; for iio_loss, subsets= estimates it from some of them"
        )
    return name


def drawn(image: Tensor, masks: Tensor, subsets: int | None, generator: torch.Generator | None) -> Draw | None:
    """The sets that `iio_loss` is to visit, None for all; checks both options."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    if subsets is None:
        if generator is not None:
            raise ValueError("generator: expected None where subsets is None and nothing is drawn, got one")
        return None
    K, device = masks.shape[1], image.device
    if K > sampling.MAX_MASKS:
        raise ValueError(f"masks: expected at most {sampling.MAX_MASKS} masks with subsets=, got {K}")
    if isinstance(subsets, bool) or not isinstance(subsets, int):
        raise TypeError(f"subsets: expected an int or None, got {type(subsets).__name__}")
    if subsets < sampling.least(K):
        raise ValueError(
            f"subsets: expected at least {sampling.least(K)} for {K} masks, a set of each size and its complement, "
            f"got {subsets}"
        )
    if generator is not None and generator.device != device and generator.device != torch.device(device.type):
        raise ValueError(f"generator: expected one on the images' device, {device}, got one on {generator.device}")
    return sampling.draw(image.shape[0], K, subsets, device, generator)
