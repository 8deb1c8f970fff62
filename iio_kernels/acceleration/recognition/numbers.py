"""Rules for numbers: tensors that hold one number everywhere, and logits, keys or values times a number."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from iio_kernels.acceleration.graph import example
from iio_kernels.acceleration.recognition.axes import fresh
from iio_kernels.acceleration.recognition.rules import Rules
from iio_kernels.acceleration.recognition.terms import Attention, Constant, Leaf, Logits, Scale, Total, Value


class NumberRules(Rules):
    """Constants, and what is multiplied by a number."""

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

    def on_neg(self, x: Node) -> Value | None:
        return self._scaled(x, -1)

    on_negative = on_neg

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

    def _scaled_by(self, x: Any, scale: Any, *, divides: bool) -> Value | None:
        """Logits times a number, or a tensor of one."""
        value = self.value(x) if isinstance(x, Node) and isinstance(example(x), Tensor) else None
        if value is None or not isinstance(value.of, Logits) or value.of.mask or not isinstance(scale, Node):
            return None
        like = example(scale)
        if isinstance(like, Tensor):
            if not like.is_floating_point() or like.dim() > len(value.dims) or any(size != 1 for size in like.shape):
                return None
            age = self.age(scale)
        elif isinstance(like, torch.SymFloat):
            age = None
        else:
            return None
        scale = Scale(scale, divides, age)
        biases = tuple(replace(bias, scales=(*bias.scales, scale)) for bias in value.of.biases)
        return Value(value.dims, replace(value.of, scales=(*value.of.scales, scale), biases=biases))
