"""Jia et al. 2023, "Improving Object-centric Learning with Query Optimization": BO-QSA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iio_kernels.testing.families.family import (
    CLEVR,
    Family,
    of_inputs,
)


class BOQSA(nn.Module):
    """Learnt queries; iterations without a gradient, then one with a straight-through gradient to the queries."""

    def __init__(
        self, num_iter: int, num_slots: int, in_dim: int, slot_dim: int, hidden_dim: int, eps: float = 1e-8
    ) -> None:
        super().__init__()
        self.num_iter, self.slot_dim, self.eps = num_iter, slot_dim, eps
        self.slots_init = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, num_slots, slot_dim)))
        self.norm_input = nn.LayerNorm(in_dim)
        self.norm_slots = nn.LayerNorm(slot_dim)
        self.norm_ffn = nn.LayerNorm(slot_dim)
        self.to_q = nn.Linear(slot_dim, slot_dim, bias=False)
        self.to_k = nn.Linear(in_dim, slot_dim, bias=False)
        self.to_v = nn.Linear(in_dim, slot_dim, bias=False)
        self.gru = nn.GRUCell(slot_dim, slot_dim)
        self.ffn = nn.Sequential(nn.Linear(slot_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, slot_dim))

    def step(self, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q = self.to_q(self.norm_slots(slots))
        attn = torch.einsum("bnd,bkd->bnk", k, q * self.slot_dim**-0.5).softmax(dim=-1)
        weights = attn / (attn.sum(dim=1, keepdim=True) + self.eps)
        updates = torch.einsum("bnk,bnd->bkd", weights, v)
        slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        return slots + self.ffn(self.norm_ffn(slots)), attn

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        queries = self.slots_init.repeat(inputs.shape[0], 1, 1)
        inputs = self.norm_input(inputs)
        k, v = self.to_k(inputs), self.to_v(inputs)
        slots = queries
        with torch.no_grad():
            for _ in range(self.num_iter - 1):
                slots, _ = self.step(slots, k, v)
        slots = slots.detach() + queries - queries.detach()
        return self.step(slots, k, v)


FAMILIES = {
    "bo_qsa": Family(
        lambda s: BOQSA(s.T, s.K, s.Dx, s.D, s.H),
        of_inputs,
        "Jia et al. 2023, BO-QSA",
        published=CLEVR,
    ),
}
