"""Tensors for tests: random ones like others, and the same values under other strides."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def random_like(*tensors: Tensor, drawn_in: torch.dtype = torch.float32) -> list[Tensor]:
    """Random numbers (fixed seed) in the tensors' shapes and dtypes, drawn in a dtype of their own."""
    random = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=random, dtype=drawn_in).to(x) for x in tensors]


def strided(x: Tensor, how: str) -> Tensor:
    """The same values under other strides; "expanded" and what follows repeat some of them."""
    if how == "transposed":
        return x.mT.contiguous().mT
    if how == "heads":  # (B, N, H, D) seen as (B, H, N, D)
        return x.transpose(0, -2).contiguous().transpose(0, -2)
    if how == "channels first":
        return x.contiguous()
    if how == "channels last":
        return x.movedim(-3, -1).contiguous().movedim(-1, -3)
    if how == "channels last, sliced":
        wide = torch.full((*x.shape[:-3], *x.shape[-2:], 3 * x.shape[-3] + 1), math.nan).to(x)
        return wide[..., 1::3].copy_(x.movedim(-3, -1)).movedim(-1, -3)
    if how == "slots last":  # (B, H, W, C + 1, K)
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == "sliced":
        wide = torch.full((*x.shape[:-2], 2 * x.shape[-2], 3 * x.shape[-1] + 1), math.nan).to(x)
        return wide[..., ::2, 1::3].copy_(x)
    if how == "planes sliced":
        wide = torch.full((x.shape[0], 2 * x.shape[1] + 1, *x.shape[2:]), math.nan).to(x)
        return wide[:, 1::2].copy_(x)
    if how == "expanded":
        return x[:1].expand_as(x)
    if how == "expanded over pixels":
        return x[..., :1, :1].expand_as(x)
    if how == "of one number":
        return x.flatten()[0].expand_as(x)
    raise ValueError(how)
