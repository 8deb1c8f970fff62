"""Finds slot attention in a graph of torch's functions, however it is spelt.

`Reader` goes through a graph once and keeps for each tensor what it is in terms of slot attention, beside its axes:

    Leaf            any tensor, times a number; a linear map of another, if it is one
    Product         a * b, broadcast against each other and not summed yet
    Logits          a product of two leaves summed over the axes that they share
    Attention       the softmax of logits over all axes that only one of them, the queries, has; plus eps
    Total           attention summed over the axes that only the other, the keys, has; plus eps
    Weights         Attention / Total
    Update          Attention or Weights times a leaf, the values, summed over the keys' axes: what to replace

Axes are followed through every reshape and transposition (axes.py), so the order of dimensions, the names of
subscripts, heads split off or joined, and which of `einsum`, `matmul`, `bmm` or a sum of products is written make no
difference. Anything not known here makes a new leaf, and so ends in no update rather than in a wrong one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from iio_kernels.acceleration.axes import Dim, Unlike, atoms, fresh, identify, regroup

#: Why a softmax is left alone that nothing more is known of.
ESCAPES = "what it weights is not summed over the inputs here"


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
class Product:
    a: Value
    b: Value


@dataclass(frozen=True, eq=False)
class Logits:
    a: Value
    b: Value
    over: Dim
    factor: float = 1.0
    mask: tuple[Value, bool] | None = None
    """A boolean tensor, and what it says of a slot that takes part."""
    scales: tuple[Scale, ...] = ()


@dataclass(frozen=True, eq=False)
class Scale:
    """A number that is not written into the graph, such as a learnt temperature, by which logits are multiplied."""

    node: Node
    divides: bool
    age: int | None
    """As a leaf's; None of a symbol."""


@dataclass(frozen=True, eq=False)
class Softmax:
    """A softmax over slots: q, k, and how their axes are used."""

    node: Node
    q: Value
    k: Value
    factor: float
    features: Dim
    slots: Dim
    inputs: Dim
    batch: Dim
    heads: Dim
    """Those of the batch axes over which the softmax runs too, joint heads."""
    mask: tuple[Value, bool] | None
    scales: tuple[Scale, ...]


@dataclass(frozen=True, eq=False)
class Attention:
    softmax: Softmax
    node: Node | None
    """What holds A: the softmax, or if inputs are masked, where they are. Nothing, if epsilon was added before that."""
    dims: tuple[Dim, ...]
    """Its dimensions."""
    mask: tuple[Value, bool] | None = None
    """A boolean tensor, and what it says of an input that takes part."""
    eps: float = 0.0
    eps_if_masked: bool = False
    """Whether masked inputs have epsilon all the same."""


@dataclass(frozen=True, eq=False)
class Total:
    attention: Attention
    eps: float = 0.0


@dataclass(frozen=True, eq=False)
class Weights:
    attention: Attention
    total: Total


