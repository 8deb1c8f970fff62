"""Sums of products: of queries and keys, logits; of attention and values, an update."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from iio_kernels.acceleration.recognition.axes import Dim, atoms
from iio_kernels.acceleration.recognition.rules import Rules
from iio_kernels.acceleration.recognition.terms import Attention, Leaf, Logits, Total, Update, Value, Weights


class ContractionRules(Rules):
    """What the sum of a product over axes of both its factors is."""

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
