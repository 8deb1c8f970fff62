"""The random numbers of a run: each a function of its seed and the step."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from training.config import Config


def hash_seed(*numbers: int) -> int:
    """One seed for several numbers: neighbouring seeds and steps must not give related random streams."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")


def draw_noise(config: Config, batch: int, shape: tuple[int, ...], *seed: int) -> Tensor:
    """Standard normal numbers of `shape` for each of a batch, by the run's seed and what else names the batch."""
    generator = torch.Generator(config.device).manual_seed(hash_seed(config.seed, *seed))
    return torch.randn(batch, *shape, generator=generator, device=config.device)
