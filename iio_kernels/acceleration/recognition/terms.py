"""What a tensor may be in terms of slot attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from iio_kernels.acceleration.recognition.axes import Axis, Dim, atoms


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


def is_product(logits: Logits) -> bool:
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
