"""What the backends of inpainting and the IIO loss share: the inpainter's options, a draw of subsets, the limits.

The operands are image (B, C, H, W) and masks (B, K, H, W), any strides.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

#: Masks at most where all subsets are visited: they are never held, so time is the limit, 2^K a pixel.
MAX_MASKS = 16

#: Mask values below this count as 0. A softmax easily leaves a slot 1e-30 everywhere, and gradients divide by such a
#: mask's sum and by eps times it: 1e28 is within float32's range, 1e38 is not.
NEGLIGIBLE = 1e-20


class Inpainter(NamedTuple):
    """The Gaussian inpainter's options, as the operators take them: see `iio_kernels.inpaint`."""

    sigma: float
    kernel_size: int
    repeats: int
    eps: float


class Draw(NamedTuple):
    """Pairs of sets to visit. `pairs` `(B, P)`, int64: bit i says which of the two holds mask i. `weights` `(P,)`."""

    pairs: Tensor
    weights: Tensor


def without_negligible(masks: Tensor) -> Tensor:
    """The masks, 0 where they are negligible."""
    return masks.masked_fill(masks.abs() < NEGLIGIBLE, 0)
