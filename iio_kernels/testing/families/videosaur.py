"""Zadaianchuk et al. 2023, "Object-Centric Learning for Real-World Videos": VideoSAUR."""

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


class VideoSAUR(nn.Module):
    """The GRU's state is the normalised slots; inputs masked in A, before eps; a dict of results."""

    def __init__(
        self, inp_dim: int, slot_dim: int, kvq_dim: int, hidden_dim: int, n_iters: int = 3, eps: float = 1e-8
    ) -> None:
        super().__init__()
        self.n_iters, self.eps, self.scale = n_iters, eps, kvq_dim**-0.5
        self.to_k = nn.Linear(inp_dim, kvq_dim, bias=False)
        self.to_v = nn.Linear(inp_dim, kvq_dim, bias=False)
        self.to_q = nn.Linear(slot_dim, kvq_dim, bias=False)
        self.norm_features = nn.LayerNorm(inp_dim)
        self.norm_slots = nn.LayerNorm(slot_dim)
        self.gru = nn.GRUCell(input_size=kvq_dim, hidden_size=slot_dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(slot_dim), nn.Linear(slot_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, slot_dim)
        )

    def step(self, slots: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        slots = self.norm_slots(slots)
        queries = self.to_q(slots)
        dots = torch.einsum("bsd, bfd -> bsf", queries, keys) * self.scale
        pre_norm_attn = torch.softmax(dots, dim=1)
        if mask is not None:
            pre_norm_attn = pre_norm_attn * mask.unsqueeze(1)
        attn = pre_norm_attn + self.eps
        attn = attn / attn.sum(-1, keepdim=True)
        updates = torch.einsum("bsf, bfd -> bsd", attn, values)
        updated_slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1))
        slots = updated_slots.unflatten(0, slots.shape[:2])
        return slots + self.mlp(slots), pre_norm_attn

    def forward(
        self, slots: Tensor, features: Tensor, mask: Tensor | None = None, n_iters: int | None = None
    ) -> dict[str, Tensor]:
        features = self.norm_features(features)
        keys = self.to_k(features)
        values = self.to_v(features)
        for _ in range(self.n_iters if n_iters is None else n_iters):
            slots, pre_norm_attn = self.step(slots, keys, values, mask)
        return {"slots": slots, "masks": pre_norm_attn}


FAMILIES = {
    "videosaur": Family(
        lambda s: VideoSAUR(s.Dx, s.D, s.Dk, s.H, s.T),
        lambda s: ((slots_of(s), inputs_of(s)), {"mask": mask_of(s, s.N)}),
        "Zadaianchuk et al. 2023, VideoSAUR",
        small=Size(Dk=6),
        published=DINOSAUR._replace(D=128, Dk=128, H=512),
    ),
}
