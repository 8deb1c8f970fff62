"""The iterations of Slot Attention: all in one operator where that has the options, else one at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from iio_kernels.nn.layers import Identity, linear, linears, norm, of_heads
from iio_kernels.ops.slot_attention.api import slot_attention_from_inputs
from iio_kernels.ops.slot_attention_module.api import SlotAttentionWeights, fits_triton, slot_attention_module
from iio_kernels.runtime.options import (
    Backend,
    EpsIn,
    Normalize,
    Softmax,
    Update,
)
from iio_kernels.runtime.torch_private import disable_compile


class Iterations(nn.Module):
    """Changes slots by iterations, with the layers and options of `SlotAttention`."""

    heads: int
    joint_heads: bool
    scale: float
    eps: float
    eps_in: EpsIn
    normalize: Normalize
    softmax: Softmax
    update: Update
    normalized_state: bool
    norm_eps: float
    neumann_terms: int
    backend: Backend
    norm_slots: nn.LayerNorm | None
    norm_updates: nn.LayerNorm | None
    norm_mlp: nn.LayerNorm | None
    to_q: nn.Linear | Identity
    to_k: nn.Linear | Identity
    to_v: nn.Linear | Identity
    combine: nn.Linear | None
    gru: nn.GRUCell | None
    mlp: nn.Sequential | None

    def weights(self) -> SlotAttentionWeights:
        """What `slot_attention_module` takes; for the options that it has, see the class."""
        norm_slots, gru, norm_mlp, mlp = self.norm_slots, self.gru, self.norm_mlp, self.mlp
        if norm_slots is None or gru is None or norm_mlp is None or mlp is None:
            raise ValueError("weights: expected a module with norm_slots, gru, norm_mlp and mlp, got one without")
        first, second = linears(mlp)
        return SlotAttentionWeights(
            *(norm_slots.weight, norm_slots.bias),
            *(self.to_q.weight, self.to_k.weight, self.to_v.weight),
            *(gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh),
            *(norm_mlp.weight, norm_mlp.bias),
            *(first.weight, first.bias, second.weight, second.bias),
        )

    def _iterate(
        self, x: Tensor, slots: Tensor, iterations: int, show: bool, slot_mask: Tensor | None, input_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The slots after some whole iterations and, if it is to be shown, the last A (..., heads, K, N)."""
        if iterations > 0 and slot_mask is None and input_mask is None and self._in_one_operator():
            batch, images = x.shape[:-2], math.prod(x.shape[:-2])
            flat_x, flat_slots = x.reshape(images, *x.shape[-2:]), slots.reshape(images, *slots.shape[-2:])
            weights = self.weights()
            if self.backend != "triton" or fits_triton(flat_x, flat_slots, weights):
                out = slot_attention_module(
                    flat_x, flat_slots, weights, iterations, eps=self.eps, norm_eps=self.norm_eps, scale=self.scale,
                    return_attention=show, backend=self.backend,
                )  # fmt: skip
                if isinstance(out, Tensor):
                    return out.reshape(slots.shape), None
                flat_slots, shown = out
                return flat_slots.reshape(slots.shape), shown.reshape(*batch, 1, *shown.shape[-2:])
        A: Tensor | None = None
        for t in range(1, iterations + 1):
            slots, A = self._step(x, slots, self.mlp is not None, show and t == iterations, slot_mask, input_mask)
        return slots, A

    @disable_compile
    def _iterate_implicitly(
        self, x: Tensor, slots: Tensor, slot_mask: Tensor | None, input_mask: Tensor | None
    ) -> Tensor:
        """One iteration from a fixed point, whose gradient is that of `neumann_terms` iterations there.

        With J its Jacobian, v (J + ... + J^n) comes of n terms: the hook makes v (I + ... + J^(n-1)) of v, what is left
        goes by the iteration's own graph, to weights and inputs, too.
        """
        if not (torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))):
            return self._iterate(x, slots, 1, False, slot_mask, input_mask)[0]
        before = slots.requires_grad_()
        after, _ = self._iterate(x, before, 1, False, slot_mask, input_mask)

        def add_terms(v: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise RuntimeError("neumann_terms: the implicit gradient differentiates once, and create_graph is True")
            total = term = v
            for _ in range(self.neumann_terms - 1):
                (term,) = torch.autograd.grad(after, before, term, retain_graph=True)
                total = total + term
            return total

        # The hook is on a view: on `after` itself it would be called by what it calls.
        out = after.view_as(after)
        out.register_hook(add_terms)
        return out

    def _in_one_operator(self) -> bool:
        """Whether `slot_attention_module` has all options of the iterations."""
        return (
            self.heads == 1 and self.to_q.out_features == self.slot_size and self.to_q.bias is None
            and self.combine is None and self.eps_in == "weights" and self.normalize == "mean"
            and self.softmax == "slots" and self.update == "gru" and not self.normalized_state
            and self.norm_slots is not None and self.norm_mlp is not None and self.norm_updates is None
            and isinstance(self.to_q, nn.Linear)
        )  # fmt: skip

    def _step(
        self, x: Tensor, slots: Tensor, mlp: bool, show: bool, slot_mask: Tensor | None, input_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The slots after one iteration, with or without its MLP, and A (..., heads, K, N) if it is to be shown."""
        s = norm(self.norm_slots, slots)
        q = linear(self.to_q, s).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
        attend = self._competing if self.softmax == "slots" else self._over_inputs
        updates, A = attend(x, q, show, slot_mask, input_mask)
        updates = updates.transpose(-3, -2).flatten(-2).to(slots.dtype)
        if self.combine is not None:
            updates = linear(self.combine, updates)
        updates = norm(self.norm_updates, updates)

        state = s if self.normalized_state else slots
        if self.gru is not None:
            parameters = self.gru.weight_ih, self.gru.weight_hh, self.gru.bias_ih, self.gru.bias_hh
            gates = [parameter.to(slots.dtype) for parameter in parameters]
            slots = torch.gru_cell(updates.flatten(0, -2), state.flatten(0, -2), *gates).view(slots.shape)
        else:
            slots = state + updates if self.update == "residual" else updates
        if mlp and self.mlp is not None:
            first, second = linears(self.mlp)
            slots = slots + linear(second, linear(first, norm(self.norm_mlp, slots)).relu())
        return slots, A

    def _competing(
        self, x: Tensor, q: Tensor, show: bool, slot_mask: Tensor | None, input_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The updates (..., heads, K, D / heads), and A (..., heads, K, N) if it is to be shown."""
        (wk, bk), (wv, bv) = (of_heads(layer, self.heads) for layer in (self.to_k, self.to_v))
        out = slot_attention_from_inputs(
            x.unsqueeze(-3), q, wk, bk, wv, bv, scale=self.scale, eps=self.eps, eps_in=self.eps_in,
            normalize=self.normalize, joint_heads=self.joint_heads,
            slot_mask=None if slot_mask is None else slot_mask.unsqueeze(-2),
            input_mask=None if input_mask is None else input_mask.unsqueeze(-2),
            return_attention=show, backend=self.backend,
        )  # fmt: skip
        return (out, None) if isinstance(out, Tensor) else out

    def _over_inputs(
        self, x: Tensor, q: Tensor, show: bool, slot_mask: Tensor | None, input_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The same where each slot's attention sums to 1 over the inputs: keys and values are not made here, either."""
        (wk, _), (wv, bv) = (of_heads(layer, self.heads) for layer in (self.to_k, self.to_v))
        x = x.to(q.dtype).unsqueeze(-3)
        if input_mask is None:
            A = (self.scale * q @ wk.to(q.dtype) @ x.mT).softmax(-1)
        else:
            out = ~input_mask[..., None, None, :]
            x = x.masked_fill(out.mT, 0)
            logits = self.scale * q @ wk.to(q.dtype) @ x.mT
            A = logits.masked_fill(out, torch.finfo(q.dtype).min).softmax(-1).masked_fill(out, 0)
        if slot_mask is not None:
            A = A.masked_fill(~slot_mask[..., None, :, None], 0)
        updates = (A @ x) @ wv.to(q.dtype).mT
        if bv is not None:
            updates = updates + A.sum(-1, keepdim=True) * bv.to(q.dtype).unsqueeze(-2)
        return updates, A if show else None
