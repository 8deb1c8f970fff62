"""Locatello et al. 2020, "Object-Centric Learning with Slot Attention": the TensorFlow program, ported."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iio_kernels.testing.families.family import (
    CLEVR,
    Family,
    of_inputs,
)


class Locatello(nn.Module):
    """The paper's own, ported: Keras' epsilon in the normalisations, queries scaled, softmax over the last axis."""

    def __init__(
        self,
        num_iterations: int,
        num_slots: int,
        input_size: int,
        slot_size: int,
        mlp_hidden_size: int,
        epsilon: float = 1e-8,
    ) -> None:
        super().__init__()
        self.num_iterations, self.num_slots, self.slot_size, self.epsilon = (
            num_iterations, num_slots, slot_size, epsilon,
        )  # fmt: skip
        self.norm_inputs = nn.LayerNorm(input_size, eps=1e-3)
        self.norm_slots = nn.LayerNorm(slot_size, eps=1e-3)
        self.norm_mlp = nn.LayerNorm(slot_size, eps=1e-3)
        self.slots_mu = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, slot_size)))
        self.slots_log_sigma = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, slot_size)))
        self.project_q = nn.Linear(slot_size, slot_size, bias=False)
        self.project_k = nn.Linear(input_size, slot_size, bias=False)
        self.project_v = nn.Linear(input_size, slot_size, bias=False)
        self.gru = nn.GRUCell(slot_size, slot_size)
        self.mlp = nn.Sequential(
            nn.Linear(slot_size, mlp_hidden_size), nn.ReLU(), nn.Linear(mlp_hidden_size, slot_size)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = self.norm_inputs(inputs)
        k = self.project_k(inputs)
        v = self.project_v(inputs)
        noise = torch.randn(len(inputs), self.num_slots, self.slot_size, device=inputs.device, dtype=inputs.dtype)
        slots = self.slots_mu + torch.exp(self.slots_log_sigma) * noise
        for _ in range(self.num_iterations):
            slots_prev = slots
            slots = self.norm_slots(slots)
            q = self.project_q(slots)
            q = q * self.slot_size**-0.5
            attn_logits = torch.matmul(k, q.transpose(-2, -1))
            attn = torch.softmax(attn_logits, dim=-1)
            attn = attn + self.epsilon
            attn = attn / torch.sum(attn, dim=-2, keepdim=True)
            updates = torch.matmul(attn.transpose(-2, -1), v)
            slots = self.gru(updates.reshape(-1, self.slot_size), slots_prev.reshape(-1, self.slot_size))
            slots = slots.reshape(slots_prev.shape)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots


FAMILIES = {
    "locatello": Family(
        lambda s: Locatello(s.T, s.K, s.Dx, s.D, s.H),
        of_inputs,
        "Locatello et al. 2020, the TensorFlow program ported",
        published=CLEVR,
        draws=True,
    ),
}
