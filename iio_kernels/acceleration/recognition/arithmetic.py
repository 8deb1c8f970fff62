"""Rules for products, quotients, sums and differences of tensors, element by element."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.fx import Node

from iio_kernels.acceleration.graph import example
from iio_kernels.acceleration.recognition.axes import Dim, atoms
from iio_kernels.acceleration.recognition.contraction import ContractionRules
from iio_kernels.acceleration.recognition.masks import MaskRules
from iio_kernels.acceleration.recognition.rules import aligned
from iio_kernels.acceleration.recognition.softmax import SoftmaxRules
from iio_kernels.acceleration.recognition.terms import (
    Attention,
    Bias,
    Exponential,
    Inverse,
    Largest,
    LogAttention,
    Logits,
    Product,
    Sum,
    Total,
    Value,
    Weights,
)


class ArithmeticRules(MaskRules, SoftmaxRules, ContractionRules):
    """Arithmetic element by element: scales, epsilons, biases, and what is divided by its sum."""

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
        dims = tuple(self._broadcast(i, j) for i, j in aligned(x.dims, y.dims))
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
        for i, j in aligned(x.dims, dims):
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
        new = Bias(added, factor * added.of.factor, aligned(logits.dims, added.dims))
        return Value(logits.dims, replace(logits.of, biases=(*logits.of.biases, new)))
