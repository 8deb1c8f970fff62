"""Argument checks shared by the operations: shapes, dtypes, devices and options, never values.

Looking at a value would synchronise the host with the device; a NaN is left to travel into the result instead.
Every message names the argument, what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: What tensors of numbers may be stored in.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(name: str, value: object, layout: str, *, min_dims: int | None = None) -> Tensor:
    """Check that `value` is a real floating-point tensor of the rank that `layout` spells, e.g. "(B, C, H, W)".

    Where `min_dims` is given, the rank may be larger ("(..., K, D)").
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor {layout}, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: expected dtype {', '.join(map(str, DTYPES))}, got {value.dtype}")
    dims = layout.count(",") + 1 if min_dims is None else min_dims
    if value.dim() < dims or (min_dims is None and value.dim() != dims):
        raise ValueError(f"{name}: expected shape {layout}, got {tuple(value.shape)}")
    return value


def mask(name: str, value: object, shape: Sequence[int], layout: str) -> Tensor:
    """Check that `value` is a boolean tensor that broadcasts to `shape`, and return it so broadcast."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a boolean torch.Tensor {layout}, got {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(f"{name}: expected dtype torch.bool (True = takes part), got {value.dtype}")
    fits = value.dim() <= len(shape) and all(
        have in (1, want) for have, want in zip(reversed(value.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {layout} = {tuple(shape)}, got {tuple(value.shape)}"
        )
    return value.expand(tuple(shape))


def broadcasts(name: str, value: Tensor, batch: Sequence[int], last: Sequence[int], to: str) -> None:
    """Check that `value` ends in the dimensions `last`, and that those before broadcast to `batch`."""
    leading = value.shape[: value.dim() - len(last)]
    fits = len(leading) <= len(batch) and all(
        have in (1, want) for have, want in zip(reversed(leading), reversed(batch), strict=False)
    )
    if not fits or tuple(value.shape[value.dim() - len(last) :]) != tuple(last):
        raise ValueError(
            f"{name}: expected shape {tuple(last)} to match {to}, after dimensions that broadcast to {tuple(batch)}, "
            f"got {tuple(value.shape)}"
        )


def same_device(**tensors: Tensor | None) -> torch.device:
    """Check that all tensors lie on one device, and return it."""
    given = {name: value for name, value in tensors.items() if value is not None}
    first, *others = given
    for other in others:
        if given[other].device != given[first].device:
            raise ValueError(
                f"{other}: expected the device of {first}, {given[first].device}, got {given[other].device}"
            )
    return given[first].device


def option(name: str, value: object, choices: Sequence[str | None]) -> None:
    """Check that `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def flag(name: str, value: object) -> None:
    """Check that `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")


def number(name: str, value: object, *, above: float | None = None, at_least: float | None = None) -> float:
    """Check that `value` is a finite real number in the given range, and return it as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")
    if above is not None and not value > above:
        raise ValueError(f"{name}: expected a number > {above:g}, got {value:g}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{name}: expected a number >= {at_least:g}, got {value:g}")
    return float(value)


def integer(name: str, value: object, *, at_least: int) -> int:
    """Check that `value` is an int of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name}: expected an int >= {at_least}, got {value}")
    return value
