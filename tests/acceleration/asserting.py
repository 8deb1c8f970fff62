"""Slot attention whose loop asserts; apart from the tests, in whose own assertions pytest puts code of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Iterations(nn.Module):
    """Three iterations without a GRU, and something after each."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 6), nn.Linear(10, 6), nn.Linear(10, 8)

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        k, v = self.to_k(x), self.to_v(x)
        for i in range(3):
            A = (self.to_q(slots) @ k.mT).softmax(1) + 1e-8
            slots = slots + A / A.sum(-1, keepdim=True) @ v
            self.between(i, slots)
        return slots

    def between(self, i: int, slots: Tensor) -> None:
        raise NotImplementedError


class Asserts(Iterations):
    def between(self, i: int, slots: Tensor) -> None:
        assert torch.sum(torch.isnan(slots)) == 0, f"NaN in iteration {i}"


class AssertsNot(Iterations):
    def between(self, i: int, slots: Tensor) -> None:
        assert not torch.isnan(slots).any(), f"NaN in iteration {i} of {tuple(slots.shape)}"


class AssertsWithout(Iterations):
    def between(self, i: int, slots: Tensor) -> None:
        assert torch.isfinite(slots).all(), "NaN in iteration 0"


class Raises(Iterations):
    def between(self, i: int, slots: Tensor) -> None:
        if torch.isnan(slots).any():
            raise AssertionError("NaN in iteration " + str(i))
