"""The plain module with epsilon in the denominator alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iio_kernels.testing.families.family import (
    Family,
    of_inputs_and_slots,
)


class Denominator(nn.Module):
    """The plain module as those write it who guard the division alone."""

    def __init__(self, input_dim: int, slot_dim: int, hidden_dim: int, num_iters: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_iters, self.eps = num_iters, eps
        self.ln_in = nn.LayerNorm(input_dim)
        self.ln_slots = nn.LayerNorm(slot_dim)
        self.ln_mlp = nn.LayerNorm(slot_dim)
        self.q = nn.Linear(slot_dim, slot_dim, bias=False)
        self.k = nn.Linear(input_dim, slot_dim, bias=False)
        self.v = nn.Linear(input_dim, slot_dim, bias=False)
        self.gru = nn.GRUCell(slot_dim, slot_dim)
        self.mlp = nn.Sequential(nn.Linear(slot_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, slot_dim))

    def forward(self, x: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        x = self.ln_in(x)
        k, v = self.k(x), self.v(x)
        for _ in range(self.num_iters):
            prev = slots
            q = self.q(self.ln_slots(slots))
            attn = torch.bmm(q, k.permute(0, 2, 1)).div(q.size(-1) ** 0.5).softmax(1)
            weights = attn / (attn.sum(-1, keepdim=True) + self.eps)
            updates = torch.bmm(weights, v)
            slots = self.gru(updates.flatten(0, 1), prev.flatten(0, 1)).view(prev.shape)
            slots = slots + self.mlp(self.ln_mlp(slots))
        return slots, attn


FAMILIES = {
    "denominator": Family(
        lambda s: Denominator(s.Dx, s.D, s.H, s.T),
        of_inputs_and_slots,
        "eps in the denominator, otherwise Locatello",
    ),
}
