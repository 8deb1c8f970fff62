"""amazon-science/object-centric-learning-framework."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iio_kernels.testing.families.family import (
    DINOSAUR,
    Family,
    Size,
    inputs_of,
    mask_of,
    slots_of,
)


class OCLF(nn.Module):
    """One softmax over slots and heads, masked slots (True is out), keys of another width than slots."""

    def __init__(
        self,
        dim: int,
        feature_dim: int,
        kvq_dim: int,
        n_heads: int,
        iters: int = 3,
        eps: float = 1e-8,
        hidden_dim: int = 128,
        use_bias: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.kvq_dim, self.n_heads, self.iters, self.eps = dim, kvq_dim, n_heads, iters, eps
        self.dims_per_head = kvq_dim // n_heads
        self.scale = self.dims_per_head**-0.5
        self.to_q = nn.Linear(dim, kvq_dim, bias=use_bias)
        self.to_k = nn.Linear(feature_dim, kvq_dim, bias=use_bias)
        self.to_v = nn.Linear(feature_dim, kvq_dim, bias=use_bias)
        self.gru = nn.GRUCell(kvq_dim, dim)
        self.norm_input = nn.LayerNorm(feature_dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.ff_mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, dim)
        )

    def step(self, slots: Tensor, k: Tensor, v: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
        bs, n_slots, _ = slots.shape
        slots_prev = slots
        slots = self.norm_slots(slots)
        q = self.to_q(slots).view(bs, n_slots, self.n_heads, self.dims_per_head)
        dots = torch.einsum("bihd,bjhd->bihj", q, k) * self.scale
        if masks is not None:
            dots.masked_fill_(masks.to(torch.bool).view(bs, n_slots, 1, 1), float("-inf"))
        attn = dots.flatten(1, 2).softmax(dim=1)
        attn = attn.view(bs, n_slots, self.n_heads, -1)
        attn_before_reweighting = attn
        attn = attn + self.eps
        attn = attn / attn.sum(dim=-1, keepdim=True)
        updates = torch.einsum("bjhd,bihj->bihd", v, attn)
        slots = self.gru(updates.reshape(-1, self.kvq_dim), slots_prev.reshape(-1, self.dim))
        slots = slots.reshape(bs, -1, self.dim)
        return slots + self.ff_mlp(slots), attn_before_reweighting.mean(dim=2)

    def forward(
        self, inputs: Tensor, conditioning: Tensor, slots_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        b, n, _ = inputs.shape
        inputs = self.norm_input(inputs)
        k = self.to_k(inputs).view(b, n, self.n_heads, self.dims_per_head)
        v = self.to_v(inputs).view(b, n, self.n_heads, self.dims_per_head)
        slots, attn = conditioning, None
        for _ in range(self.iters):
            slots, attn = self.step(slots, k, v, slots_mask)
        return slots, attn


FAMILIES = {
    "oclf": Family(
        lambda s: OCLF(s.D, s.Dx, s.Dk, s.heads, s.T, hidden_dim=s.H, use_bias=True),
        lambda s: ((inputs_of(s), slots_of(s)), {"slots_mask": ~mask_of(s, s.K)}),
        "amazon-science/object-centric-learning-framework",
        small=Size(heads=2, Dk=6),
        published=DINOSAUR._replace(Dx=768, Dk=128),
    ),
}
