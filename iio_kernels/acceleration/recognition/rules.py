"""What all rules of the reader stand on: what is known of each tensor so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from iio_kernels.acceleration.graph import example
from iio_kernels.acceleration.recognition.axes import Dim, Unlike, atoms, fresh, identify
from iio_kernels.acceleration.recognition.terms import Constant, Leaf, Logits, Update, Value, is_product
from iio_kernels.acceleration.torch_private import memory_of


class Rules:
    """What is known of each tensor of a graph so far.

    The classes that add rules name them `on_...`, with the names and parameters of torch's functions.
    """

    def __init__(self) -> None:
        self.recording: object = torch.is_grad_enabled()
        """Whether gradients are recorded at this place; an object of its own where that is not known."""
        self.recorded: dict[Node, object] = {}
        """The same of every node."""
        self.values: dict[Node, Value] = {}
        self.writes: dict[int, int] = {}
        """How many writes each memory has seen."""
        self.updates: dict[Node, Update] = {}
        self.refused: dict[Node, str] = {}
        """Of every softmax without an update, why."""
        self.parts: dict[tuple[Node, int, int], Dim] = {}
        """The axis of each part of a softmax's slots."""
        self.lost: dict[Node, list[Node]] = {}
        """Of every softmax, what its attention goes through that is not known here."""
        self.node: Node
        """The one that is read."""

    def value(self, node: Any) -> Value:
        """What a tensor is."""
        if not isinstance(node, Node) or not isinstance(example(node), Tensor):
            raise Unlike
        if node not in self.values:
            self.values[node] = self.new_leaf(node)
        return self.values[node]

    def leaf(self, node: Any) -> Value:
        """What a tensor is, as an operand: a leaf whatever it was made of."""
        value = self.value(node)
        if isinstance(value.of, Leaf):
            return value
        linear = None
        if isinstance(value.of, Logits) and is_product(value.of):
            b = value.of.b
            linear = value.of.a, Value(b.dims, replace(b.of, factor=b.of.factor * value.of.factor)), None
        return Value(value.dims, Leaf(node, value.dims, self.age(node), linear=linear))

    def new_leaf(self, node: Node) -> Value:
        """A tensor of which nothing is known but its shape."""
        dims = fresh(example(node).shape)
        return Value(dims, Leaf(node, dims, self.age(node)))

    def age(self, node: Node) -> int:
        """How often the graph has written to a tensor's memory so far."""
        return self.writes.get(memory_of(node), 0)

    def _number_of(self, x: Any) -> float | None:
        """The number that x is, or that it holds everywhere."""
        if not isinstance(x, Node):
            return x if isinstance(x, (int, float)) else None
        of = self.value(x).of if isinstance(example(x), Tensor) else None
        return of.number if isinstance(of, Constant) else None

    @staticmethod
    def _broadcast(i: Dim, j: Dim) -> Dim:
        """The dimension that two make together; both the same, unless one has size 1."""
        if atoms(i) and atoms(j):
            identify(i, j)
        return i if atoms(i) else j


def listed(dim: Any) -> list[int]:
    """One dimension or several, as a list."""
    return list(dim) if isinstance(dim, Sequence) else [dim]


def aligned(a: Sequence[Dim], b: Sequence[Dim]) -> list[tuple[Dim, Dim]]:
    """Dimensions of two tensors that broadcasting puts beside each other, from the last."""
    n = max(len(a), len(b))
    return list(zip([()] * (n - len(a)) + list(a), [()] * (n - len(b)) + list(b), strict=True))
