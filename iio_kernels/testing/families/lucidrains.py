"""lucidrains/slot-attention, with one head and with several."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, einsum, nn

from iio_kernels.testing.families.family import (
    SQUARE,
    TETROMINOES,
    Family,
    inputs_of,
    of_inputs,
)


class Lucidrains(nn.Module):
    """Softmax over the second axis of (B, K, N), biases, the number of slots per call."""

    def __init__(self, num_slots: int, dim: int, iters: int = 3, eps: float = 1e-8, hidden_dim: int = 128) -> None:
        super().__init__()
        self.dim, self.num_slots, self.iters, self.eps = dim, num_slots, iters, eps
        self.scale = dim**-0.5
        self.slots_mu = nn.Parameter(torch.randn(1, 1, dim))
        self.slots_logsigma = nn.Parameter(nn.init.xavier_uniform_(torch.zeros(1, 1, dim)))
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.gru = nn.GRUCell(dim, dim)
        hidden_dim = max(dim, hidden_dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, dim))
        self.norm_input = nn.LayerNorm(dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.norm_pre_ff = nn.LayerNorm(dim)

    def forward(self, inputs: Tensor, num_slots: int | None = None) -> Tensor:
        b, _, d = inputs.shape
        n_s = num_slots if num_slots is not None else self.num_slots
        mu = self.slots_mu.expand(b, n_s, -1)
        sigma = self.slots_logsigma.exp().expand(b, n_s, -1)
        slots = mu + sigma * torch.randn(mu.shape, device=inputs.device, dtype=inputs.dtype)
        inputs = self.norm_input(inputs)
        k, v = self.to_k(inputs), self.to_v(inputs)
        for _ in range(self.iters):
            slots_prev = slots
            slots = self.norm_slots(slots)
            q = self.to_q(slots)
            dots = einsum("bid,bjd->bij", q, k) * self.scale
            attn = dots.softmax(dim=1) + self.eps
            attn = attn / attn.sum(dim=-1, keepdim=True)
            updates = einsum("bjd,bij->bid", v, attn)
            slots = self.gru(updates.reshape(-1, d), slots_prev.reshape(-1, d))
            slots = slots.reshape(b, -1, d)
            slots = slots + self.mlp(self.norm_pre_ff(slots))
        return slots


class LucidrainsMultiHead(nn.Module):
    """A softmax for each head, `F.normalize` for the mean, and a projection of the heads together."""

    def __init__(
        self,
        num_slots: int,
        dim: int,
        heads: int = 4,
        dim_head: int = 64,
        iters: int = 3,
        eps: float = 1e-8,
        hidden_dim: int = 128,
    ) -> None:
        super().__init__()
        self.dim, self.num_slots, self.iters, self.eps, self.heads = dim, num_slots, iters, eps, heads
        self.scale = dim_head**-0.5
        self.slots_mu = nn.Parameter(torch.randn(1, 1, dim))
        self.slots_logsigma = nn.Parameter(nn.init.xavier_uniform_(torch.zeros(1, 1, dim)))
        self.norm_input = nn.LayerNorm(dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim_head * heads)
        self.to_k = nn.Linear(dim, dim_head * heads)
        self.to_v = nn.Linear(dim, dim_head * heads)
        self.combine_heads = nn.Linear(dim_head * heads, dim)
        self.gru = nn.GRUCell(dim, dim)
        hidden_dim = max(dim, hidden_dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, dim))
        self.norm_pre_ff = nn.LayerNorm(dim)

    def split_heads(self, t: Tensor) -> Tensor:
        return t.reshape(*t.shape[:2], self.heads, -1).permute(0, 2, 1, 3)

    def forward(self, inputs: Tensor, num_slots: int | None = None) -> Tensor:
        b, n_s = inputs.shape[0], num_slots if num_slots is not None else self.num_slots
        mu = self.slots_mu.expand(b, n_s, -1)
        sigma = self.slots_logsigma.exp().expand(b, n_s, -1)
        slots = mu + sigma * torch.randn(mu.shape, device=inputs.device, dtype=inputs.dtype)
        inputs = self.norm_input(inputs)
        k, v = map(self.split_heads, (self.to_k(inputs), self.to_v(inputs)))
        for _ in range(self.iters):
            slots_prev = slots
            slots = self.norm_slots(slots)
            q = self.split_heads(self.to_q(slots))
            dots = einsum("... i d, ... j d -> ... i j", q, k) * self.scale
            attn = dots.softmax(dim=-2)
            attn = F.normalize(attn + self.eps, p=1, dim=-1)
            updates = einsum("... j d, ... i j -> ... i d", v, attn)
            updates = self.combine_heads(updates.permute(0, 2, 1, 3).flatten(2))
            slots = self.gru(updates.reshape(b * n_s, -1), slots_prev.reshape(b * n_s, -1)).view(b, n_s, -1)
            slots = slots + self.mlp(self.norm_pre_ff(slots))
        return slots


FAMILIES = {
    "lucidrains": Family(
        lambda s: Lucidrains(s.K, s.D, s.T, hidden_dim=s.H),
        lambda s: ((inputs_of(s),), {"num_slots": s.K + 1}),
        "lucidrains/slot-attention",
        small=SQUARE,
        draws=True,
    ),
    "lucidrains_multi_head": Family(
        lambda s: LucidrainsMultiHead(s.K, s.D, s.heads, s.Dk // s.heads, s.T, hidden_dim=s.H),
        of_inputs,
        "lucidrains/slot-attention, multi-head",
        small=SQUARE._replace(heads=2, Dk=6),
        published=TETROMINOES._replace(Dk=256, heads=4),
        draws=True,
    ),
}
