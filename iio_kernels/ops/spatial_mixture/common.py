"""What the backends of the spatial mixture share: their operands and options, and the gradients that come in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from iio_kernels.runtime.numerics import arithmetic_dtype


class Operands(NamedTuple):
    """The image and what a decoder drew of it, any strides."""

    image: Tensor  # (B, C, H, W)
    decoded: Tensor  # (B, K, C + 1, H, W)

    def dtype(self) -> torch.dtype:
        """That of the arithmetic."""
        return arithmetic_dtype(*self)


class Options(NamedTuple):
    """The standard deviation, and whether all results are asked for or the log-likelihood alone."""

    sigma: float
    everything: bool


class Incoming(NamedTuple):
    """The gradients to the results, in the dtype of the arithmetic, any strides; None to what was not used."""

    log_p: Tensor | None  # (B, H, W)
    m: Tensor | None  # (B, K, H, W), to the masks
    q: Tensor | None  # (B, K, H, W), to the posterior
