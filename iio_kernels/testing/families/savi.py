"""Kipf et al. 2022, "Conditional Object-Centric Learning from Video": SAVi."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iio_kernels.testing.families.family import (
    MOVI,
    Family,
    Size,
    inputs_of,
    slots_of,
)


class SAVi(nn.Module):
    """Heads as the third axis, one softmax over them and slots, eps in the denominator; all iterations but no mask."""

    def __init__(
        self,
        input_size: int,
        slot_size: int,
        qkv_size: int,
        mlp_size: int,
        num_heads: int,
        num_iterations: int = 1,
        epsilon: float = 1e-8,
    ) -> None:
        super().__init__()
        self.num_iterations, self.num_heads, self.epsilon = num_iterations, num_heads, epsilon
        self.layernorm_input = nn.LayerNorm(input_size)
        self.layernorm_q = nn.LayerNorm(slot_size)
        self.layernorm_mlp = nn.LayerNorm(slot_size)
        self.dense_q = nn.Linear(slot_size, qkv_size, bias=False)
        self.dense_k = nn.Linear(input_size, qkv_size, bias=False)
        self.dense_v = nn.Linear(input_size, qkv_size, bias=False)
        self.gru = nn.GRUCell(qkv_size, slot_size)
        self.mlp = nn.Sequential(nn.Linear(slot_size, mlp_size), nn.ReLU(), nn.Linear(mlp_size, slot_size))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        query = query / query.shape[-1] ** 0.5
        attn = torch.einsum("bqhd,bkhd->bhqk", query, key)
        B, H, Q, N = attn.shape
        attn = attn.reshape(B, H * Q, N).softmax(dim=1).reshape(B, H, Q, N)
        normalizer = attn.sum(dim=-1, keepdim=True) + self.epsilon
        return torch.einsum("bhqk,bkhd->bqhd", attn / normalizer, value), attn

    def forward(self, slots: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self.layernorm_input(inputs)
        k = self.dense_k(inputs).unflatten(-1, (self.num_heads, -1))
        v = self.dense_v(inputs).unflatten(-1, (self.num_heads, -1))
        for _ in range(self.num_iterations):
            q = self.dense_q(self.layernorm_q(slots)).unflatten(-1, (self.num_heads, -1))
            updates, attn = self.attend(q, k, v)
            slots = self.gru(updates.flatten(2).flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = slots + self.mlp(self.layernorm_mlp(slots))
        return slots, attn


FAMILIES = {
    "savi": Family(
        lambda s: SAVi(s.Dx, s.D, s.Dk, s.H, s.heads, s.T),
        lambda s: ((slots_of(s), inputs_of(s)), {}),
        "Kipf et al. 2022, SAVi",
        small=Size(heads=2, Dk=6),
        published=MOVI._replace(D=128, Dk=128, H=256, T=1),
    ),
}
