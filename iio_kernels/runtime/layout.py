"""How the pictures lie in memory that a decoder drew for slots, `decoded (B, K, C + 1, H, W)`."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(decoded: Tensor) -> bool:
    """Whether a pixel's channels are nearer to each other than to the next pixel's."""
    return decoded.stride(2) < decoded.stride(4)


def new_like(decoded: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for as many numbers in decoded's own layout, without gaps."""
    B, K, channels, H, W = decoded.shape
    if is_channels_last(decoded):
        return decoded.new_empty((B, K, H, W, channels), dtype=dtype).permute(0, 1, 4, 2, 3)
    return decoded.new_empty(decoded.shape, dtype=dtype)
