"""Rules for parts of tensors: one frame's keys, keys of keys and values, the background's attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import Node

from iio_kernels.acceleration.graph import example
from iio_kernels.acceleration.recognition.axes import Unlike, atoms, fresh
from iio_kernels.acceleration.recognition.rules import Rules
from iio_kernels.acceleration.recognition.terms import Attention, Leaf, Value, Weights


class PartRules(Rules):
    """Parts of linear maps and of attention."""

    def on_select(self, x: Node, dim: int, index: int) -> Value | None:
        return self._part(x, (*[slice(None)] * (dim % example(x).dim()), index))

    def on_narrow(self, x: Node, dim: int, start: int, length: int) -> Value | None:
        return self._part(x, (*[slice(None)] * (dim % example(x).dim()), slice(start, start + length)))

    def _part(self, x: Node, index: tuple[Any, ...]) -> Value | None:
        """A part of a linear map of x is the map of a part of x: frame t of all keys, the keys of frame t."""
        if isinstance(self.value(x).of, (Attention, Weights)):
            return self._some_slots(x, index)
        if any(isinstance(i, slice) and i != slice(None) for i in index):
            return None
        whole = self.leaf(x)
        if whole.of.linear is None or (whole.of.factor != 1 and whole.of.linear[2] is not None):
            return None
        index = (*index, *[slice(None)] * (len(whole.dims) - len(index)))
        chosen = {atoms(dim): at for dim, at in zip(whole.dims, index, strict=True) if isinstance(at, int)}
        operands = list(whole.of.linear[:2])
        for i, of in enumerate(operands):
            at = tuple(chosen.get(atoms(dim), slice(None)) if atoms(dim) else slice(None) for dim in of.dims)
            if all(isinstance(a, slice) for a in at):
                continue
            rest = tuple(dim for dim, a in zip(of.dims, at, strict=True) if isinstance(a, slice))
            if len(of.dims) - len(rest) != len(chosen) or of.dims != of.of.shape or of.of.index is not None:
                return None
            operands[i] = Value(rest, replace(of.of, shape=rest, index=at))
        (a, b), bias = operands, whole.of.linear[2]
        parted = [new is not old for new, old in zip(operands, whole.of.linear, strict=False)]
        if sum(parted) != 1 or (bias is not None and parted[1]):
            return None
        dims = tuple(dim for dim, at in zip(whole.dims, index, strict=True) if isinstance(at, slice))
        b = Value(b.dims, replace(b.of, factor=b.of.factor * whole.of.factor))
        return Value(dims, Leaf(self.node, dims, self.age(self.node), linear=(a, b, bias)))

    def _some_slots(self, x: Node, index: tuple[Any, ...]) -> Value | None:
        """The attention of some of the slots, the background's say."""
        value = self.value(x)
        attention = value.of if isinstance(value.of, Attention) else value.of.attention
        chosen = [(i, at) for i, at in enumerate(index) if at != slice(None)]
        if len(chosen) != 1 or attention.softmax.heads:
            return None
        ((i, at),) = chosen
        size = example(x).shape[i]
        if atoms(value.dims[i]) != atoms(attention.slots) or not isinstance(size, int):
            return None
        start, stop, step = (at if isinstance(at, slice) else slice(at % size, at % size + 1)).indices(size)
        if step != 1 or start >= stop:
            return None
        offset = attention.part[0] if attention.part else 0
        start, stop = start + offset, stop + offset
        slots = self.parts.setdefault((attention.softmax.node, start, stop), fresh([stop - start])[0])
        attention = replace(attention, slots=slots, part=(start, stop))
        of = (
            attention
            if isinstance(value.of, Attention)
            else Weights(attention, replace(value.of.total, attention=attention))
        )
        return Value((*value.dims[:i], *([slots] if isinstance(at, slice) else []), *value.dims[i + 1 :]), of)

    def _piece(self, pieces: Node, i: Any, x: Any, _: Any, dim: Any = 0) -> Value | None:
        """Some features of a linear map are the map by some rows of its weight: keys of keys and values."""
        dim, sizes = dim % example(x).dim(), [piece.shape[dim] for piece in example(pieces)]
        if not isinstance(i, int) or not all(isinstance(size, int) for size in sizes):
            return None
        i %= len(sizes)
        if isinstance(self.value(x).of, (Attention, Weights)):
            return self.on_narrow(x, dim, sum(sizes[:i]), sizes[i])
        whole = self.leaf(x)
        if whole.of.linear is None or whole.of.factor != 1:
            return None
        rows, features = slice(sum(sizes[:i]), sum(sizes[: i + 1])), fresh(sizes[i : i + 1])[0]

        def chosen(of: Value) -> Value:
            """A factor or the bias without the other rows, if it has any."""
            if all(atoms(d) != atoms(whole.dims[dim]) for d in of.dims):
                return of
            if of.dims != of.of.shape or of.of.index is not None:
                raise Unlike
            own = [atoms(d) == atoms(whole.dims[dim]) for d in of.dims]
            dims = tuple(features if mine else d for mine, d in zip(own, of.dims, strict=True))
            return Value(dims, replace(of.of, shape=dims, index=tuple(rows if mine else slice(None) for mine in own)))

        a, b, bias = whole.of.linear
        linear = chosen(a), chosen(b), None if bias is None else chosen(bias)
        if sum(new is not old for new, old in zip(linear[:2], whole.of.linear, strict=False)) != 1:
            return None
        dims = tuple(features if d == dim else old for d, old in enumerate(whole.dims))
        return Value(dims, Leaf(self.node, dims, self.age(self.node), linear=linear))
