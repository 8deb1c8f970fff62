"""Vectors in space, their three parts apart, and tables of constants on a device."""

import functools

import torch
from torch import Tensor

__all__ = ["Vector", "constant", "dot", "first_exit", "last_entry", "look_up", "normalize", "power", "take"]

Vector = tuple[Tensor, Tensor, Tensor]  # x, y and z apart, of one shape: the fastest to compute with


def take(tables: tuple[Tensor, ...], which: Tensor) -> tuple[Tensor, ...]:
    """Take entries number `which` (L,) of each table, flattened; four times as fast as indexing."""
    return tuple(table.flatten().index_select(0, which) for table in tables)


def dot(a: Vector, b: Vector) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def normalize(v: Vector) -> Vector:
    length = dot(v, v).sqrt()
    return tuple(part / length for part in v)


def power(x: Tensor, exponent: int) -> Tensor:
    """Raise x to a power of two."""
    for _ in range(exponent.bit_length() - 1):
        x = x * x
    return x


def last_entry(entries: list[Tensor]) -> Tensor:
    return functools.reduce(torch.maximum, entries)


def first_exit(exits: list[Tensor]) -> Tensor:
    return functools.reduce(torch.minimum, exits)


def look_up(values: tuple[float, ...], index: Tensor) -> Tensor:
    return constant(values, index.device)[index]


@functools.lru_cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
