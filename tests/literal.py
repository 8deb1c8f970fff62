"""The formulas as they are printed, sharing nothing with the package: slow, plain, the yardstick."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-8,
    eps_in: str = "weights",
    normalize: str = "mean",
    joint_heads: bool = False,
    slot_mask: Tensor | None = None,
    input_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """U (..., K, Dv) and A (..., K, N). An image at a time; what is masked is left out, not filled in."""
    batch, (K, Dk), N = q.shape[:-2], q.shape[-2:], k.shape[-2]
    scale = Dk**-0.5 if scale is None else scale
    slots = (torch.tensor(True) if slot_mask is None else slot_mask).to(q.device).expand(*batch, K)
    inputs = (torch.tensor(True) if input_mask is None else input_mask).to(q.device).expand(*batch, N)

    places, shares = [], []
    images = batch[:-1] if joint_heads else batch
    for image in product(*map(range, images)):
        heads = [(*image, h) for h in range(batch[-1])] if joint_heads else [image]
        for n in range(N):
            # Everything that competes for input n: the slots of all these heads.
            rivals = [(*head, s) for head in heads for s in range(K) if inputs[head][n] and slots[head][s]]
            if rivals:
                logits = torch.stack([scale * (q[rival] * k[rival[:-1]][n]).sum() for rival in rivals])
                places += [(*rival, n) for rival in rivals]
                shares.append(logits.softmax(0))
    A = q.new_zeros(*batch, K, N)
    if places:
        A = A.index_put(tuple(torch.tensor(places, device=q.device).T), torch.cat(shares))

    U = []
    for slot in product(*map(range, (*batch, K))):
        taking_part = inputs[slot[:-1]]
        weights, values = A[slot][taking_part], v[slot[:-1]][taking_part]
        if normalize == "mean":
            weights = weights + eps if eps_in == "weights" else weights
            total = weights.sum() + (eps if eps_in == "denominator" else 0)
            weights = weights * 0 if total == 0 else weights / total
        U.append((weights.unsqueeze(1) * values).sum(0))
    return torch.stack(U).view(*batch, K, -1) if U else v.new_zeros(*batch, K, v.shape[-1]), A


def broadcast_conv2d(
    z: Tensor,
    weight: Tensor,
    position_map: Tensor,
    size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    transposed: bool = False,
    relu: bool = False,
) -> Tensor:
    """(..., O, H', W'): z at every pixel of the grid, convolved there."""
    grid = z.reshape(-1, z.shape[-1], 1, 1).expand(-1, -1, *size)
    if transposed:
        sizes = zip(position_map.shape[1:], size, stride, padding, weight.shape[2:], strict=True)
        over = [out - ((n - 1) * s - 2 * p + k) for out, n, s, p, k in sizes]
        convolved = F.conv_transpose2d(grid, weight, None, stride, padding, over)
    else:
        convolved = F.conv2d(grid, weight, None, stride, padding)
    out = convolved + position_map
    return (out.relu() if relu else out).view(*z.shape[:-1], *position_map.shape)


def slot_attention_module(
    x: Tensor,
    slots: Tensor,
    weights: tuple[Tensor, ...],
    iterations: int,
    *,
    eps: float = 1e-8,
    norm_eps: float = 1e-5,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of Locatello et al. 2020, of torch's own layers: the slots and the last attention (B, K, N)."""
    g, b, wq, wk, wv, *gru, g_mlp, b_mlp, w1, b1, w2, b2 = weights
    D, scale = slots.shape[-1:], len(wq) ** -0.5 if scale is None else scale
    k, v = F.linear(x, wk), F.linear(x, wv)
    for _ in range(iterations):
        q = F.linear(F.layer_norm(slots, D, g, b, norm_eps), wq)
        attention = (k @ q.mT * scale).softmax(-1)
        W = attention + eps
        updates = (W / W.sum(1, keepdim=True)).mT @ v
        slots = torch.gru_cell(updates.flatten(0, 1), slots.flatten(0, 1), *gru).view_as(slots)
        slots = slots + F.linear(F.linear(F.layer_norm(slots, D, g_mlp, b_mlp, norm_eps), w1, b1).relu(), w2, b2)
    return slots, attention.mT


def slot_attention_layer(
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
        likelihoods = (scale * q @ k.mT).exp()
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
            updates, A = slot_attention(
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
