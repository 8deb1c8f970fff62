"""Slot attention, however it is spelt: all of these are found."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F


def split_last(q, k, v):
    A = (q @ k.mT * 0.4).softmax(-2)
    return ((A + 1e-8) / (A + 1e-8).sum(-1, keepdim=True)) @ v


def divided_afterwards(q, k, v):
    A = torch.softmax(torch.einsum("bnd,bkd->bnk", k, q) / math.sqrt(6), dim=2) + 1e-6
    return torch.einsum("bnk,bnd->bkd", A, v) / A.sum(1)[..., None]


def sums_of_products(q, k, v):
    logits = (q.unsqueeze(2) * k.unsqueeze(1)).sum(-1) * 6**-0.5
    W = F.softmax(logits, 1).transpose(1, 2)
    W = W / (W.sum(dim=1, keepdim=True) + 1e-5)
    return (W[..., None] * v[:, :, None]).sum(1)


def in_place(q, k, v):
    attention = torch.bmm(k, q.transpose(1, 2))
    attention *= 6**-0.5
    attention = attention.softmax(dim=-1) + 1e-9
    attention += 9e-9
    attention = attention / attention.sum(1, keepdim=True)
    return attention.permute(0, 2, 1).bmm(v)


def many_axes(q, k, v):
    q, k, v = (x.reshape(len(x), -1, 2, x.shape[-1] // 2).movedim(2, 0) for x in (q, k, v))
    A = torch.einsum("h b s d, h b n d -> s n h b", q, k).softmax(dim=0)
    W = A / A.sum(dim=1, keepdim=True).clamp(min=0.0)
    return torch.einsum("snhb,hbnd->bshd", W, v).flatten(2)


def heads_compete(q, k, v):
    q, k, v = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k, v))
    logits = torch.matmul(k, q.transpose(2, 3))
    A = logits.transpose(1, 2).reshape(*logits.shape[:1], logits.shape[2], -1).softmax(-1)
    A = A.view(len(A), -1, 2, A.shape[-1] // 2).transpose(1, 2) + 1e-8
    W = A / torch.sum(A, dim=-2, keepdim=True)
    return (W.mT @ v).transpose(1, 2).flatten(-2)


def summed_only(q, k, v):
    return F.softmax(q @ k.swapaxes(-1, -2), dim=-2) @ v


def by_norm(q, k, v):
    return F.normalize((q @ k.mT).softmax(1) + 1e-8, p=1, dim=-1) @ v


def masked_logits(q, k, v):
    keep = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    keep[0, 1] = False
    A = torch.where(keep[..., None], q @ k.mT, float("-inf")).softmax(1)
    return A / (A.sum(-1, keepdim=True) + 1e-8) @ v


def masked_inputs(q, k, v):
    padding = torch.zeros(k.shape[:2], dtype=torch.bool, device=q.device)
    padding[0, 3:] = True
    A = (q @ k.mT).softmax(1).masked_fill(padding[:, None], 0.0) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def epsilon_before_the_mask(q, k, v):
    keep = torch.ones(k.shape[:2], dtype=torch.bool, device=q.device)
    keep[0, 3:] = False
    A = ((q @ k.mT).softmax(1) + 1e-8) * keep[:, None]
    return A / A.sum(-1, keepdim=True) @ v


def at_least(q, k, v):
    """Some slots have more than 2.3 of the seven inputs, and some less."""
    A = (q @ k.mT).softmax(1)
    return A / A.sum(-1, keepdim=True).clamp(min=2.3) @ v


def at_least_afterwards(q, k, v):
    A = (q @ k.mT).softmax(1)
    total = A.sum(-1)
    total.clamp_min_(2.3)
    return torch.bmm(A, v) / (total + 0.1).unsqueeze(-1)


def the_larger(q, k, v):
    A = (q @ k.mT).softmax(1) + 1e-2
    total = A.sum(-1, keepdim=True)
    return A / torch.maximum(total, torch.full_like(total, 2.3)) @ v


def by_bounded_norm(q, k, v):
    return F.normalize((q @ k.mT).softmax(1), p=1, dim=-1, eps=2.3) @ v


def times_the_inverse(q, k, v):
    A = (q @ k.mT).softmax(1)
    return A * (1 / (torch.norm(A, p=1, dim=-1, keepdim=True) + 1e-8)) @ v


def two_epsilons(q, k, v):
    A = (q @ k.mT).softmax(1) + 1e-3
    return A / (torch.einsum("bsn->bs", A)[..., None] + 1e-3) @ v


def masked_inputs_at_least(q, k, v):
    keep = torch.ones(k.shape[:2], dtype=torch.bool, device=q.device)
    keep[0, 3:] = False
    A = (q @ k.mT).softmax(1) * keep.float().unsqueeze(1)
    return A / A.sum(-1, keepdim=True).clip(min=1e-2) @ v


def exponentials(q, k, v):
    weights = torch.exp(k @ q.mT)
    A = weights / weights.sum(-1, keepdim=True) + 1e-8
    return (A / A.sum(1, keepdim=True)).mT @ v


def exponentials_twice_less_the_largest(q, k, v):
    logits = q @ k.mT
    logits = logits - logits.max(dim=1, keepdim=True).values
    A = logits.exp() / torch.sum(logits.exp(), dim=1, keepdim=True)
    return A / (A.sum(-1, keepdim=True) + 1e-8) @ v


def exponentials_in_place(q, k, v):
    logits = q @ k.mT
    logits -= logits.detach().amax(1, keepdim=True)
    A = logits.exp_()
    A = A.div(A.sum(1).unsqueeze(1)) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def masked_exponentials(q, k, v):
    keep = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    keep[0, 1] = False
    weights = (q @ k.mT).exp() * keep.unsqueeze(-1)
    A = weights / weights.sum(1, keepdim=True)
    return A / (A.sum(-1, keepdim=True) + 1e-8) @ v


def exponential_of_log_softmax(q, k, v):
    A = F.log_softmax(q @ k.mT, dim=1).exp() + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def less_logsumexp(q, k, v):
    logits = q @ k.mT
    A = torch.exp(logits - torch.logsumexp(logits, 1, keepdim=True)) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def softmin(q, k, v):
    A = F.softmin(-(q @ k.mT), dim=1) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def kept(q):
    """A mask of 0 and 1 in which a slot is left out."""
    keep = torch.ones(q.shape[:2], device=q.device, dtype=q.dtype)
    keep[0, 1] = 0
    return keep


def mask_added(q, k, v):
    A = (q @ k.mT + (1 - kept(q)).unsqueeze(-1) * -1e9).softmax(1) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def infinite_mask_added(q, k, v):
    low = torch.zeros_like(q[..., 0]).masked_fill(kept(q) == 0, -torch.inf)
    A = (low[:, None] + k @ q.mT).mul(0.4).softmax(-1) + 1e-8
    return (A / A.sum(1, keepdim=True)).mT @ v


def logarithm_of_a_mask_added(q, k, v):
    A = torch.baddbmm(torch.log(kept(q) + 1e-6).unsqueeze(-1), q, k.mT, alpha=0.4).softmax(1) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def mask_subtracted(q, k, v):
    A = ((q @ k.mT - 1e9 * (1 - kept(q))[..., None]) / 1.7).softmax(1) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def finite_fill(q, k, v):
    logits = q @ k.mT
    A = logits.masked_fill(kept(q)[..., None] == 0, torch.finfo(logits.dtype).min).softmax(1) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def finite_where(q, k, v):
    logits = q @ k.mT
    A = torch.where(kept(q)[..., None] > 0, logits, -9e15 * torch.ones_like(logits)).softmax(1) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def finite_fill_by_index(q, k, v):
    logits = q @ k.mT * 0.4
    logits[kept(q) == 0] = -1e9
    A = logits.softmax(1) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def without_effect(q, k, v):
    A = F.dropout(F.dropout(q @ k.mT, 0.5, training=False).softmax(1), p=0.0) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def kept_to_show(q, k, v):
    A = (q @ k.mT).softmax(1)
    shown = A.detach().cpu(), -(A * A.log()).sum(1).mean().detach()
    A = A + 1e-8
    return A / A.sum(-1, keepdim=True) @ v + 0 * shown[0].mean() + 0 * shown[1]


def background(q, k, v):
    """A first query of another kind competes, and each kind is averaged by itself."""
    logits = torch.cat([0.3 * q[:, :1].square() @ k.mT, q @ k.mT], dim=1)
    A = logits.softmax(1) + 1e-8
    A0, A1 = A[:, :1], A[:, 1:]
    return torch.cat([A0 / A0.sum(-1, keepdim=True) @ v, A1 / A1.sum(-1, keepdim=True) @ v], 1)


def background_without_a_mean(q, k, v):
    logits = torch.cat((k @ q[:, :1].square().mT, k @ q.mT), dim=-1) * 0.4
    return logits.softmax(-1)[..., 1:].mT @ v


def background_of_weights(q, k, v):
    A = torch.cat([q[:, :2].square() @ k.mT, q @ k.mT], 1).softmax(dim=1)
    W = A / (A.sum(-1, keepdim=True) + 1e-5)
    W0, W1 = W.split([2, q.shape[1]], dim=1)
    return torch.cat([W1 @ v, W0 @ v, A.mean(-1, keepdim=True) * v[:, :1]], 1)


def numbers_of_numpy(q, k, v):
    A = (q @ k.mT / np.sqrt(q.shape[-1]) * np.float32(0.7)).softmax(1) + 1e-8
    return A.reshape(int(np.prod(A.shape[:2])), -1).view_as(A) / A.sum(-1, keepdim=True) @ v


SPELLINGS = (
    split_last, divided_afterwards, sums_of_products, in_place, many_axes, heads_compete, summed_only, by_norm,
    masked_logits, masked_inputs, epsilon_before_the_mask, at_least, at_least_afterwards, the_larger, by_bounded_norm,
    times_the_inverse, two_epsilons, masked_inputs_at_least, exponentials, exponentials_twice_less_the_largest,
    exponentials_in_place, masked_exponentials, exponential_of_log_softmax, less_logsumexp, softmin, mask_added,
    infinite_mask_added, logarithm_of_a_mask_added, mask_subtracted, finite_fill, finite_where, finite_fill_by_index,
    without_effect, kept_to_show, background, background_without_a_mean, background_of_weights, numbers_of_numpy,
)  # fmt: skip
