"""Zhang et al. 2023, unlocking slot attention by optimal transport: something else, there is no softmax over slots."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iio_kernels.testing.families.family import (
    Family,
    of_inputs_and_slots,
)


class SinkhornSlotAttention(nn.Module):
    """Attention of balanced assignment: rows and columns normalised in turn, instead of one softmax over slots."""

    def __init__(
        self, num_iter: int, input_dim: int, slot_dim: int, hidden_dim: int, rounds: int = 5, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.num_iter, self.rounds, self.temperature = num_iter, rounds, temperature
        self.norm_inputs = nn.LayerNorm(input_dim)
        self.norm_slots = nn.LayerNorm(slot_dim)
        self.norm_mlp = nn.LayerNorm(slot_dim)
        self.to_q = nn.Linear(slot_dim, slot_dim, bias=False)
        self.to_k = nn.Linear(input_dim, slot_dim, bias=False)
        self.to_v = nn.Linear(input_dim, slot_dim, bias=False)
        self.gru = nn.GRUCell(slot_dim, slot_dim)
        self.mlp = nn.Sequential(nn.Linear(slot_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, slot_dim))

    def forward(self, inputs: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self.norm_inputs(inputs)
        k, v = self.to_k(inputs), self.to_v(inputs)
        for _ in range(self.num_iter):
            q = self.to_q(self.norm_slots(slots))
            log_plan = torch.einsum("bkd,bnd->bkn", q, k) * q.shape[-1] ** -0.5 / self.temperature
            for _ in range(self.rounds):
                log_plan = log_plan - log_plan.logsumexp(-1, keepdim=True)
                log_plan = log_plan - log_plan.logsumexp(-2, keepdim=True)
            attn = log_plan.exp()
            updates = torch.einsum("bkn,bnd->bkd", attn / attn.sum(-1, keepdim=True), v)
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots, attn


FAMILIES = {
    "sinkhorn": Family(
        lambda s: SinkhornSlotAttention(s.T, s.Dx, s.D, s.H),
        of_inputs_and_slots,
        "Zhang et al. 2023, unlocking slot attention by optimal transport",
        is_slot_attention=False,
    ),
}
