"""Rules for masks: slots left out of logits, inputs left out of attention."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from iio_kernels.acceleration.graph import example
from iio_kernels.acceleration.recognition.axes import atoms, identify
from iio_kernels.acceleration.recognition.numbers import NumberRules
from iio_kernels.acceleration.recognition.rules import aligned
from iio_kernels.acceleration.recognition.terms import Attention, Exponential, Indicator, Logits, Mask, Value


class MaskRules(NumberRules):
    """Masks of slots and of inputs."""

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
        for i, j in aligned(value.dims, mask.dims):
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
