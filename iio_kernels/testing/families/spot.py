"""Kakogeorgiou et al. 2024, "SPOT: Self-Training with Patch-Order Permutation for Object-Centric Learning"."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iio_kernels.testing.families.family import (
    DINOSAUR,
    Family,
    Size,
    of_inputs,
)


class SPOT(nn.Module):
    """SLATE's on learnt queries, all but the last iteration without a gradient; it shows the last logits, too."""

    def __init__(
        self,
        num_iterations: int,
        num_slots: int,
        input_size: int,
        slot_size: int,
        mlp_hidden_size: int,
        num_heads: int,
        epsilon: float = 1e-8,
    ) -> None:
        super().__init__()
        self.num_iterations, self.num_heads, self.epsilon = num_iterations, num_heads, epsilon
        self.slots_init = nn.Embedding(num_slots, slot_size)
        self.norm_inputs = nn.LayerNorm(input_size)
        self.norm_slots = nn.LayerNorm(slot_size)
        self.norm_mlp = nn.LayerNorm(slot_size)
        self.project_q = nn.Linear(slot_size, slot_size, bias=False)
        self.project_k = nn.Linear(input_size, slot_size, bias=False)
        self.project_v = nn.Linear(input_size, slot_size, bias=False)
        self.gru = nn.GRUCell(slot_size, slot_size)
        self.mlp = nn.Sequential(
            nn.Linear(slot_size, mlp_hidden_size), nn.ReLU(), nn.Linear(mlp_hidden_size, slot_size)
        )

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, N_kv, _ = inputs.size()
        slots_init = self.slots_init.weight.unsqueeze(0).expand(B, -1, -1)
        N_q, D = slots_init.shape[1:]
        inputs = self.norm_inputs(inputs)
        k = self.project_k(inputs).view(B, N_kv, self.num_heads, -1).transpose(1, 2)
        v = self.project_v(inputs).view(B, N_kv, self.num_heads, -1).transpose(1, 2)
        k = (D // self.num_heads) ** (-0.5) * k
        slots = slots_init
        for i in range(self.num_iterations):
            if i == self.num_iterations - 1:
                slots = slots.detach() + slots_init - slots_init.detach()
            slots_prev = slots
            slots = self.norm_slots(slots)
            q = self.project_q(slots).view(B, N_q, self.num_heads, -1).transpose(1, 2)
            attn_logits = torch.matmul(k, q.transpose(-1, -2))
            attn = F.softmax(
                attn_logits.transpose(1, 2).reshape(B, N_kv, self.num_heads * N_q), dim=-1
            ).view(B, N_kv, self.num_heads, N_q).transpose(1, 2)  # fmt: skip
            attn_vis = attn.sum(1)
            attn = attn + self.epsilon
            attn = attn / torch.sum(attn, dim=-2, keepdim=True)
            updates = torch.matmul(attn.transpose(-1, -2), v).transpose(1, 2).reshape(B, N_q, -1)
            slots = self.gru(updates.reshape(-1, D), slots_prev.reshape(-1, D)).view(-1, N_q, D)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots, attn_vis, attn_logits


FAMILIES = {
    "spot": Family(
        lambda s: SPOT(s.T, s.K, s.Dx, s.D, s.H, s.heads),
        of_inputs,
        "Kakogeorgiou et al. 2024, SPOT",
        small=Size(heads=2),
        published=DINOSAUR,
    ),
}
