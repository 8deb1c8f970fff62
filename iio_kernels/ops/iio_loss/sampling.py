"""Which subsets of the masks a sampled IIO loss visits, and how much each counts.

All subsets but the empty and the full set fall into pairs, a set S and its complement, of which every mask m is in one
and outside of the other: each pair has one term of every T_m = sum_{S without m} e_S. A draw is a list of pairs with
weights w such that the sum of w e_S over the list's sets without m has the expectation T_m for every m.

The list begins as a design, P pairs that depend on K and P alone. Then a random permutation renames the masks, another
one for each image: with that, a pair whose smaller set has s masks is any of the N_s pairs of that size with the same
probability. So with the weight N_s / n_s any design is unbiased that has n_s >= 1 pairs of each size, and this one is
made to vary little with the permutation.

- How many pairs of each size: Neyman's allocation, n_s in proportion to N_s times the standard deviation of a pair's
  term. That falls with the number of masks that a prediction is made from, about as 1 / s. No n_s exceeds N_s, so that
  all pairs there are make the exact loss.
- Which pairs: no pair twice, and masks that are together in one are to be apart in another. With x = +1 for a mask in S
  and -1 for one outside, each next pair is the one that adds least to the norm of sum w x x^T. Then what a pair's term
  owes to two masks being together nearly cancels over the list, under every permutation; what it owes to single masks
  cancels within the pair.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import random

import torch
from torch import Tensor

from iio_kernels.ops.iio_loss.common import Draw
from iio_kernels.runtime.torch_private import constant_when_compiled

#: Masks in a draw at most, whichever backend.
MAX_MASKS = 32

#: Of a size with more pairs than this, as many random ones are looked at.
CANDIDATES = 1024


def least(K: int) -> int:
    """The fewest sets of a draw: a pair of each size."""
    return 2 * (K // 2)


def draw(B: int, K: int, subsets: int, device: torch.device, generator: torch.Generator | None = None) -> Draw:
    """Independent lists of `subsets` sets for B images: random numbers and their argsort, all on the device."""
    # An index is a plain number under torch.compile, too.
    design, weights = _on_device(operator.index(K), operator.index(subsets) // 2, device)
    # In double no two numbers are alike, so every order is equally likely.
    names = torch.empty(B, K, device=device, dtype=torch.float64).uniform_(generator=generator).argsort(1)
    return Draw(renamed(design, names), weights)


def renamed(words: Tensor, names: Tensor) -> Tensor:
    """(B, P): the words (P,) with bit names[b, i] moved to bit i."""
    bits = words >> names.unsqueeze(2) & 1  # (B, K, P)
    return (bits << torch.arange(names.shape[1], device=names.device).unsqueeze(1)).sum(1)


@constant_when_compiled
def _on_device(K: int, pairs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The design as tensors (P,), copied once to each device: later draws can be captured in a CUDA graph."""
    return _copied(K, pairs, device)


@functools.lru_cache(maxsize=64)
def _copied(K: int, pairs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    words, weights = design(K, pairs)
    return (
        torch.tensor(words, dtype=torch.int64, device=device),
        torch.tensor(weights, dtype=torch.float64, device=device),
    )


def design(K: int, pairs: int) -> tuple[list[int], list[float]]:
    """P = `pairs` distinct pairs, or all there are if these are fewer, each with its weight."""
    words: list[int] = []
    weights: list[float] = []
    together = torch.zeros(K, K, dtype=torch.float64, device="cpu")  # sum of w x x^T
    for size, count in _allocation(K, pairs).items():
        weight = _number(K, size) / count
        candidates = _candidates(K, size, count)
        signs = [[1.0 if word >> i & 1 else -1.0 for i in range(K)] for word in candidates]
        x = torch.tensor(signs, dtype=torch.float64, device="cpu")
        chosen = range(count) if count == len(candidates) else _least_together(x, together, weight, count)
        together += weight * x[list(chosen)].T @ x[list(chosen)]
        words += [candidates[k] for k in chosen]
        weights += [weight] * count
    return words, weights


def _least_together(x: Tensor, together: Tensor, weight: float, count: int) -> list[int]:
    """Of the rows of x `count`, one by one: that which adds least to the norm of `together` + sum of weight x x^T."""
    cost, chosen = (x @ together * x).sum(1), []
    for _ in range(count):
        k = int(cost.argmin())
        chosen.append(k)
        cost += weight * (x @ x[k]) ** 2
        cost[k] = math.inf
    return chosen


def _number(K: int, size: int) -> int:
    """How many pairs have a set of so many masks, at most half of them."""
    return math.comb(K, size) // (2 if 2 * size == K else 1)


def _allocation(K: int, pairs: int) -> dict[int, int]:
    """How many pairs of each size: one, then each next where the variance sum_s (N_s / s)^2 / n_s falls most by it."""
    counts = dict.fromkeys(range(1, K // 2 + 1), 1)
    gains = {size: (_number(K, size) / size) ** 2 / 2 for size in counts if _number(K, size) > 1}
    for _ in range(pairs - len(counts)):
        if not gains:
            break
        size = max(gains, key=gains.__getitem__)
        counts[size] += 1
        n = counts[size]
        if n == _number(K, size):
            del gains[size]
        else:
            gains[size] *= (n - 1) / (n + 1)  # 1 / n - 1 / (n + 1), from 1 / (n - 1) - 1 / n
    return counts


def _candidates(K: int, size: int, count: int) -> list[int]:
    """Distinct pairs of that size, as words: all, or where they are many some at random, the same at each call."""
    half = 2 * size == K  # then of a pair both sets have this size: mask 0 is in the one that stands for it
    rest = range(1 if half else 0, K)
    most = max(CANDIDATES, 4 * count)
    if _number(K, size) <= most:
        sets = list(itertools.combinations(rest, size - half))
    else:
        shuffle, found = random.Random(size), dict[tuple[int, ...], None]()
        while len(found) < most:
            found[tuple(sorted(shuffle.sample(rest, size - half)))] = None
        sets = list(found)
    return [sum(1 << i for i in members) + half for members in sets]
