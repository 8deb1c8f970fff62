"""Rules for products of matrices and `einsum`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.fx import Node

from iio_kernels.acceleration.graph import example
from iio_kernels.acceleration.recognition.rules import aligned
from iio_kernels.acceleration.recognition.sums import SumRules
from iio_kernels.acceleration.recognition.terms import Attention, Bias, Leaf, Logits, Value, Weights


class ProductRules(SumRules):
    """Products that are summed as they are made."""

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
        linear = made.of.a, made.of.b, Value(own, Leaf(bias, own, self.age(bias)))
        return Value(made.dims, Leaf(self.node, made.dims, self.age(self.node), linear=linear))

    def on_baddbmm(self, bias: Node, a: Node, b: Node, *, beta: float = 1, alpha: float = 1) -> Value | None:
        product = self.on_matmul(a, b)
        if product is None or not isinstance(product.of, Logits):
            return None
        added = self.leaf(bias)
        biases = (Bias(added, beta * added.of.factor, aligned(product.dims, added.dims)),) if beta else ()
        return Value(product.dims, replace(product.of, factor=alpha, biases=biases))


def _with_ellipsis(term: str, rank: int) -> list[Any]:
    """A term's subscripts; those that stand for an ellipsis of `rank` dimensions are ints, counted from the last."""
    before, dots, after = term.partition("...")
    return [*before, *(range(-rank, 0) if dots else ()), *after]
