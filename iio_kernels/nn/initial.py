"""Where initial slots come from: a call, one Gaussian, several, or learnt queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iio_kernels.runtime import checks
from iio_kernels.runtime.options import (
    Initial,
)


class InitialSlots(nn.Module):
    """Draws initial slots, or takes those that a call gives."""

    num_slots: int
    slot_size: int
    initial: Initial
    mu: nn.Parameter
    log_sigma: nn.Parameter

    def draw(self, noise: Tensor) -> Tensor:
        """Initial slots from the learnt Gaussian, or Gaussians, by standard normal noise `(..., K, slot_size)`."""
        K = noise.shape[-2]
        mu, log_sigma = (p if self.initial == "gaussian" else p[:K] for p in (self.mu, self.log_sigma))
        return mu + log_sigma.exp() * noise

    def _initial(self, inputs: Tensor, slots: Tensor | None, num_slots: int | None, noise: Tensor | None) -> Tensor:
        """The initial slots (..., K, D), as given or drawn."""
        batch = tuple(inputs.shape[:-2])
        for name, value in (("slots", slots), ("noise", noise)):
            if value is None:
                continue
            checks.tensor(name, value, "(..., K, slot_size)", min_dims=2)
            K = value.shape[-2]
            checks.broadcasts(name, value, batch, (K, self.slot_size), f"slot_size and inputs {tuple(inputs.shape)}")
            checks.same_device(inputs=inputs, **{name: value})
            if num_slots is not None and num_slots != K:
                raise ValueError(f"num_slots: expected the {K} of {name} {tuple(value.shape)}, got {num_slots}")
            num_slots = K
        if slots is not None:
            if noise is not None:
                raise ValueError("noise: expected None where slots are given, got a tensor")
            return slots.expand(*batch, -1, -1)
        if self.initial == "given":
            raise ValueError('slots: expected a tensor, as initial is "given", got None')
        K = self.num_slots if num_slots is None else checks.integer("num_slots", num_slots, at_least=1)
        if self.initial != "gaussian" and len(self.mu) < K:
            raise ValueError(f"num_slots: expected at most the {len(self.mu)} that are learnt, got {K}")
        if self.initial == "queries":
            if noise is not None:
                raise ValueError('noise: expected None, as initial is "queries", got a tensor')
            return self.mu[:K].expand(*batch, -1, -1)
        if noise is None:
            noise = torch.randn(*batch, K, self.slot_size, dtype=self.mu.dtype, device=self.mu.device)
        return self.draw(noise.expand(*batch, -1, -1))
