"""Rules for views and casts, which leave the numbers as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from iio_kernels.acceleration.graph import example, name_of
from iio_kernels.acceleration.recognition.axes import regroup
from iio_kernels.acceleration.recognition.parts import PartRules
from iio_kernels.acceleration.recognition.rules import listed
from iio_kernels.acceleration.recognition.sums import SumRules
from iio_kernels.acceleration.recognition.terms import Constant, Detached, Indicator, Largest, Logits, Value


class ViewRules(PartRules, SumRules):
    """Reshapes, transpositions, indices, casts, and dropout that does nothing."""

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
        source, destination = ([i % n for i in listed(d)] for d in (source, destination))
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
