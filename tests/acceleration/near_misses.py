"""What is like slot attention, and something else: all of these are left alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def ordinary(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def over_inputs(q, k, v):
    A = (q @ k.mT).softmax(-1) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def normalized_over_slots(q, k, v):
    A = (q @ k.mT).softmax(1) + 1e-8
    return A / A.sum(1, keepdim=True) @ v


def dropped_out(q, k, v):
    """A copy is kept to be shown, which is no reason."""
    A = (q @ k.mT).softmax(1)
    shown = A.detach().cpu()
    A = F.dropout(A, 0.5) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v + 0 * shown.mean()


def biased(q, k, v):
    A = (q @ k.mT + k.sum(-1).unsqueeze(1) * torch.arange(3.0)[:, None]).softmax(1)
    return A / A.sum(-1, keepdim=True) @ v


def multiplied(q, k, v):
    A = (q @ k.mT).softmax(1) * k.sigmoid().mean(-1).unsqueeze(1)
    return A / A.sum(-1, keepdim=True) @ v


def keys_overwritten(q, k, v):
    A = (q @ k.mT).softmax(1)
    k.zero_()
    return A / A.sum(-1, keepdim=True) @ v + k.sum()


def masked_by_inputs(q, k, v):
    padding = torch.zeros(k.shape[:2], device=q.device)
    padding[0, 3:] = -1e9
    A = (q @ k.mT + padding[:, None]).softmax(1)
    return A / A.sum(-1, keepdim=True) @ v


def of_two_keys(q, k, v):
    A = torch.cat([q @ k.square().mT, q @ k.mT], 1).softmax(1) + 1e-8
    return (A / A.sum(-1, keepdim=True))[:, 3:] @ v


def other_divisor(q, k, v):
    weights = (q @ k.mT).exp()
    A = weights / (weights.sum(1, keepdim=True) + 1e-3)
    return A / A.sum(-1, keepdim=True) @ v


def without_gradient(q, k, v):
    A = (q @ k.mT).softmax(1).detach()
    return A / A.sum(-1, keepdim=True) @ v


def values_of_slots(q, k, v):
    A = (q @ k.mT).softmax(1)
    return torch.einsum("bkn,bknd->bkd", A / A.sum(-1, keepdim=True), v[:, None] * q[..., None, :4])


def twice(q, k, v):
    A = (q @ k.mT).softmax(1).softmax(1)
    return A / A.sum(-1, keepdim=True) @ v


def partly_without_gradient(q, k, v):
    with torch.no_grad():
        A = (q @ k.mT).softmax(1)
        A = A / A.sum(-1, keepdim=True)
    return A @ v


OTHERS = {
    ordinary: "it is ordinary attention",
    partly_without_gradient: "a part of it alone",
    over_inputs: "goes through 'sum'",
    normalized_over_slots: "goes through 'sum'",
    dropped_out: "its attention goes through 'dropout'",
    biased: "what is added to its logits differs from input to input",
    masked_by_inputs: "what is added to its logits differs from input to input",
    multiplied: "goes through 'mul'",
    without_gradient: "goes through 'detach'",
    values_of_slots: "",
    twice: "its logits go through 'softmax'",
    of_two_keys: "its logits go through 'cat'",
    other_divisor: "its exponentials are not divided by their sum",
}
