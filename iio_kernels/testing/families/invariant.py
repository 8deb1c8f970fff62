"""Biza et al. 2023, "Invariant Slot Attention": something else, keys and values differ from slot to slot."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iio_kernels.testing.families.family import (
    Family,
    inputs_of,
    slots_of,
)


class InvariantSlotAttention(nn.Module):
    """Keys and values differ for each slot: inputs carry their position as seen from the slot's own place."""

    def __init__(self, num_iter: int, input_dim: int, slot_dim: int, hidden_dim: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.num_iter, self.eps = num_iter, eps
        self.norm_inputs = nn.LayerNorm(input_dim)
        self.norm_slots = nn.LayerNorm(slot_dim)
        self.to_q = nn.Linear(slot_dim, slot_dim, bias=False)
        self.to_k = nn.Linear(input_dim, slot_dim, bias=False)
        self.to_v = nn.Linear(input_dim, slot_dim, bias=False)
        self.project_grid = nn.Linear(2, slot_dim)
        self.encode = nn.Sequential(nn.Linear(slot_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, slot_dim))
        self.gru = nn.GRUCell(slot_dim, slot_dim)

    def forward(self, inputs: Tensor, slots: Tensor, positions: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self.norm_inputs(inputs)
        k, v = self.to_k(inputs), self.to_v(inputs)
        for _ in range(self.num_iter):
            seen = self.project_grid(grid[None, None] - positions.unsqueeze(2))  # (B, K, N, D)
            keys, values = self.encode(k.unsqueeze(1) + seen), self.encode(v.unsqueeze(1) + seen)
            q = self.to_q(self.norm_slots(slots))
            attn = torch.einsum("bkd,bknd->bkn", q, keys).mul(q.shape[-1] ** -0.5).softmax(dim=1)
            attn = attn / (attn.sum(-1, keepdim=True) + self.eps)
            updates = torch.einsum("bkn,bknd->bkd", attn, values)
            positions = attn @ grid
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        return slots, positions


FAMILIES = {
    "isa": Family(
        lambda s: InvariantSlotAttention(s.T, s.Dx, s.D, s.H),
        lambda s: ((inputs_of(s), slots_of(s), torch.rand(s.B, s.K, 2), torch.rand(s.N, 2)), {}),
        "Biza et al. 2023, Invariant Slot Attention",
        projection_free=False,
        is_slot_attention=False,
    ),
}
