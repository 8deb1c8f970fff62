"""What `iio_kernels.nn.SlotAttention` computes, written out: slow, plain, the yardstick of its tests.

It shares nothing with the package's implementation, and is not to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iio_kernels.testing.slot_attention import literal_slot_attention


def literal_slot_attention_layer(
    weights: dict[str, Tensor],
    inputs: Tensor,
    slots: Tensor,
    iterations: int,
    *,
    heads: int = 1,
    scale: float | None = None,
    eps: float = 1e-8,
    eps_in: str = "weights",
    normalize: str = "mean",
    softmax: str = "slots",
    joint_heads: bool = False,
    update: str = "gru",
    normalized_state: bool = False,
    mlp_last: bool = True,
    norm_eps: float = 1e-5,
    gradient: str = "unrolled",
    slot_mask: Tensor | None = None,
    input_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `iio_kernels.nn.SlotAttention` computes, of its parameters by name: slots (B, K, D), A and W (B, H, K, N).

    Keys and values are made, anew in each iteration; a layer that has no parameters is left out.
    """

    def linear(name: str, x: Tensor) -> Tensor:
        if f"{name}.weight" not in weights:
            return x
        return x @ weights[f"{name}.weight"].mT + weights.get(f"{name}.bias", 0)

    def norm(name: str, x: Tensor) -> Tensor:
        if f"{name}.weight" not in weights:
            return x
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + norm_eps).sqrt()
        return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def over_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        likelihoods = (factor * q @ k.mT).exp()
        for mask, dim in ((slot_mask, 3), (input_mask, 2)):
            likelihoods = likelihoods if mask is None else likelihoods * mask.unsqueeze(1).unsqueeze(dim)
        total = likelihoods.sum(-1, keepdim=True)
        A = likelihoods / torch.where(total == 0, 1, total)
        return A @ v, A

    def of_heads(x: Tensor) -> Tensor:
        return torch.stack(x.chunk(heads, -1), 1)

    def gru(x: Tensor, state: Tensor) -> Tensor:
        i_r, i_z, i_n = (x @ weights["gru.weight_ih"].mT + weights["gru.bias_ih"]).chunk(3, -1)
        j_r, j_z, j_n = (state @ weights["gru.weight_hh"].mT + weights["gru.bias_hh"]).chunk(3, -1)
        z = torch.sigmoid(i_z + j_z)
        return (1 - z) * torch.tanh(i_n + torch.sigmoid(i_r + j_r) * j_n) + z * state

    masks = {
        name: None if mask is None else mask.unsqueeze(1)
        for name, mask in (("slot_mask", slot_mask), ("input_mask", input_mask))
    }
    if input_mask is not None:  # what a masked input is does not matter
        inputs = torch.where(input_mask.unsqueeze(-1), inputs, 1.0)
    x = norm("norm_inputs", inputs)
    initial = slots
    for t in range(1, iterations + 1):
        if gradient != "unrolled" and t == iterations:
            slots = slots.detach()
            if gradient == "bilevel":
                slots = slots + initial - initial.detach()
        s = norm("norm_slots", slots)
        q, k, v = of_heads(linear("to_q", s)), of_heads(linear("to_k", x)), of_heads(linear("to_v", x))
        if softmax == "inputs":
            updates, A = over_inputs(q, k, v)
        else:
            updates, A = literal_slot_attention(
                q, k, v, scale=scale, eps=eps, eps_in=eps_in, normalize=normalize, joint_heads=joint_heads, **masks
            )
        updates = torch.cat(updates.unbind(1), -1)
        updates = norm("norm_updates", linear("combine", updates))
        state = s if normalized_state else slots
        slots = gru(updates, state) if update == "gru" else state + updates if update == "residual" else updates
        if "mlp.0.weight" in weights and (mlp_last or t < iterations):
            slots = slots + linear("mlp.2", linear("mlp.0", norm("norm_mlp", slots)).relu())

    W = A
    if normalize == "mean" and softmax == "slots":
        W = A + eps if eps_in == "weights" else A
        W = W if input_mask is None else W * input_mask[:, None, None]
        S = W.sum(-1, keepdim=True) + (eps if eps_in == "denominator" else 0)
        W = W / torch.where(S == 0, 1, S)
    return slots, A, W
