"""Singh et al. 2022a, "Illiterate DALL-E Learns to Compose": SLATE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iio_kernels.testing.families.family import (
    MOVI,
    Family,
    Size,
    of_inputs_and_slots,
)


class SLATE(nn.Module):
    """Keys scaled once, one softmax over (N, heads * K), attention shown as the sum over heads."""

    def __init__(
        self,
        num_iterations: int,
        input_size: int,
        slot_size: int,
        mlp_hidden_size: int,
        heads: int,
        epsilon: float = 1e-8,
    ) -> None:
        super().__init__()
        self.num_iterations, self.slot_size, self.num_heads, self.epsilon = num_iterations, slot_size, heads, epsilon
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

    def forward(self, inputs: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        B, N_kv, _ = inputs.size()
        B, N_q, _ = slots.size()
        inputs = self.norm_inputs(inputs)
        k = self.project_k(inputs).view(B, N_kv, self.num_heads, -1).transpose(1, 2)
        v = self.project_v(inputs).view(B, N_kv, self.num_heads, -1).transpose(1, 2)
        k = ((self.slot_size // self.num_heads) ** (-0.5)) * k
        for _ in range(self.num_iterations):
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
            updates = torch.matmul(attn.transpose(-1, -2), v)
            updates = updates.transpose(1, 2).reshape(B, N_q, -1)
            slots = self.gru(updates.view(-1, self.slot_size), slots_prev.view(-1, self.slot_size))
            slots = slots.view(-1, N_q, self.slot_size)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots, attn_vis


FAMILIES = {
    "slate": Family(
        lambda s: SLATE(s.T, s.Dx, s.D, s.H, s.heads),
        of_inputs_and_slots,
        "Singh et al. 2022a, SLATE",
        small=Size(heads=2),
        published=MOVI._replace(B=50, N=32**2, K=12, T=3),
    ),
}
