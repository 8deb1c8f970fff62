"""What the backends of slot composition share: their operands, what is asked of them, the gradients that come in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from iio_kernels.runtime.numerics import arithmetic_dtype


class Operands(NamedTuple):
    """What is composed and what it is compared with, any strides."""

    decoded: Tensor  # (B, K, C + 1, H, W)
    image: Tensor | None  # (B, C, H, W)

    def dtype(self) -> torch.dtype:
        """That of the arithmetic."""
        return arithmetic_dtype(self.decoded, self.image)


class Wanted(NamedTuple):
    """Which results are asked for beside the errors, which there are wherever there is an image."""

    reconstruction: bool
    masks: bool


class Incoming(NamedTuple):
    """The gradients to the results, in the dtype of the arithmetic, any strides; None to what was not used."""

    x_hat: Tensor | None  # (B, C, H, W), to the reconstruction
    a: Tensor | None  # (B, K, H, W), to the masks
    errors: Tensor | None  # (B,)
