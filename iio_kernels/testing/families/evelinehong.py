"""evelinehong/slot-attention-pytorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iio_kernels.testing.families.family import (
    CLEVR,
    SQUARE,
    Family,
    of_inputs,
)


class Evelinehong(nn.Module):
    """The deviation itself is learnt, and drawn with `torch.normal`, which has no gradient; an MLP of two layers."""

    def __init__(self, num_slots: int, dim: int, iters: int = 3, eps: float = 1e-8, hidden_dim: int = 128) -> None:
        super().__init__()
        self.num_slots, self.iters, self.eps = num_slots, iters, eps
        self.scale = dim**-0.5
        self.slots_mu = nn.Parameter(torch.randn(1, 1, dim))
        self.slots_sigma = nn.Parameter(torch.rand(1, 1, dim))
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.gru = nn.GRUCell(dim, dim)
        hidden_dim = max(dim, hidden_dim)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.norm_input = nn.LayerNorm(dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.norm_pre_ff = nn.LayerNorm(dim)

    def forward(self, inputs: Tensor, num_slots: int | None = None) -> Tensor:
        b, _, d = inputs.shape
        n_s = num_slots if num_slots is not None else self.num_slots
        slots = torch.normal(self.slots_mu.expand(b, n_s, -1), self.slots_sigma.expand(b, n_s, -1))
        inputs = self.norm_input(inputs)
        k, v = self.to_k(inputs), self.to_v(inputs)
        for _ in range(self.iters):
            slots_prev = slots
            slots = self.norm_slots(slots)
            q = self.to_q(slots)
            dots = torch.einsum("bid,bjd->bij", q, k) * self.scale
            attn = dots.softmax(dim=1) + self.eps
            attn /= attn.sum(dim=-1, keepdim=True)
            updates = torch.einsum("bjd,bij->bid", v, attn)
            slots = self.gru(updates.reshape(-1, d), slots_prev.reshape(-1, d))
            slots = slots.reshape(b, -1, d)
            slots = slots + self.fc2(F.relu(self.fc1(self.norm_pre_ff(slots))))
        return slots


FAMILIES = {
    "evelinehong": Family(
        lambda s: Evelinehong(s.K, s.D, s.T, hidden_dim=s.H),
        of_inputs,
        "evelinehong/slot-attention-pytorch",
        small=SQUARE,
        published=CLEVR,
        draws=True,
    ),
}
