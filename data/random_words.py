"""Random numbers by counting: the n-th word of a stream is a hash of its key and n.

Nothing is drawn in sequence, so every scene of a stream can be drawn alone, in any batch and order, and in integer
arithmetic alone, so it is the same on a CPU and a GPU. The hash is SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", 2014). Torch has no arithmetic on unsigned 64-bit integers, but sums and products of
signed ones wrap around to the same bits; only the shift to the right has to be masked.
"""

import torch
from torch import Tensor

__all__ = ["below", "high", "low", "mix", "scene_keys", "unit", "words"]


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


GOLDEN = _signed(0x9E3779B97F4A7C15)


def mix(x: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser, a bijection on 64-bit words: int64 of any shape."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def scene_keys(seed: int, numbers: Tensor) -> Tensor:
    """Hash a key for each of the scenes `numbers`, int64 (B,), of stream `seed`: int64 (B,)."""
    return mix(mix(torch.tensor(seed, device=numbers.device)) + numbers)


def words(key: Tensor, counters: Tensor) -> Tensor:
    """Compute outputs number `counters`, int64 (T,) or (B, T), of generators with states `key` (B,): int64 (B, T)."""
    return mix(key[:, None] + (counters + 1) * GOLDEN)


def high(word: Tensor) -> Tensor:
    """Take the upper 32 bits, as an integer in `[0, 2**32)`."""
    return _shift(word, 32)


def low(word: Tensor) -> Tensor:
    """Take the lower 32 bits."""
    return word & 0xFFFFFFFF


def below(half: Tensor, bound: Tensor | int) -> Tensor:
    """Map to uniform integers in `[0, bound)` from 32-bit ones, even to within `bound / 2**32`."""
    return (half * bound) >> 32


def unit(half: Tensor) -> Tensor:
    """Map to uniform float32 in `[0, 1)`, multiples of 2**-24, from 32-bit integers."""
    return (half >> 8).float() * 2.0**-24


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift to the right that brings in zeros whatever the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
