"""Axes of tensors, followed through transpositions and reshapes.

A dimension of a tensor is a product of axes, `(heads, features)` say, and a transposition or a reshape moves, splits
and joins axes but never mixes them. That two tensors share an axis is learnt where a product runs over both.
Sizes are ints, or under dynamic shapes SymPy expressions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

Dim = tuple["Axis", ...]


class Unlike(Exception):
    """These dimensions do not correspond."""


class Axis:
    """An axis, known to be the `same` as another or made up of `parts`, once either is known."""

    def __init__(self, size: Any) -> None:
        self.size = size
        self.same: Axis | None = None
        self.parts: tuple[Axis, Axis] | None = None

    def split(self, size: Any) -> tuple[Axis, Axis]:
        """Into an outer part of `size` and an inner one."""
        self.parts = Axis(size), Axis(_quotient(self.size, size))
        return self.parts


def fresh(shape: Iterable[Any]) -> tuple[Dim, ...]:
    """The dimensions of a tensor of which only the shape is known; a dimension of size 1 holds no axis."""
    return tuple(() if size == 1 else (Axis(size),) for size in map(plain_size, shape))


def plain_size(size: Any) -> Any:
    """An int, or the SymPy expression of a symbolic size."""
    return size if isinstance(size, int) else size.node.expr


def atoms(axes: Iterable[Axis]) -> Dim:
    """The axes in terms of what is not split any further, each by the one name that all that are the same share."""
    found: list[Axis] = []
    for axis in axes:
        while axis.same is not None:
            axis = axis.same
        found += [axis] if axis.parts is None else atoms(axis.parts)
    return tuple(found)


def identify(a: Dim, b: Dim) -> None:
    """Learn that two dimensions are the same; where one is split, so is the other."""
    ours, theirs = list(atoms(a)), list(atoms(b))
    while ours and theirs:
        x, y = ours.pop(0), theirs.pop(0)
        if x is y:
            continue
        if x.size == y.size:
            x.same = y
            ours, theirs = list(atoms(ours)), list(atoms(theirs))
        elif _quotient(x.size, y.size) is not None:
            outer, inner = x.split(y.size)
            outer.same = y
            ours, theirs = [inner, *atoms(ours)], list(atoms(theirs))
        elif _quotient(y.size, x.size) is not None:
            outer, inner = y.split(x.size)
            outer.same = x
            ours, theirs = list(atoms(ours)), [inner, *atoms(theirs)]
        else:
            raise Unlike
    if ours or theirs:
        raise Unlike


def regroup(dims: Sequence[Dim], shape: Iterable[Any]) -> tuple[Dim, ...]:
    """The dimensions after a reshape to `shape`."""
    left, grouped = list(atoms(axis for dim in dims for axis in dim)), []
    for size in map(plain_size, shape):
        dim: list[Axis] = []
        while (wanted := _quotient(size, prod(axis.size for axis in dim))) != 1:
            if wanted is None or not left:
                raise Unlike
            axis = left.pop(0)
            if _quotient(wanted, axis.size) is None:
                if _quotient(axis.size, wanted) is None:
                    raise Unlike
                axis, inner = axis.split(wanted)
                left.insert(0, inner)
            dim.append(axis)
        grouped.append(tuple(dim))
    if left:
        raise Unlike
    return tuple(grouped)


def _quotient(a: Any, b: Any) -> Any:
    """a / b where that is a whole number, otherwise None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 and a else None
    import sympy

    numerator, denominator = sympy.fraction(sympy.cancel(sympy.sympify(a) / b))
    whole = denominator == 1 and not numerator.has(sympy.floor) and all(f.is_Symbol for f in numerator.free_symbols)
    return (int(numerator) if numerator.is_Integer else numerator) if whole else None
