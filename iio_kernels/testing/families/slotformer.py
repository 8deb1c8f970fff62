"""Wu et al. 2023, SlotFormer and SlotDiffusion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iio_kernels.testing.families.family import (
    CLEVR,
    Family,
    of_inputs_and_slots,
)


class SlotFormer(nn.Module):
    """Normalisation and query in one Sequential, as in the MLP; eps 1e-6; the slots alone come back."""

    def __init__(
        self, in_features: int, num_iterations: int, slot_size: int, mlp_hidden_size: int, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.num_iterations, self.eps, self.attn_scale = num_iterations, eps, slot_size**-0.5
        self.norm_inputs = nn.LayerNorm(in_features)
        self.project_q = nn.Sequential(nn.LayerNorm(slot_size), nn.Linear(slot_size, slot_size, bias=False))
        self.project_k = nn.Linear(in_features, slot_size, bias=False)
        self.project_v = nn.Linear(in_features, slot_size, bias=False)
        self.gru = nn.GRUCell(slot_size, slot_size)
        self.mlp = nn.Sequential(
            nn.LayerNorm(slot_size),
            nn.Linear(slot_size, mlp_hidden_size),
            nn.ReLU(),
            nn.Linear(mlp_hidden_size, slot_size),
        )

    def forward(self, inputs: Tensor, slots: Tensor) -> Tensor:
        bs, num_slots, slot_size = slots.shape
        inputs = self.norm_inputs(inputs)
        k = self.project_k(inputs)
        v = self.project_v(inputs)
        for _ in range(self.num_iterations):
            slots_prev = slots
            q = self.project_q(slots)
            attn_logits = self.attn_scale * torch.einsum("bnc,bmc->bnm", k, q)
            attn = F.softmax(attn_logits, dim=-1)
            attn = attn + self.eps
            attn = attn / torch.sum(attn, dim=1, keepdim=True)
            updates = torch.einsum("bnm,bnc->bmc", attn, v)
            slots = self.gru(updates.view(bs * num_slots, slot_size), slots_prev.view(bs * num_slots, slot_size))
            slots = slots.view(bs, num_slots, slot_size)
            slots = slots + self.mlp(slots)
        return slots


FAMILIES = {
    "slotformer": Family(
        lambda s: SlotFormer(s.Dx, s.T, s.D, s.H),
        of_inputs_and_slots,
        "Wu et al. 2023, SlotFormer and SlotDiffusion",
        published=CLEVR._replace(D=128, H=256),
    ),
}
