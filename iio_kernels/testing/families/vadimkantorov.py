"""The ablation without GRU and MLP, with and without a residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iio_kernels.testing.families.family import (
    Family,
    of_inputs,
)


class VadimKantorov(nn.Module):
    """No GRU and no MLP of normalised slots: the means replace the slots, or are added to them."""

    def __init__(
        self, num_iter: int, num_slots: int, input_dim: int, slot_dim: int, residual: bool, eps: float = 1e-8
    ) -> None:
        super().__init__()
        self.num_iter, self.num_slots, self.residual, self.eps = num_iter, num_slots, residual, eps
        self.slots_mu = nn.Parameter(torch.randn(1, 1, slot_dim))
        self.slots_log_sigma = nn.Parameter(torch.randn(1, 1, slot_dim))
        self.norm_inputs = nn.LayerNorm(input_dim)
        self.norm_slots = nn.LayerNorm(slot_dim)
        self.fc_q = nn.Linear(slot_dim, slot_dim)
        self.fc_k = nn.Linear(input_dim, slot_dim)
        self.fc_v = nn.Linear(input_dim, slot_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_inputs(x)
        k, v = self.fc_k(x), self.fc_v(x)
        noise = torch.randn(x.shape[0], self.num_slots, k.shape[-1], device=x.device, dtype=x.dtype)
        slots = torch.addcmul(self.slots_mu, self.slots_log_sigma.exp(), noise)
        for _ in range(self.num_iter):
            q = self.fc_q(self.norm_slots(slots))
            attn = (k @ q.mT).mul(k.shape[-1] ** -0.5).softmax(dim=-1).add(self.eps)
            updates = attn.div(attn.sum(dim=1, keepdim=True)).mT @ v
            slots = slots + updates if self.residual else updates
        return slots


FAMILIES = {
    "vadimkantorov": Family(
        lambda s: VadimKantorov(s.T, s.K, s.Dx, s.D, residual=False),
        of_inputs,
        "the ablation without GRU and MLP",
        draws=True,
    ),
    "vadimkantorov_residual": Family(
        lambda s: VadimKantorov(s.T, s.K, s.Dx, s.D, residual=True),
        of_inputs,
        "the ablation without GRU and MLP, with a residual",
        draws=True,
    ),
}
