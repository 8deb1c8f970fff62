"""Singh et al. 2022b, "Simple Unsupervised Object-Centric Learning for Complex and Naturalistic Videos": STEVE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iio_kernels.testing.families.family import (
    MOVI,
    Family,
)


class STEVE(nn.Module):
    """Video: keys and values of all frames at once, a predictor between frames, no MLP in a frame's last iteration."""

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
        self.slot_mu = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, slot_size)))
        self.slot_log_sigma = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, slot_size)))
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
        self.predictor = nn.TransformerEncoderLayer(
            slot_size, nhead=2, dim_feedforward=4 * slot_size, dropout=0.0, batch_first=True, norm_first=True
        )

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        B, T, _, _ = inputs.size()
        slots = inputs.new_empty(B, self.num_slots, self.slot_size).normal_()
        slots = self.slot_mu + torch.exp(self.slot_log_sigma) * slots
        inputs = self.norm_inputs(inputs)
        k = self.project_k(inputs)
        v = self.project_v(inputs)
        k = (self.slot_size ** (-0.5)) * k
        attns_collect, slots_collect = [], []
        for t in range(T):
            for i in range(self.num_iterations):
                slots_prev = slots
                slots = self.norm_slots(slots)
                q = self.project_q(slots)
                attn_logits = torch.bmm(k[:, t], q.transpose(-1, -2))
                attn_vis = F.softmax(attn_logits, dim=-1)
                attn = attn_vis + self.epsilon
                attn = attn / torch.sum(attn, dim=-2, keepdim=True)
                updates = torch.bmm(attn.transpose(-1, -2), v[:, t])
                slots = self.gru(updates.view(-1, self.slot_size), slots_prev.view(-1, self.slot_size))
                slots = slots.view(-1, self.num_slots, self.slot_size)
                if i < self.num_iterations - 1:
                    slots = slots + self.mlp(self.norm_mlp(slots))
            attns_collect += [attn_vis]
            slots_collect += [slots]
            slots = self.predictor(slots)
        return torch.stack(slots_collect, dim=1), torch.stack(attns_collect, dim=1)


FAMILIES = {
    "steve": Family(
        lambda s: STEVE(s.T, s.K, s.Dx, s.D, s.H),
        lambda s: ((torch.randn(s.B, s.frames, s.N, s.Dx),), {}),
        "Singh et al. 2022b, STEVE",
        published=MOVI,
        draws=True,
    ),
}
