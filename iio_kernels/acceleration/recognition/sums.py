"""Rules for sums, norms and maxima: the sum that attention is divided by, and its bound from below."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.fx import Node

from iio_kernels.acceleration.graph import example
from iio_kernels.acceleration.recognition.axes import Dim, atoms
from iio_kernels.acceleration.recognition.contraction import ContractionRules
from iio_kernels.acceleration.recognition.rules import listed
from iio_kernels.acceleration.recognition.terms import (
    Attention,
    Detached,
    Exponential,
    Largest,
    Logits,
    Product,
    Sum,
    Total,
    Value,
    Weights,
)


class SumRules(ContractionRules):
    """Reductions over some dimensions."""

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

    def on_norm(self, x: Node, p: Any = 2, dim: Any = None, keepdim: bool = False) -> Value | None:
        """The sum, where p is 1: attention is not negative."""
        return self.on_sum(x, dim, keepdim) if p == 1 and isinstance(self.value(x).of, Attention) else None

    def on_linalg_vector_norm(self, x: Node, ord: Any = 2, dim: Any = None, keepdim: bool = False) -> Value | None:
        return self.on_norm(x, ord, dim, keepdim)

    def on_normalize(self, x: Node, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Value | None:
        """Attention divided by the sum of its absolute values, which is bounded from below."""
        total = self.on_norm(x, p, dim)
        return (
            None if total is None else Value(self.value(x).dims, Weights(total.of.attention, _bounded(total.of, eps)))
        )

    def on_clamp(self, x: Node, min: Any = None, max: None = None) -> Value | None:
        value, bound = self.value(x), self._number_of(min)
        if not isinstance(value.of, Total) or bound is None or max is not None:
            return None
        return Value(value.dims, _bounded(value.of, bound))

    on_clamp_min = on_clip = on_clamp

    def on_maximum(self, a: Node, b: Node) -> Value | None:
        return self.on_clamp(a, b) if isinstance(self.value(a).of, Total) else self.on_clamp(b, a)

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
        reduced = {i % len(value.dims) for i in listed(dim)}
        kept = [() if i in reduced else d for i, d in enumerate(value.dims) if keepdim or i not in reduced]
        return atoms(axis for i in reduced for axis in value.dims[i]), tuple(kept)


def _bounded(total: Total, bound: float) -> Total:
    """A total bounded from below, unless it is never so small that this shows."""
    if total.attention.eps + total.eps >= bound or (total.at_least is not None and total.at_least >= bound):
        return total
    return replace(total, at_least=bound)
