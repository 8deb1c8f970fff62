"""Finds slot attention in a graph of torch's functions, however it is spelt.

`Reader` goes through a graph once and keeps for each tensor what it is in terms of slot attention, beside its axes:

    Leaf            any tensor, times a number; a linear map of another, if it is one
    Constant        one number everywhere
    Indicator       a boolean tensor as numbers, 0 and 1
    Product         a * b, broadcast against each other and not summed yet
    Logits          a product of two leaves summed over the axes that they share, masked, biased, or several in a row
    Attention       the softmax of logits over all axes that only one of them, the queries, has; plus eps
    Total           attention summed over the axes that only the other, the keys, has; plus eps, bounded from below
    Inverse         1 / Total
    Weights         Attention / Total
    Update          Attention or Weights times a leaf, the values, summed over the keys' axes: what to replace

and of a softmax that is written out

    Detached        logits without their gradient
    Largest         logits' maximum over some axes
    Exponential     exp(logits), perhaps less a maximum
    Sum             an Exponential summed over some axes, or its logarithm
    LogAttention    the logarithm of a softmax

Axes are followed through every reshape and transposition (axes.py), so the order of dimensions, the names of
subscripts, heads split off or joined, and which of `einsum`, `matmul`, `bmm` or a sum of products is written make no
difference. Anything not known here makes a new leaf, and so ends in no update rather than in a wrong one.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from iio_kernels.acceleration.axes import Axis, Dim, Unlike, atoms, fresh, identify, regroup

#: Where torch's own code lies.
TORCH = os.path.dirname(torch.__file__)

#: Why a softmax is left alone that nothing more is known of.
ESCAPES = "what it weights is not summed over the inputs here"

#: What is said of normalising that is no softmax at all, Sinkhorn's say.
OTHERWISE = "it normalises by other means than a softmax"


class Reason(NamedTuple):
    """Why a softmax is left alone, and the file and line that take it."""

    text: str
    place: tuple[str, int] | None


@dataclass(frozen=True, eq=False)
class Value:
    """What a tensor is, and the axes that each of its dimensions holds."""

    dims: tuple[Dim, ...]
    of: Any

    @property
    def axes(self) -> Dim:
        return atoms(axis for dim in self.dims for axis in dim)


@dataclass(frozen=True, eq=False)
class Leaf:
    node: Node
    shape: tuple[Dim, ...]
    """The node's own dimensions; those of the value may be another order and grouping of the same axes."""
    age: int
    """How many writes to its memory the graph had made when this was read."""
    index: tuple[Any, ...] | None = None
    """Where this is a part of the node: its index, ints and slices."""
    factor: float = 1.0
    linear: tuple[Value, Value, Value | None] | None = None
    """Two tensors whose product this is, over axes of both, and what is added to it: a linear map's x and weight, in
    either order, and its bias."""


@dataclass(frozen=True, eq=False)
class Constant:
    number: float


@dataclass(frozen=True, eq=False)
class Indicator:
    of: Leaf


@dataclass(frozen=True, eq=False)
class Product:
    a: Value
    b: Value


@dataclass(frozen=True, eq=False)
class Logits:
    a: Value
    b: Value
    over: Dim
    factor: float = 1.0
    mask: Mask | None = None
    biases: tuple[Bias, ...] = ()
    scales: tuple[Scale, ...] = ()
    shifts: Dim = ()
    """The axes along which a maximum that was subtracted differs."""


@dataclass(frozen=True, eq=False)
class Mask:
    """A boolean tensor, what it says of a slot or input that takes part, and what is in the logits of one that does
    not."""

    value: Value
    taking_part: bool
    fill: float = -math.inf


@dataclass(frozen=True, eq=False)
class Scale:
    """A number that is not written into the graph, such as a learnt temperature, by which logits are multiplied."""

    node: Node
    divides: bool
    age: int | None
    """As a leaf's; None of a symbol."""


@dataclass(frozen=True, eq=False)
class Bias:
    """What is added to logits, times a number: a mask of 0 and -1e9, say."""

    value: Value
    factor: float
    beside: list[tuple[Dim, Dim]]
    """The dimensions of the logits and its own that lie beside each other."""
    scales: tuple[Scale, ...] = ()


@dataclass(frozen=True, eq=False)
class Query:
    """Queries whose logits are all or some of a softmax's."""

    value: Value
    slots: Dim
    factor: float = 1.0
    scales: tuple[Scale, ...] = ()


@dataclass(frozen=True, eq=False)
class Joined:
    """Queries whose logits are concatenated, of a background and of objects say."""

    queries: tuple[Query, ...]
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class Softmax:
    """A softmax over slots: q, k, and how their axes are used."""

    node: Node
    queries: tuple[Query, ...]
    k: Value
    factor: float
    features: Dim
    slots: Dim
    inputs: Dim
    batch: Dim
    heads: Dim
    """Those of the batch axes over which the softmax runs too, joint heads."""
    mask: Mask | None
    biases: tuple[Bias, ...]
    scales: tuple[Scale, ...]


@dataclass(frozen=True, eq=False)
class Attention:
    softmax: Softmax
    node: Node | None
    """What holds A: the softmax, or if inputs are masked, where they are. Nothing, if epsilon was added before that."""
    dims: tuple[Dim, ...]
    """That node's dimensions."""
    slots: Dim
    part: tuple[int, int] | None = None
    """The first of its slots and the one after its last, if it is not of all."""
    mask: Mask | None = None
    """Of inputs."""
    eps: float = 0.0
    eps_if_masked: bool = False
    """Whether masked inputs have epsilon all the same."""


@dataclass(frozen=True, eq=False)
class Total:
    attention: Attention
    eps: float = 0.0
    at_least: float | None = None


@dataclass(frozen=True, eq=False)
class Inverse:
    total: Total


@dataclass(frozen=True, eq=False)
class Weights:
    attention: Attention
    total: Total


@dataclass(frozen=True, eq=False)
class Largest:
    logits: Logits


@dataclass(frozen=True, eq=False)
class Detached:
    logits: Logits


@dataclass(frozen=True, eq=False)
class Exponential:
    logits: Logits


