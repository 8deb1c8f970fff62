"""Genera1Z/VQ-VFM-OCL."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iio_kernels.testing.families.family import (
    DINOSAUR,
    Family,
    inputs_of,
    mask_of,
    slots_of,
)


class Genera1Z(nn.Module):
    """Attention in float32 under autocast and cast back, masked slots (True takes part), iterations per call."""

    def __init__(self, num_iter: int, embed_dim: int, ffn_dim: int, kv_dim: int) -> None:
        super().__init__()
        self.num_iter = num_iter
        self.norm1q = nn.LayerNorm(embed_dim)
        self.proj_q = nn.Linear(embed_dim, embed_dim, bias=False)
        self.norm1kv = nn.LayerNorm(kv_dim)
        self.proj_k = nn.Linear(kv_dim, embed_dim, bias=False)
        self.proj_v = nn.Linear(kv_dim, embed_dim, bias=False)
        self.rnn = nn.GRUCell(embed_dim, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.ffn = nn.Sequential(nn.Linear(embed_dim, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, embed_dim))

    @staticmethod
    def inverted_attention(
        q: Tensor, k: Tensor, v: Tensor, smask: Tensor | None, eps: float = 1e-5
    ) -> tuple[Tensor, Tensor]:
        kind = v.dtype
        with torch.autocast(q.device.type, enabled=False):
            wide = torch.promote_types(kind, torch.float32)
            q, k, v = q.to(wide), k.to(wide), v.to(wide)
            logit = torch.einsum("bqc,bkc->bqk", q * q.size(2) ** -0.5, k)
            if smask is not None:
                logit = logit.where(smask[:, :, None], -torch.inf)
            a0 = logit.softmax(1)
            a = a0 / (a0.sum(2, keepdim=True) + eps)
            return torch.einsum("bqk,bkc->bqc", a, v).to(kind), a0

    def forward(
        self, input: Tensor, query: Tensor, smask: Tensor | None = None, num_iter: int | None = None
    ) -> tuple[Tensor, Tensor]:
        kv = self.norm1kv(input)
        k, v = self.proj_k(kv), self.proj_v(kv)
        q = query
        for _ in range(num_iter or self.num_iter):
            x = q
            u, a = self.inverted_attention(self.proj_q(self.norm1q(q)), k, v, smask)
            y = self.rnn(u.flatten(0, 1), x.flatten(0, 1)).view_as(x)
            q = y + self.ffn(self.norm2(y))
        return q, a


FAMILIES = {
    "genera1z": Family(
        lambda s: Genera1Z(s.T, s.D, s.H, s.Dx),
        lambda s: ((inputs_of(s), slots_of(s)), {"smask": mask_of(s, s.K)}),
        "Genera1Z/VQ-VFM-OCL",
        published=DINOSAUR,
    ),
}