@dataclass(frozen=True, eq=False)
class Update:
    """What one call of `slot_attention` computes, and the node that holds it."""

    node: Node
    dims: tuple[Dim, ...]
    attention: Attention
    v: Value
    eps: float
    eps_in: str
    normalize: str
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
            self._lost(node, name)
        if written is not None:
            self._overwritten(written)
            if value is None or isinstance(value.of, Leaf):
                value = self._leaf(node) if isinstance(example(node), Tensor) else None  # its memory holds the result
            elif written is not node:
                self.values[written] = value
        if value is not None:
            self.values[node] = value

    def result(self) -> tuple[list[Update], dict[Node, str]]:
        """Of two that share a softmax, an update not yet divided and the same divided, the latter counts."""
        updates = [u for u in self.updates.values() if (u.normalize == "mean" or u.eps == 0) and self._unchanged(u)]
        divided = {u.softmax.node for u in updates if u.normalize == "mean"}
        updates = [u for u in updates if u.normalize == "mean" or u.softmax.node not in divided]
        served = {u.softmax.node for u in updates}
        return updates, {node: why for node, why in self.refused.items() if node not in served}

    def _lost(self, node: Node, name: str) -> None:
        """Say of a softmax what its attention goes through that is not known here."""
        for x in node.all_input_nodes:
            of = self.values[x].of if x in self.values else None
            attention = of.attention if isinstance(of, (Total, Weights)) else of
            if isinstance(attention, Attention) and self.refused.get(attention.softmax.node) == ESCAPES:
                self.refused[attention.softmax.node] = f"its attention goes through {name!r}, which is not known there"

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
        if isinstance(value.of, Logits) and value.of.mask is None and not value.of.scales:
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
        values = [update.softmax.q, update.softmax.k, update.v]
        values += [x for value in values for x in value.of.linear or () if x is not None]
        values += [mask[0] for mask in (update.softmax.mask, update.attention.mask) if mask]
        scales = all(s.age is None or s.age == self._age(s.node) for s in update.softmax.scales)
        if scales and all(self._age(value.of.node) == value.of.age for value in values):
            return True
        self.refused[update.softmax.node] = "queries, keys or values are overwritten"
        return False

    # -- rules: views and casts

    def on_reshape(self, x: Node, *_: Any, **__: Any) -> Value:
        value = self.value(x)
        dims = regroup(value.dims, example(self.node).shape)
        return Value(dims, value.of)

    on_view = on_flatten = on_unflatten = on_squeeze = on_unsqueeze = on_view_as = on_reshape_as = on_reshape

    def on_getitem(self, x: Node, index: Any) -> Value | None:
        if isinstance(x, Node) and name_of(x) in ("chunk", "split"):
            return self._piece(x, index, *x.args, **x.kwargs)
        index = index if isinstance(index, tuple) else (index,)
        if all(i is None or i is Ellipsis or i == slice(None) for i in index):
            return self.on_reshape(x)
        return self._part(x, index) if all(isinstance(i, int) or i == slice(None) for i in index) else None

    def on_select(self, x: Node, dim: int, index: int) -> Value | None:
        return self._part(x, (*[slice(None)] * (dim % example(x).dim()), index))

    def _part(self, x: Node, index: tuple[Any, ...]) -> Value | None:
        """A part of a linear map of x is the map of a part of x: frame t of all keys, the keys of frame t."""
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

    def _piece(self, pieces: Node, i: Any, x: Any, _: Any, dim: Any = 0) -> Value | None:
        """Some features of a linear map are the map by some rows of its weight: keys of keys and values."""
        whole, dim = self.leaf(x), dim % example(x).dim()
        if whole.of.linear is None or whole.of.factor != 1:
            return None
        sizes = [piece.shape[dim] for piece in example(pieces)]
        if not isinstance(i, int) or not all(isinstance(size, int) for size in sizes):
            return None
        i %= len(sizes)
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

    on_clone = on_float = on_double = on_half = on_bfloat16 = on_contiguous

    def on_to(self, x: Node, *_: Any, **__: Any) -> Value | None:
        return self.on_contiguous(x) if example(self.node).is_floating_point() else None

    on_type = on_type_as = on_to

    # -- rules: arithmetic

    def on_mul(self, a: Any, b: Any) -> Value | None:
        for x, factor in ((a, b), (b, a)):
            if (number := self._number(factor, x)) is not None:
                return self._scaled(x, number)
        for x, scale in ((a, b), (b, a)):
            if (value := self._scaled_by(x, scale, divides=False)) is not None:
                return value
        for x, mask in ((a, b), (b, a)):
            if isinstance(self.value(x).of, Attention) and example(mask).dtype == torch.bool:
                return self._masked_attention(x, mask, True)
        x, y = self._factor(a), self._factor(b)
        dims = tuple(self._broadcast(i, j) for i, j in _aligned(x.dims, y.dims))
        both = len(dims) == len(x.dims) == len(y.dims)
        return Value(dims, Product(x, y)) if both and dims not in (x.dims, y.dims) else None

    on_multiply = on_mul

    def on_div(self, a: Node, b: Any, rounding_mode: None = None) -> Value | None:
        if (number := self._number(b, a)) is not None:
            return self._scaled(a, 1 / number) if rounding_mode is None and number != 0 else None
        if rounding_mode is None and (value := self._scaled_by(a, b, divides=True)) is not None:
            return value
        x, total = self.value(a), self.value(b)
        if not isinstance(total.of, Total):
            return None
        for i, j in _aligned(x.dims, total.dims):
            # Whatever the total has, it has where x has it.
            if atoms(j) and atoms(i) != atoms(j):
                return None
        if isinstance(x.of, Attention) and self._goes_with(x.of, total.of):
            return Value(x.dims, Weights(x.of, total.of))
        update = self.updates.get(a)
        if update is None or update.normalize != "sum" or x.of is not update:
            return None
        attention = update.attention
        return self._found(attention, total.of, update.v, x.dims) if self._goes_with(attention, total.of) else None

    on_truediv = on_divide = on_true_divide = on_div

    @staticmethod
    def _goes_with(attention: Attention, total: Total) -> bool:
        other = total.attention
        same_mask = attention.mask is other.mask and attention.eps_if_masked == other.eps_if_masked
        return attention.softmax is other.softmax and attention.eps == other.eps and same_mask

    def on_add(self, a: Any, b: Any, alpha: float = 1) -> Value | None:
        number, x = self._number(a, b), b
        if number is None:
            number, x = self._number(b, a), a
        if number is None or alpha != 1:
            return None
        value = self.value(x)
        if isinstance(value.of, Attention) and number >= 0:
            of = replace(value.of, eps=value.of.eps + number, eps_if_masked=value.of.mask is not None)
            return Value(value.dims, of) if not (value.of.mask and value.of.eps) else None
        if isinstance(value.of, Total) and number >= 0:
            return Value(value.dims, replace(value.of, eps=value.of.eps + number))
        return value if number == 0 else None

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
        return Value(value.dims, replace(value.of, scales=(*value.of.scales, Scale(scale, divides, age))))

    def _scaled(self, x: Node, factor: float) -> Value | None:
        value = self.value(x)
        if not math.isfinite(factor):
            return None
        if isinstance(value.of, (Leaf, Logits)) and not (isinstance(value.of, Logits) and value.of.mask):
            return Value(value.dims, replace(value.of, factor=value.of.factor * factor))
        return value if factor == 1 else None

    def on_masked_fill(self, x: Node, mask: Node, value: Any) -> Value | None:
        return self._masked(x, mask, False, value)

    def on_where(self, condition: Node, x: Any, other: Any) -> Value | None:
        if self.node.op == "call_method":
            condition, x = x, condition
        if isinstance(x, Node) and isinstance(self.value(x).of, Logits):
            return self._masked(x, condition, True, other)
        return self._masked(other, condition, False, x)

    def _masked(self, x: Node, mask: Node, taking_part: bool, fill: Any) -> Value | None:
        if isinstance(self.value(x).of, Attention):
            return self._masked_attention(x, mask, taking_part) if fill == 0 else None
        logits, which = self.value(x), self.leaf(mask)
        if not isinstance(logits.of, Logits) or logits.of.mask or len(which.dims) > len(logits.dims):
            return None
        if fill != -math.inf:  # of a finite number the softmax is uniform where all slots are masked
            return None
        for i, j in _aligned(logits.dims, which.dims):
            if atoms(j):
                identify(i, j)
        return Value(logits.dims, replace(logits.of, mask=(which, taking_part)))

    def _masked_attention(self, x: Node, mask: Node, taking_part: bool) -> Value | None:
        """Attention without the inputs that a mask leaves out."""
        value, of, which = self.value(x), self.value(x).of, self.leaf(mask)
        if of.mask or len(which.dims) > len(value.dims):
            return None
        for i, j in _aligned(value.dims, which.dims):
            if atoms(j):
                identify(i, j)
        if not set(which.axes) <= {*atoms(of.softmax.batch), *atoms(of.softmax.inputs)}:
            return None
        node = None if of.eps else self.node
        return Value(value.dims, replace(of, node=node, dims=value.dims, mask=(which, taking_part)))

    def on_normalize(self, x: Node, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Value | None:
        """Weights, if the sum of absolute values is never so small that its bound shows."""
        value = self.value(x)
        if not isinstance(value.of, Attention) or p != 1 or not value.of.eps >= eps:
            return None
        inputs = set(atoms(value.of.softmax.inputs))
        return Value(value.dims, Weights(value.of, Total(value.of))) if set(atoms(value.dims[dim])) == inputs else None

    def on_clamp(self, x: Node, min: Any = None, max: None = None) -> Value | None:
        value = self.value(x)
        bounded = isinstance(min, (int, float)) and max is None and isinstance(value.of, Total)
        return value if bounded and value.of.attention.eps + value.of.eps >= min else None

    on_clamp_min = on_clamp

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
        if len(factors) != 2:
            return None
        inputs, _, output = equation.replace(" ", "").partition("->")
        labels = [self._subscripts(term, x) for term, x in zip(inputs.split(","), factors, strict=True)]
        if any(len(set(term)) != len(term) for term in labels):
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

    def on_sum(
        self, x: Node, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, **names: Any
    ) -> Value | None:
        value, dim, keepdim = self.value(x), names.get("axis", dim), names.get("keepdims", keepdim)
        if dim is None:
            return None
        summed = {i % len(value.dims) for i in _listed(dim)}
        over = atoms(axis for i in summed for axis in value.dims[i])
        kept = [() if i in summed else d for i, d in enumerate(value.dims) if keepdim or i not in summed]
        if isinstance(value.of, Attention):
            return Value(tuple(kept), Total(value.of)) if set(over) == set(atoms(value.of.softmax.inputs)) else None
        if isinstance(value.of, Product):
            return self._contracted(value.of.a, value.of.b, over, tuple(kept))
        return None

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

    def on_softmax(self, x: Node, dim: int | None = None, *_: Any, **names: Any) -> Value | None:
        """Ours, if it runs over all axes that only the queries have, and at most batch axes beside them."""
        dim = names.get("axis", dim)
        logits = self.value(x)
        if dim is None or not isinstance(logits.of, Logits):
            self.refused[self.node] = "its logits are not a product of two tensors times a number"
            return None
        over = set(atoms(logits.dims[dim]))
        for q, k in ((logits.of.a, logits.of.b), (logits.of.b, logits.of.a)):
            batch = set(q.axes) & set(k.axes) - set(logits.of.over)
            slots, inputs = set(q.axes) - set(k.axes), set(k.axes) - set(q.axes)
            if slots and slots <= over <= slots | batch and inputs:
                break
        else:
            self.refused[self.node] = "it does not run over an axis that the queries alone have: no slots compete"
            return None
        if logits.of.mask and not set(logits.of.mask[0].axes) <= slots | batch:
            self.refused[self.node] = "its mask is not one of slots"
            return None
        self.refused[self.node] = ESCAPES
        softmax = Softmax(
            node=self.node, q=q, k=k, factor=logits.of.factor * q.of.factor * k.of.factor,
            features=atoms(logits.of.over),
            slots=tuple(a for a in q.axes if a in slots), inputs=tuple(a for a in k.axes if a in inputs),
            batch=tuple(a for a in atoms(a for d in logits.dims for a in d) if a in batch),
            heads=tuple(a for a in q.axes if a in batch and a in over), mask=logits.of.mask,
            scales=logits.of.scales,
        )  # fmt: skip
        return Value(logits.dims, Attention(softmax, self.node, logits.dims))

    def _found(
        self, attention: Attention, total: Total | None, v: Value, dims: tuple[Dim, ...], over: Dim | None = None
    ) -> Value | None:
        """The update that attention, divided by a total or not, makes of v."""
        softmax = attention.softmax
        batch, inputs = set(atoms(softmax.batch)), set(atoms(softmax.inputs))
        if over is not None and set(over) & set(atoms(softmax.slots)):
            self.refused[softmax.node] = "it is ordinary attention: values are summed over the axis of the softmax"
            return None
        if not batch | inputs <= set(v.axes) or (over is not None and set(over) != inputs):
            self.refused[softmax.node] = "values do not go with the keys"
            return None
        if set(v.axes) & set(atoms(softmax.slots)):
            self.refused[softmax.node] = "values differ from slot to slot"
            return None
        in_weights, in_denominator = attention.eps, total.eps if total else 0.0
        if in_weights and (in_denominator or total is None):
            self.refused[softmax.node] = "epsilon is added in more than one place"
            if total is not None:
                return None
        update = Update(
            node=self.node, dims=dims, attention=attention, v=v, eps=in_weights or in_denominator,
            eps_in="denominator" if in_denominator else "weights", normalize="mean" if total else "sum",
            recorded=self.recorded,
        )  # fmt: skip
        if not (in_weights and total is None):
            self.refused.pop(softmax.node, None)
        self.updates[self.node] = update
        return Value(dims, update)

    @staticmethod
    def _broadcast(i: Dim, j: Dim) -> Dim:
        if atoms(i) and atoms(j):
            identify(i, j)
        return i if atoms(i) else j


def example(node: Node) -> Any:
    """The fake tensor, or number, that torch.compile had in a node's place."""
    return node.meta.get("example_value", node.meta.get("val"))


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
    "alias", "bfloat16", "broadcast_to", "chunk", "contiguous", "detach", "diagonal", "double", "expand", "expand_as",
    "flatten", "float", "getattr", "getitem", "half", "moveaxis", "movedim", "narrow", "permute", "reshape",
    "reshape_as", "select", "split", "squeeze", "swapaxes", "swapdims", "t", "to", "transpose", "type", "type_as",
    "unbind", "unflatten", "unsqueeze", "view", "view_as",
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


def _aligned(a: Sequence[Dim], b: Sequence[Dim]) -> Iterable[tuple[Dim, Dim]]:
    """Dimensions of two tensors that broadcasting puts beside each other, from the last."""
    n = max(len(a), len(b))
    return list(zip([()] * (n - len(a)) + list(a), [()] * (n - len(b)) + list(b), strict=True))


def _with_ellipsis(term: str, rank: int) -> list[Any]:
    """A term's subscripts; those that stand for an ellipsis of `rank` dimensions are ints, counted from the last."""
    before, dots, after = term.partition("...")
    return [*before, *(range(-rank, 0) if dots else ()), *after]