@dataclass(frozen=True, eq=False)
class Sum:
    logits: Logits
    over: frozenset[Axis]
    log: bool


@dataclass(frozen=True, eq=False)
class LogAttention:
    attention: Attention


@dataclass(frozen=True, eq=False)
class Update:
    """What one call of `slot_attention` computes, and the node that holds it."""

    node: Node
    dims: tuple[Dim, ...]
    attention: Attention
    total: Total | None
    """What it is divided by."""
    v: Value
    recorded: dict[Node, object]
    """Of each node of the graph, whether gradients are recorded there."""

    @property
    def softmax(self) -> Softmax:
        return self.attention.softmax


def read(graph: Graph) -> tuple[list[Update], dict[Node, str]]:
    """The updates of a graph with "example_value"s, in its order, and of every softmax without one, why."""
    reader = Reader()
    for node in graph.nodes:
        reader.read(node)
    return reader.result()


class Reader:
    """Reads a graph node by node. `on_...` are the rules, by the names and with the parameters of torch's functions."""

    def __init__(self) -> None:
        self.recording: object = torch.is_grad_enabled()
        self.recorded: dict[Node, object] = {}
        self.values: dict[Node, Value] = {}
        self.writes: dict[int, int] = {}
        self.updates: dict[Node, Update] = {}
        self.refused: dict[Node, str] = {}
        self.parts: dict[tuple[Node, int, int], Dim] = {}
        self.lost: dict[Node, list[Node]] = {}
        """Of every softmax, what its attention goes through that is not known here."""
        self.node: Node

    def read(self, node: Node) -> None:
        if node.op not in ("call_function", "call_method"):
            return
        name, written = name_of(node), written_by(node)
        if name == "set_grad_enabled":
            self.recording = node.args[0]
        elif "inference_mode" in name:
            self.recording = object()  # like nothing before or after
        self.recorded[node] = self.recording
        if written is not None:
            self.writes[_memory(written)] = self._age(written) + 1
        rule = getattr(self, f"on_{name}", None)
        self.node = node
        try:
            value = rule(*node.args, **{k: v for k, v in node.kwargs.items() if k != "inplace"}) if rule else None
        except (Unlike, TypeError):
            value = None
        if value is None:
            for of in (self.values[x].of for x in node.all_input_nodes if x in self.values):
                if (attention := of if isinstance(of, Attention) else getattr(of, "attention", None)) is not None:
                    self.lost.setdefault(attention.softmax.node, []).append(node)
        if written is not None:
            self._overwritten(written)
            if value is None or isinstance(value.of, Leaf):
                value = self._leaf(node) if isinstance(example(node), Tensor) else None  # its memory holds the result
            elif written is not node:
                self.values[written] = value
        if value is not None and isinstance(example(node), Tensor):
            self.values[node] = value

    def result(self) -> tuple[list[Update], dict[Node, str]]:
        """Of two that share a softmax, an update not yet divided and the same divided, the latter counts."""
        updates = [u for u in self.updates.values() if (u.total or u.attention.eps == 0) and self._unchanged(u)]
        divided = {(u.softmax.node, u.attention.part) for u in updates if u.total}
        updates = [u for u in updates if u.total or (u.softmax.node, u.attention.part) not in divided]
        for softmax in {u.softmax.node for u in updates}:
            self.refused.pop(softmax, None)
        for softmax, why in self.refused.items():
            if why == ESCAPES and softmax in self.lost:
                blocks = self._blocks(softmax)
                if blocks is not None:
                    name = name_of(blocks)
                    other = f"{OTHERWISE} alone: " if name == "logsumexp" else ""
                    self.refused[softmax] = f"{other}its attention goes through {name!r}, which is not known there"
        return updates, self.refused

    def _blocks(self, softmax: Node) -> Node | None:
        """Of what a softmax's attention goes through that is not known, the first on its way into a product with
        something else: copies that are kept or shown have no say. None, if the attention leaves the graph."""
        own = _descendants(softmax)

        def meets(node: Node) -> bool:
            tensors = [x for x in node.all_input_nodes if isinstance(example(x), Tensor) and example(x).dim() > 1]
            return name_of(node) in PRODUCTS and not own.issuperset(tensors)

        lost = self.lost[softmax]
        blocking = [node for node in lost if any(map(meets, _descendants(node)))]
        held = [node for node, value in self.values.items() if isinstance(value.of, (Attention, Weights))]
        if not blocking and any(user.op == "output" for node in held if node in own for user in node.users):
            return None
        return min(blocking or lost, key=lambda node: name_of(node) == "detach")

    # -- leaves

    def value(self, node: Any) -> Value:
        """What a tensor is."""
        if not isinstance(node, Node) or not isinstance(example(node), Tensor):
            raise Unlike
        if node not in self.values:
            self.values[node] = self._leaf(node)
        return self.values[node]

    def leaf(self, node: Any) -> Value:
        """What a tensor is, as an operand: a leaf whatever it was made of."""
        value = self.value(node)
        if isinstance(value.of, Leaf):
            return value
        linear = None
        if isinstance(value.of, Logits) and _plain(value.of):
            b = value.of.b
            linear = value.of.a, Value(b.dims, replace(b.of, factor=b.of.factor * value.of.factor)), None
        return Value(value.dims, Leaf(node, value.dims, self._age(node), linear=linear))

    def _leaf(self, node: Node) -> Value:
        dims = fresh(example(node).shape)
        return Value(dims, Leaf(node, dims, self._age(node)))

    # -- memory

    def _overwritten(self, node: Node) -> None:
        """Whatever was known of a tensor that is written to, and of all that share its memory, is known no more."""
        memory = _memory(node)
        for other in [other for other in self.values if _memory(other) == memory]:
            self.values[other] = self._leaf(other)

    def _age(self, node: Node) -> int:
        return self.writes.get(_memory(node), 0)

    def _unchanged(self, update: Update) -> bool:
        """Whether all that the update reads still holds, at the end, what it held when it was read."""
        softmax = update.softmax
        values = [softmax.k, update.v, *(query.value for query in softmax.queries)]
        values += [x for value in values for x in value.of.linear or () if x is not None]
        values += [mask.value for mask in (softmax.mask, update.attention.mask) if mask]
        values += [bias.value for bias in softmax.biases]
        scales = [*softmax.scales, *(scale for query in softmax.queries for scale in query.scales)]
        scales += [scale for bias in softmax.biases for scale in bias.scales]
        if all(self._age(value.of.node) == value.of.age for value in values) and all(
            scale.age is None or scale.age == self._age(scale.node) for scale in scales
        ):
            return True
        self.refused[update.softmax.node] = "queries, keys or values are overwritten"
        return False

    # -- rules: views and casts

    def on_reshape(self, x: Node, *_: Any, **__: Any) -> Value:
        value = self.value(x)
        dims = regroup(value.dims, example(self.node).shape)
        return Value(dims, value.of)

    on_view = on_ravel = on_flatten = on_unflatten = on_squeeze = on_unsqueeze = on_view_as = on_reshape_as = on_reshape

    def on_getitem(self, x: Node, index: Any) -> Value | None:
        if isinstance(x, Node) and name_of(x) in ("chunk", "split"):
            return self._piece(x, index, *x.args, **x.kwargs)
        if isinstance(x, Node) and name_of(x) == "max" and isinstance(example(x), tuple):
            of: Any = x
            return self._largest(*of.args, **of.kwargs) if index == 0 else None
        index = index if isinstance(index, tuple) else (index,)
        if all(i is None or i is Ellipsis or i == slice(None) for i in index):
            return self.on_reshape(x)
        if Ellipsis in index:
            at, missing = index.index(Ellipsis), example(x).dim() + 1 - len(index)
            index = (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
        return self._part(x, index) if all(isinstance(i, (int, slice)) for i in index) else None

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
        return Value(dims, Leaf(self.node, dims, self._age(self.node), linear=(a, b, bias)))

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
        return Value(dims, Leaf(self.node, dims, self._age(self.node), linear=linear))

    def on_permute(self, x: Node, *order: Any) -> Value:
        value = self.value(x)
        listed = order[0] if len(order) == 1 and isinstance(order[0], Sequence) else order
        return Value(tuple(value.dims[i] for i in listed), value.of)

    def on_transpose(self, x: Node, dim0: int, dim1: int) -> Value:
        order = list(range(len(self.value(x).dims)))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return self.on_permute(x, order)

    on_swapaxes = on_swapdims = on_transpose

    def on_movedim(self, x: Node, source: Any, destination: Any) -> Value:
        n = len(self.value(x).dims)
        source, destination = ([i % n for i in _listed(d)] for d in (source, destination))
        order = [i for i in range(n) if i not in source]
        for to, taken in sorted(zip(destination, source, strict=True)):
            order.insert(to, taken)
        return self.on_permute(x, order)

    on_moveaxis = on_movedim

    def on_t(self, x: Node) -> Value:
        return self.on_transpose(x, -1, -2)

    def on_getattr(self, x: Node, name: str) -> Value | None:
        return self.on_t(x) if name in ("mT", "mH") or (name in ("T", "H") and example(x).dim() == 2) else None

    def on_expand(self, x: Node, *_: Any) -> Value | None:
        """An expanded tensor is a leaf of its own: it has axes that what it was made of lacks."""
        return self.value(x) if example(self.node).shape == example(x).shape else None

    def on_contiguous(self, x: Node, **_: Any) -> Value | None:
        """The same numbers, perhaps in another format: our sums are in float32 at least, whatever the format."""
        return self.value(x) if example(self.node).device == example(x).device else None

    on_clone = on_cpu = on_cuda = on_positive = on_contiguous

    def on_to(self, x: Node, *_: Any, **__: Any) -> Value | None:
        if not example(self.node).is_floating_point():
            return None
        if example(x).dtype == torch.bool:
            mask = self.leaf(x)
            return Value(mask.dims, Indicator(mask.of))
        return self.on_contiguous(x)

    on_float = on_double = on_half = on_bfloat16 = on_type = on_type_as = on_to

    def on_detach(self, x: Node) -> Value | None:
        """What is subtracted from all logits of a softmax has no gradient anyway."""
        value = self.value(x)
        if isinstance(value.of, Logits):
            return Value(value.dims, Detached(value.of))
        return value if isinstance(value.of, (Largest, Constant)) else None

    def on_dropout(self, x: Node, p: float = 0.5, training: bool = True, *_: Any) -> Value | None:
        return self.value(x) if p == 0 or training is False else None

    on_dropout1d = on_dropout2d = on_dropout3d = on_alpha_dropout = on_feature_alpha_dropout = on_dropout

    # -- rules: numbers as tensors

    def _constant(self, number: Any) -> Value | None:
        constant = isinstance(number, (int, float)) and not isinstance(number, bool)
        return Value(fresh(example(self.node).shape), Constant(number)) if constant else None

    def on_tensor(self, number: Any, **_: Any) -> Value | None:
        return self._constant(number)

    on_as_tensor = on_scalar_tensor = on_tensor

    def on_full(self, _: Any, fill_value: Any, **__: Any) -> Value | None:
        return self._constant(fill_value)

    on_full_like = on_full

    def on_new_full(self, _: Any, size: Any, fill_value: Any, **__: Any) -> Value | None:
        return self._constant(fill_value)

    def on_zeros(self, *_: Any, **__: Any) -> Value | None:
        return self._constant(0)

    on_zeros_like = on_new_zeros = on_zeros

    def on_ones(self, *_: Any, **__: Any) -> Value | None:
        return self._constant(1)

    on_ones_like = on_new_ones = on_ones

    def _number_of(self, x: Any) -> float | None:
        """The number that x is, or that it holds everywhere."""
        if not isinstance(x, Node):
            return x if isinstance(x, (int, float)) else None
        of = self.value(x).of if isinstance(example(x), Tensor) else None
        return of.number if isinstance(of, Constant) else None

    # -- rules: arithmetic

    def on_mul(self, a: Any, b: Any) -> Value | None:
        for x, factor in ((a, b), (b, a)):
            if (number := self._number(factor, x)) is not None:
                return self._scaled(x, number)
        for x, scale in ((a, b), (b, a)):
            if (value := self._scaled_by(x, scale, divides=False)) is not None:
                return value
        for x, other in ((a, b), (b, a)):
            value = self.value(x)
            if isinstance(value.of, (Attention, Exponential)) and self._boolean(other) is not None:
                return self._masked(x, self._boolean(other), True, 0)
            if isinstance(value.of, Inverse):
                return self._divided(other, value.of.total, value.dims)
        x, y = self._factor(a), self._factor(b)
        dims = tuple(self._broadcast(i, j) for i, j in _aligned(x.dims, y.dims))
        both = len(dims) == len(x.dims) == len(y.dims)
        return Value(dims, Product(x, y)) if both and dims not in (x.dims, y.dims) else None

    on_multiply = on_mul

    def on_div(self, a: Any, b: Any, rounding_mode: None = None) -> Value | None:
        if rounding_mode is not None:
            return None
        if (number := self._number(b, a)) is not None:
            return self._scaled(a, 1 / number) if number != 0 else None
        if self._number_of(a) == 1:
            return self.on_reciprocal(b)
        if (value := self._scaled_by(a, b, divides=True)) is not None:
            return value
        x, by = self.value(a), self.value(b)
        if isinstance(x.of, Exponential) and isinstance(by.of, Sum) and x.of.logits is by.of.logits and not by.of.log:
            return self._softmax(Value(x.dims, x.of.logits), by.of.over)
        if isinstance(x.of, Exponential):
            self.refused[self.node] = "its exponentials are not divided by their sum over the slots"
            return None
        return self._divided(a, by.of, by.dims) if isinstance(by.of, Total) else None

    on_truediv = on_divide = on_true_divide = on_div

    def on_rtruediv(self, a: Any, b: Any) -> Value | None:
        return self.on_div(b, a)

    def on_reciprocal(self, x: Node) -> Value | None:
        value = self.value(x)
        return Value(value.dims, Inverse(value.of)) if isinstance(value.of, Total) else None

    def on_pow(self, x: Node, exponent: Any) -> Value | None:
        return self.on_reciprocal(x) if exponent == -1 else None

    def _divided(self, a: Node, total: Total, dims: tuple[Dim, ...]) -> Value | None:
        """Attention or an update by a total of these dimensions."""
        x = self.value(a)
        for i, j in _aligned(x.dims, dims):
            # Whatever the total has, it has where x has it.
            if atoms(j) and atoms(i) != atoms(j):
                return None
        if isinstance(x.of, Attention) and self._goes_with(x.of, total):
            return Value(x.dims, Weights(x.of, total))
        update = self.updates.get(a)
        if update is None or update.total or x.of is not update or not self._goes_with(update.attention, total):
            return None
        return self._found(update.attention, total, update.v, x.dims)

    @staticmethod
    def _goes_with(attention: Attention, total: Total) -> bool:
        other = total.attention
        same_mask = attention.mask is other.mask and attention.eps_if_masked == other.eps_if_masked
        same_part = attention.softmax is other.softmax and attention.part == other.part
        return same_part and attention.eps == other.eps and same_mask

    def on_add(self, a: Any, b: Any, alpha: float = 1) -> Value | None:
        number, x = self._number(a, b), b
        if number is None:
            number, x = self._number(b, a), a
        if number is None:
            if isinstance(self.value(a).of, Logits):
                return self._biased(a, b, alpha)
            return self._biased(b, a, 1) if alpha == 1 else None
        if alpha != 1:
            return None
        value = self.value(x)
        if isinstance(value.of, Attention) and number >= 0:
            of = replace(value.of, eps=value.of.eps + number, eps_if_masked=value.of.mask is not None)
            return Value(value.dims, of) if not (value.of.mask and value.of.eps) else None
        if isinstance(value.of, Total) and number >= 0:
            bound = None if value.of.at_least is None else value.of.at_least + number
            return Value(value.dims, replace(value.of, eps=value.of.eps + number, at_least=bound))
        return value if number == 0 else None

    def on_sub(self, a: Any, b: Any, alpha: float = 1) -> Value | None:
        """Logits less their maximum, less the logarithm of their exponentials' sum, or less something else."""
        if not isinstance(b, Node) or not isinstance(example(b), Tensor):
            return None
        x, y = self.value(a), self.value(b)
        if not isinstance(x.of, Logits):
            return None
        own = alpha == 1 and getattr(y.of, "logits", None) is x.of
        if own and isinstance(y.of, Largest):
            return Value(x.dims, replace(x.of, shifts=(*x.of.shifts, *y.axes)))
        if own and isinstance(y.of, Sum) and y.of.log:
            value = self._softmax(x, y.of.over)
            return None if value is None else Value(value.dims, LogAttention(value.of))
        return self._biased(a, b, -alpha)

    on_subtract = on_sub

    def _biased(self, x: Node, bias: Node, factor: float) -> Value | None:
        """Logits plus a tensor, times a number."""
        logits, added = self.value(x), self.leaf(bias)
        if not isinstance(logits.of, Logits) or (logits.of.mask and logits.of.mask.fill != -math.inf):
            return None
        if example(self.node).shape != example(x).shape or not example(bias).is_floating_point():
            return None
        new = Bias(added, factor * added.of.factor, _aligned(logits.dims, added.dims))
        return Value(logits.dims, replace(logits.of, biases=(*logits.of.biases, new)))

    def _number(self, number: Any, x: Any) -> float | None:
        """A number that is about to change x. One that torch.compile has as a symbol is looked at if x may be part of
        slot attention; the graph is then for that value, as it would be without dynamic shapes."""
        if isinstance(number, (int, float)):
            return number
        symbol = example(number) if isinstance(number, Node) else None
        if not isinstance(symbol, (torch.SymFloat, torch.SymInt)) or not isinstance(x, Node):
            return None
        of = self.value(x).of
        return float(symbol) if isinstance(of, (Attention, Total)) or getattr(of, "linear", None) else None

    def _scaled_by(self, x: Any, scale: Any, *, divides: bool) -> Value | None:
        """Logits times a number, or a tensor of one."""
        value = self.value(x) if isinstance(x, Node) and isinstance(example(x), Tensor) else None
        if value is None or not isinstance(value.of, Logits) or value.of.mask or not isinstance(scale, Node):
            return None
        like = example(scale)
        if isinstance(like, Tensor):
            if not like.is_floating_point() or like.dim() > len(value.dims) or any(size != 1 for size in like.shape):
                return None
            age = self._age(scale)
        elif isinstance(like, torch.SymFloat):
            age = None
        else:
            return None
        scale = Scale(scale, divides, age)
        biases = tuple(replace(bias, scales=(*bias.scales, scale)) for bias in value.of.biases)
        return Value(value.dims, replace(value.of, scales=(*value.of.scales, scale), biases=biases))

    def _scaled(self, x: Node, factor: float) -> Value | None:
        value = self.value(x)
        if not math.isfinite(factor):
            return None
        if factor == 1:
            return value
        if isinstance(value.of, Constant):
            return Value(value.dims, Constant(value.of.number * factor))
        if isinstance(value.of, Leaf):
            return Value(value.dims, replace(value.of, factor=value.of.factor * factor))
        if not isinstance(value.of, Logits) or (value.of.mask and factor <= 0):
            return None
        mask = value.of.mask and replace(value.of.mask, fill=value.of.mask.fill * factor)
        biases = tuple(replace(bias, factor=bias.factor * factor) for bias in value.of.biases)
        return Value(value.dims, replace(value.of, factor=value.of.factor * factor, mask=mask, biases=biases))

    def on_neg(self, x: Node) -> Value | None:
        return self._scaled(x, -1)

    on_negative = on_neg

    def on_masked_fill(self, x: Node, mask: Node, value: Any) -> Value | None:
        return self._masked(x, self._boolean(mask), False, value)

    def on_setitem(self, x: Node, index: Any, value: Any) -> Value | None:
        """Logits where a mask of their first dimensions says so."""
        mask = self._boolean(index) if isinstance(self.value(x).of, Logits) else None
        if mask is None:
            return None
        rest = len(self.value(x).dims) - len(mask.dims)
        return self._masked(x, Value((*mask.dims, *[()] * rest), mask.of), False, value)

    def on_where(self, condition: Node, x: Any, other: Any) -> Value | None:
        if self.node.op == "call_method":
            condition, x = x, condition
        if isinstance(x, Node) and isinstance(self.value(x).of, (Logits, Exponential, Attention)):
            return self._masked(x, self._boolean(condition), True, other)
        return self._masked(other, self._boolean(condition), False, x)

    def _boolean(self, mask: Node) -> Value | None:
        """A boolean tensor, also where it is 0 and 1."""
        value = self.value(mask)
        if isinstance(value.of, Indicator):
            return Value(value.dims, value.of.of)
        return self.leaf(mask) if example(mask).dtype == torch.bool else None

    def _masked(self, x: Node, mask: Value | None, taking_part: bool, fill: Any) -> Value | None:
        """Slots left out of logits or their exponentials, or inputs out of attention."""
        value, fill = self.value(x), self._number_of(fill)
        if mask is None or fill is None or math.isnan(fill) or len(mask.dims) > len(value.dims):
            return None
        for i, j in _aligned(value.dims, mask.dims):
            if atoms(j):
                identify(i, j)
        if isinstance(value.of, Attention):
            return self._masked_attention(value, Mask(mask, taking_part)) if fill == 0 else None
        exponential = isinstance(value.of, Exponential) and fill == 0
        logits = value.of.logits if exponential else value.of
        if not isinstance(logits, Logits) or logits.mask or fill == math.inf:
            return None
        logits = replace(logits, mask=Mask(mask, taking_part, -math.inf if exponential else fill))
        return Value(value.dims, Exponential(logits) if exponential else logits)

    def _masked_attention(self, value: Value, mask: Mask) -> Value | None:
        """Attention without the inputs that a mask leaves out."""
        of = value.of
        if of.mask or of.part or not set(mask.value.axes) <= {*atoms(of.softmax.batch), *atoms(of.softmax.inputs)}:
            return None
        return Value(value.dims, replace(of, node=None if of.eps else self.node, dims=value.dims, mask=mask))

    def on_normalize(self, x: Node, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Value | None:
        """Attention divided by the sum of its absolute values, which is bounded from below."""
        total = self.on_norm(x, p, dim)
        return (
            None if total is None else Value(self.value(x).dims, Weights(total.of.attention, _bounded(total.of, eps)))
        )

    def on_norm(self, x: Node, p: Any = 2, dim: Any = None, keepdim: bool = False) -> Value | None:
        """The sum, where p is 1: attention is not negative."""
        return self.on_sum(x, dim, keepdim) if p == 1 and isinstance(self.value(x).of, Attention) else None

    def on_linalg_vector_norm(self, x: Node, ord: Any = 2, dim: Any = None, keepdim: bool = False) -> Value | None:
        return self.on_norm(x, ord, dim, keepdim)

    def on_clamp(self, x: Node, min: Any = None, max: None = None) -> Value | None:
        value, bound = self.value(x), self._number_of(min)
        if not isinstance(value.of, Total) or bound is None or max is not None:
            return None
        return Value(value.dims, _bounded(value.of, bound))

    on_clamp_min = on_clip = on_clamp

    def on_maximum(self, a: Node, b: Node) -> Value | None:
        return self.on_clamp(a, b) if isinstance(self.value(a).of, Total) else self.on_clamp(b, a)

    # -- rules: products

    def on_matmul(self, a: Node, b: Node) -> Value | None:
        x, y = self.value(a), self.value(b)
        if min(len(x.dims), len(y.dims)) < 2:
            return None
        rank = max(len(x.dims), len(y.dims))
        batch = list(range(rank - 2))
        labels = [batch[rank - len(v.dims) :] + last for v, last in ((x, ["i", "j"]), (y, ["j", "k"]))]
        return self._contract(a, labels[0], b, labels[1], [*batch, "i", "k"])

    on_bmm = on_mm = on_matmul

    def on_einsum(self, equation: str, *operands: Any) -> Value | None:
        factors = operands[0] if len(operands) == 1 and isinstance(operands[0], Sequence) else operands
        inputs, _, output = equation.replace(" ", "").partition("->")
        labels = [self._subscripts(term, x) for term, x in zip(inputs.split(","), factors, strict=True)]
        if any(len(set(term)) != len(term) for term in labels):
            return None
        if len(factors) == 1 and [i for i in labels[0] if i in output] == list(output):
            return self.on_sum(factors[0], [dim for dim, i in enumerate(labels[0]) if i not in output])
        if len(factors) != 2:
            return None
        if "->" in equation:
            rank = max((len([i for i in term if isinstance(i, int)]) for term in labels), default=0)
            out = _with_ellipsis(output, rank)
        else:
            once = sorted(i for i in set(map(str, [*labels[0], *labels[1]])) if i.isalpha())
            out = [i for i in once if (i in labels[0]) != (i in labels[1])]
            if "..." in equation:
                return None
        return self._contract(factors[0], labels[0], factors[1], labels[1], out)

    def _subscripts(self, term: str, x: Node) -> list[Any]:
        return _with_ellipsis(term, example(x).dim() - len(term.replace("...", "")) if "..." in term else 0)

    def on_linear(self, x: Node, weight: Node, bias: Node | None = None) -> Value | None:
        labels = list(range(example(x).dim() - 1))
        attending = isinstance(self.value(x).of, (Attention, Weights))
        if example(weight).dim() != 2 or (attending and bias is not None):
            return None
        made = self._contract(x, [*labels, "i"], weight, ["o", "i"], [*labels, "o"])
        if made is None or bias is None:
            return made
        own = (made.dims[-1],)
        linear = made.of.a, made.of.b, Value(own, Leaf(bias, own, self._age(bias)))
        return Value(made.dims, Leaf(self.node, made.dims, self._age(self.node), linear=linear))

    def on_baddbmm(self, bias: Node, a: Node, b: Node, *, beta: float = 1, alpha: float = 1) -> Value | None:
        product = self.on_matmul(a, b)
        if product is None or not isinstance(product.of, Logits):
            return None
        added = self.leaf(bias)
        biases = (Bias(added, beta * added.of.factor, _aligned(product.dims, added.dims)),) if beta else ()
        return Value(product.dims, replace(product.of, factor=alpha, biases=biases))

    def on_sum(
        self, x: Node, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, **names: Any
    ) -> Value | None:
        value, dim, keepdim = self.value(x), names.get("axis", dim), names.get("keepdims", keepdim)
        if dim is None:
            return None
        over, kept = self._reduced(value, dim, keepdim)
        if isinstance(value.of, Attention):
            return Value(kept, Total(value.of)) if set(over) == set(atoms(value.of.softmax.inputs)) else None
        if isinstance(value.of, Exponential):
            return Value(kept, Sum(value.of.logits, frozenset(over), log=False))
        if isinstance(value.of, Product):
            return self._contracted(value.of.a, value.of.b, over, kept)
        return None

    def on_logsumexp(self, x: Node, dim: Any, keepdim: bool = False) -> Value | None:
        value = self.value(x)
        over, kept = self._reduced(value, dim, keepdim)
        return Value(kept, Sum(value.of, frozenset(over), log=True)) if isinstance(value.of, Logits) else None

    def on_max(self, x: Node, dim: Any = None, keepdim: bool = False) -> Value | None:
        if isinstance(dim, Node):
            return self.on_maximum(x, dim)
        return self._largest(x, dim, keepdim) if isinstance(example(self.node), Tensor) else None

    def on_amax(self, x: Node, dim: Any = (), keepdim: bool = False) -> Value | None:
        return self._largest(x, None if dim == () else dim, keepdim)

    def _largest(self, x: Node, dim: Any = None, keepdim: bool = False) -> Value | None:
        value = self.value(x)
        _, kept = self._reduced(value, range(len(value.dims)) if dim is None else dim, keepdim)
        logits = value.of.logits if isinstance(value.of, Detached) else value.of
        return Value(kept, Largest(logits)) if isinstance(logits, Logits) else None

    @staticmethod
    def _reduced(value: Value, dim: Any, keepdim: bool) -> tuple[Dim, tuple[Dim, ...]]:
        """The axes over which a reduction runs, and the dimensions that it leaves."""
        reduced = {i % len(value.dims) for i in _listed(dim)}
        kept = [() if i in reduced else d for i, d in enumerate(value.dims) if keepdim or i not in reduced]
        return atoms(axis for i in reduced for axis in value.dims[i]), tuple(kept)

    def _contract(self, a: Node, a_labels: list, b: Node, b_labels: list, out: list) -> Value | None:
        """The sum of products over every label that is not in `out`."""
        x, y = self._factor(a), self._factor(b)
        dims = dict(zip(a_labels, x.dims, strict=True))
        for label, dim in zip(b_labels, y.dims, strict=True):
            dims[label] = self._broadcast(dims[label], dim) if label in dims else dim
        over = atoms(axis for label, dim in dims.items() if label not in out for axis in dim)
        return self._contracted(x, y, over, tuple(dims[label] for label in out))

    def _factor(self, node: Any) -> Value:
        """What a factor of a product is."""
        value = self.value(node)
        return value if isinstance(value.of, (Attention, Weights)) else self.leaf(node)

    def _contracted(self, x: Value, y: Value, over: Dim, dims: tuple[Dim, ...]) -> Value | None:
        shared = set(x.axes) & set(y.axes)
        if not over or not set(over) <= shared:
            return None
        if isinstance(x.of, Leaf) and isinstance(y.of, Leaf):
            return Value(dims, Logits(x, y, over))
        for attention, v in ((x, y), (y, x)):
            if isinstance(v.of, Leaf) and isinstance(attention.of, Weights):
                found = self._found(attention.of.attention, attention.of.total, v, dims, over)
            elif isinstance(v.of, Leaf) and isinstance(attention.of, Attention):
                found = self._found(attention.of, None, v, dims, over)
            else:
                continue
            return found
        return None

    # -- rules: attention

    def on_cat(self, tensors: Any, dim: int = 0, **names: Any) -> Value | None:
        """Logits of several queries with the same keys, one after another along the slots."""
        values, dim = [self.value(x) for x in tensors], names.get("axis", dim)
        if not all(isinstance(value.of, Logits) and not (value.of.mask or value.of.biases) for value in values):
            return None
        for k in (values[0].of.b, values[0].of.a):
            queries = [query for value in values if (query := self._query(value, k, dim)) is not None]
            sizes = [example(x).shape[dim] for x in tensors]
            if len(queries) != len(values) or not all(isinstance(size, int) for size in sizes):
                continue
            over, kept = atoms(values[0].of.over), {frozenset(q.value.axes) & frozenset(k.axes) for q in queries}
            if len(kept) != 1 or any(set(atoms(value.of.over)) != set(over) for value in values):
                continue
            dims, (slots,) = list(values[0].dims), fresh([sum(sizes)])
            dims[dim] = slots
            factor = queries[0].factor or 1.0 if len({query.factor for query in queries}) == 1 else 1.0
            batch = tuple(axis for axis in k.axes if axis in queries[0].value.axes and axis not in over)
            joined = Joined(tuple(replace(query, factor=query.factor / factor) for query in queries))
            return Value(tuple(dims), Logits(Value((batch, slots, over), joined), k, over, factor))
        return None

    on_concat = on_concatenate = on_cat

    @staticmethod
    def _query(value: Value, k: Value, dim: int) -> Query | None:
        """The queries whose logits with these keys a value is, if `dim` is that of their slots."""
        logits, slots = value.of, atoms(value.dims[dim])
        for q, other in ((logits.a, logits.b), (logits.b, logits.a)):
            own = set(q.axes) - set(k.axes) == set(slots) and not logits.shifts
            if is_same(other, k) and own and isinstance(q.of, Leaf) and k.of.factor:
                return Query(q, slots, logits.factor * q.of.factor * other.of.factor / k.of.factor, logits.scales)
        return None

    def on_softmax(self, x: Node, dim: int | None = None, *_: Any, **names: Any) -> Value | None:
        dim, logits = names.get("axis", dim), self.value(x)
        if dim is not None and isinstance(logits.of, Logits):
            return self._softmax(logits, set(atoms(logits.dims[dim])))
        self.refused[self.node] = self._no_logits(x)
        return None

    def on_softmin(self, x: Node, dim: int | None = None, *_: Any, **names: Any) -> Value | None:
        dim, logits = names.get("axis", dim), self._scaled(x, -1)
        if dim is not None and logits is not None and isinstance(logits.of, Logits):
            return self._softmax(logits, set(atoms(logits.dims[dim])))
        self.refused[self.node] = self._no_logits(x)
        return None

    def on_log_softmax(self, x: Node, dim: int | None = None, *_: Any, **names: Any) -> Value | None:
        value = self.on_softmax(x, dim, **names)
        return None if value is None else Value(value.dims, LogAttention(value.of))

    def on_exp(self, x: Node) -> Value | None:
        value = self.value(x)
        if isinstance(value.of, LogAttention):
            return Value(value.dims, replace(value.of.attention, node=self.node, dims=value.dims))
        return Value(value.dims, Exponential(value.of)) if isinstance(value.of, Logits) else None

    def _no_logits(self, x: Node) -> str:
        """Why these are not a slot attention's logits: what they went through after a product, element by element."""
        chain = [x]
        for node in chain:
            for before in node.all_input_nodes:
                joins = name_of(node) in ("cat", "concat", "concatenate", "stack")
                if not isinstance(example(before), Tensor):
                    continue
                if example(before).shape != example(x).shape and not joins:
                    continue
                if before in self.values and isinstance(self.values[before].of, Logits):
                    return f"its logits go through {name_of(node)!r}, which is not known there"
                if before not in chain:
                    chain.append(before)
        return "its logits are not a product of two tensors times a number"

    def _softmax(self, logits: Value, over: set[Axis] | frozenset[Axis]) -> Value | None:
        """Ours, if it runs over all axes that only the queries have, and at most batch axes beside them."""
        of = logits.of
        for i, j in (beside for bias in of.biases for beside in bias.beside):
            if atoms(j):
                identify(i, j)
        over = set(atoms(over))
        for q, k in ((of.a, of.b), (of.b, of.a)):
            batch = set(q.axes) & set(k.axes) - set(atoms(of.over))
            slots, inputs = set(q.axes) - set(k.axes), set(k.axes) - set(q.axes)
            if slots and slots <= over <= slots | batch and inputs:
                break
        else:
            self.refused[self.node] = "it does not run over an axis that the queries alone have: no slots compete"
            return None
        if of.mask and not set(of.mask.value.axes) <= slots | batch:
            self.refused[self.node] = "its mask is not one of slots"
            return None
        if not all(set(bias.value.axes) <= slots | batch for bias in of.biases):
            self.refused[self.node] = "what is added to its logits differs from input to input"
            return None
        if set(atoms(of.shifts)) & over:
            self.refused[self.node] = "what is subtracted from its logits differs from slot to slot"
            return None
        self.refused[self.node] = ESCAPES
        own = tuple(a for a in q.axes if a in slots)
        softmax = Softmax(
            node=self.node, queries=q.of.queries if isinstance(q.of, Joined) else (Query(q, own),), k=k,
            factor=of.factor * q.of.factor * k.of.factor, features=atoms(of.over), slots=own,
            inputs=tuple(a for a in k.axes if a in inputs),
            batch=tuple(a for a in atoms(a for d in logits.dims for a in d) if a in batch),
            heads=tuple(a for a in q.axes if a in batch and a in over), mask=of.mask, biases=of.biases,
            scales=of.scales,
        )  # fmt: skip
        return Value(logits.dims, Attention(softmax, self.node, logits.dims, own))

    def _found(
        self, attention: Attention, total: Total | None, v: Value, dims: tuple[Dim, ...], over: Dim | None = None
    ) -> Value | None:
        """The update that attention, divided by a total or not, makes of v."""
        softmax = attention.softmax
        batch, inputs = set(atoms(softmax.batch)), set(atoms(softmax.inputs))
        slots = set(atoms(softmax.slots)) | set(atoms(attention.slots))
        if over is not None and set(over) & slots:
            self.refused[softmax.node] = "it is ordinary attention: values are summed over the axis of the softmax"
            return None
        if not batch | inputs <= set(v.axes) or (over is not None and set(over) != inputs):
            self.refused[softmax.node] = "values do not go with the keys"
            return None
        if set(v.axes) & slots:
            self.refused[softmax.node] = "values differ from slot to slot"
            return None
        update = Update(self.node, dims, attention, total, v, self.recorded)
        if total is None and attention.eps:
            self.refused[softmax.node] = "epsilon is added to its attention, which is not divided by its sum"
        self.updates[self.node] = update
        return Value(dims, update)

    @staticmethod
    def _broadcast(i: Dim, j: Dim) -> Dim:
        if atoms(i) and atoms(j):
            identify(i, j)
        return i if atoms(i) else j


def _plain(logits: Logits) -> bool:
    """Whether they are a product of two leaves times a number and nothing else."""
    leaves = isinstance(logits.a.of, Leaf) and isinstance(logits.b.of, Leaf)
    return leaves and not (logits.mask or logits.biases or logits.scales or logits.shifts)


def is_same(a: Value, b: Value) -> bool:
    """Whether two leaves are the same numbers, but for their factors."""
    if not (isinstance(a.of, Leaf) and isinstance(b.of, Leaf)):
        return False
    if (a.of.age, a.of.index, set(a.axes)) != (b.of.age, b.of.index, set(b.axes)):
        return False
    return a.of.node is b.of.node or _is_same_product(a.of, b.of)


def _is_same_product(a: Leaf, b: Leaf) -> bool:
    """Whether two leaves are the same linear layer's of the same inputs, seen by two views."""
    if a.linear is None or b.linear is None:
        return False
    pairs = list(zip(a.linear, b.linear, strict=True))
    return all(x is y is None or (x is not None and y is not None and is_same(x, y)) for x, y in pairs) and all(
        x.of.factor == y.of.factor for x, y in pairs if x is not None and y is not None
    )


def _bounded(total: Total, bound: float) -> Total:
    """A total bounded from below, unless it is never so small that this shows."""
    if total.attention.eps + total.eps >= bound or (total.at_least is not None and total.at_least >= bound):
        return total
    return replace(total, at_least=bound)


#: Where attention meets values.
PRODUCTS = {
    "addmm", "baddbmm", "bmm", "dot", "einsum", "linear", "matmul", "mm", "mul", "multiply", "mv",
    "scaled_dot_product_attention", "tensordot",
}  # fmt: skip


def _descendants(node: Node) -> set[Node]:
    """A node and whatever is made of it."""
    found, stack = {node}, [node]
    while stack:
        new = stack.pop().users.keys() - found
        found |= new
        stack += new
    return found


def example(node: Node) -> Any:
    """The fake tensor, or number, that torch.compile had in a node's place."""
    return node.meta.get("example_value", node.meta.get("val"))


def place_of(node: Node) -> tuple[str, int] | None:
    """The file and line of a node, where torch's own code does not count."""
    found = re.findall(r'File "(.*)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(file, int(line)) for file, line in found if not file.startswith(TORCH)]
    return own[-1] if own else None


def _memory(node: Node) -> int:
    return example(node).untyped_storage()._cdata


def name_of(node: Node) -> str:
    """A function's or method's plain name, without what says that it writes to its first argument."""
    if not node.op.startswith("call"):
        return ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name[1:] if _augmented(node) else name.strip("_")


#: Functions that return their argument's own memory without writing to it.
VIEWS = {
    "adjoint", "alias", "as_strided", "bfloat16", "broadcast_to", "chunk", "contiguous", "cpu", "cuda",
    "detach", "diagonal", "double", "expand", "expand_as", "flatten", "float", "getattr", "getitem", "half",
    "moveaxis", "movedim", "narrow", "permute", "positive", "ravel", "real", "reshape", "reshape_as", "select",
    "split", "squeeze", "swapaxes", "swapdims", "t", "tensor_split", "to", "transpose", "type", "type_as",
    "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as",
}  # fmt: skip


def written_by(node: Node) -> Node | None:
    """The tensor that a function or method writes to: an output given to it, or its first argument.

    What returns its first argument's memory and is no view that is known here is taken to write to it.
    """
    if not node.op.startswith("call"):
        return None
    first = node.kwargs.get("out", node.args[0] if node.args else None)
    if not isinstance(first, Node) or not isinstance(example(first), Tensor):
        return None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = _augmented(node) or node.kwargs.get("inplace") is True or (name[-1:] == "_" and name[-2:] != "__")
    if in_place or "out" in node.kwargs or node.target is operator.setitem:
        return first
    shared = isinstance(example(node), Tensor) and _memory(node) == _memory(first)
    return first if shared and name_of(node) not in VIEWS else None


def _augmented(node: Node) -> bool:
    """Whether this is an augmented assignment, such as `operator.iadd`."""
    name = getattr(node.target, "__name__", "")
    return name[:1] == "i" and hasattr(operator, name[1:]) and getattr(operator, name, None) is node.target


def _listed(dim: Any) -> list[int]:
    return list(dim) if isinstance(dim, Sequence) else [dim]


def _aligned(a: Sequence[Dim], b: Sequence[Dim]) -> list[tuple[Dim, Dim]]:
    """Dimensions of two tensors that broadcasting puts beside each other, from the last."""
    n = max(len(a), len(b))
    return list(zip([()] * (n - len(a)) + list(a), [()] * (n - len(b)) + list(b), strict=True))


def _with_ellipsis(term: str, rank: int) -> list[Any]:
    """A term's subscripts; those that stand for an ellipsis of `rank` dimensions are ints, counted from the last."""
    before, dots, after = term.partition("...")
    return [*before, *(range(-rank, 0) if dots else ()), *after]
