"""Numerical rules that the operations share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype to compute in: the widest of the tensors', at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, for results of a Function's forward: under torch.compile, torch 2.11 loses the gradient to a result
    that a `.to` without effect has made."""
    return x if x.dtype == dtype else x.to(dtype)


def divide(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 with zero gradient where y is exactly 0: the mean over nothing. (A NaN is not 0, and stays.)"""
    empty = y == 0
    return (x / y.masked_fill(empty, 1)).masked_fill(empty, 0)


def twice_and_4_units(truth: Tensor, eager: Tensor) -> float:
    """Twice the largest error of `eager`, if it is finite, and 4 units in the last place of the largest value."""
    if truth.numel() == 0:
        return 0.0
    error = (eager.double() - truth).abs().max().item()
    return (2 * error if math.isfinite(error) else 0) + 4 * torch.finfo(eager.dtype).eps * truth.abs().max().item()
