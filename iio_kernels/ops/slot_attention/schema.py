"""The operators under `slot_attention`, and what torch.compile needs to know of them. Imports no backend.

Layouts: q (B, H, K, Dk), k (B, H, N, Dk), v (B, H, N, Dv) or None for k itself; biases and masks (B, H, K) and
(B, H, N). U (B, H, K, Dv), S (B, H, K) and the gradients to q and logit_bias are in the arithmetic's dtype (float64 for
float64, otherwise float32); A (B, H, K, N), dk and dv are in k's. What was not asked for has no elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

OPTIONS = "float scale, float eps, bool eps_in_weights, bool normalize, bool joint_heads"
INPUTS = "Tensor q, Tensor k, Tensor? v, Tensor? logit_bias, Tensor? slot_mask, Tensor? input_mask"

torch.library.define(
    "iio_kernels::slot_attention_forward",
    f"({INPUTS}, {OPTIONS}, bool return_attention) -> (Tensor U, Tensor S, Tensor A)",
)
torch.library.define(
    "iio_kernels::slot_attention_backward",
    f"(Tensor dU, Tensor? dS, Tensor? dA, {INPUTS}, Tensor U, Tensor S, {OPTIONS})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dlogit_bias)",
)


def _arithmetic(k: Tensor) -> torch.dtype:
    return torch.float64 if k.dtype == torch.float64 else torch.float32


@torch.library.register_fake("iio_kernels::slot_attention_forward")
def _(q, k, v, logit_bias, slot_mask, input_mask, scale, eps, eps_in_weights, normalize, joint_heads, return_attention):
    values, dtype = k if v is None else v, _arithmetic(k)
    return (
        q.new_empty((*q.shape[:3], values.shape[3]), dtype=dtype),
        q.new_empty(q.shape[:3], dtype=dtype),
        k.new_empty((*q.shape[:3], k.shape[2]) if return_attention else (0,)),
    )


@torch.library.register_fake("iio_kernels::slot_attention_backward")
def _(dU, dS, dA, q, k, v, logit_bias, slot_mask, input_mask, U, S, scale, eps, eps_in_weights, normalize, joint_heads):
    return (
        q.new_empty(q.shape, dtype=_arithmetic(k)),
        k.new_empty(k.shape),
        k.new_empty((0,) if v is None else v.shape),
        q.new_empty((0,) if logit_bias is None else q.shape[:3], dtype=_arithmetic(k)),
    )
