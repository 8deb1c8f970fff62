"""Rules for the softmax over slots, however it is spelt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.fx import Node

from iio_kernels.acceleration.graph import example, name_of
from iio_kernels.acceleration.recognition.axes import Axis, atoms, fresh, identify
from iio_kernels.acceleration.recognition.numbers import NumberRules
from iio_kernels.acceleration.recognition.terms import (
    Attention,
    Exponential,
    Joined,
    Leaf,
    LogAttention,
    Logits,
    Query,
    Softmax,
    Value,
    is_same,
)
from iio_kernels.acceleration.report import ESCAPES


class SoftmaxRules(NumberRules):
    """The softmax, its logarithm, and the logits of several queries in a row."""

    def on_softmax(self, x: Node, dim: int | None = None, *_: Any, **names: Any) -> Value | None:
        dim, logits = names.get("axis", dim), self.value(x)
        if dim is not None and isinstance(logits.of, Logits):
            return self._softmax(logits, set(atoms(logits.dims[dim])))
        self.refused[self.node] = self._no_logits(x)
        return None

    def on_softmin(self, x: Node, dim: int | None = None, *_: Any, **names: Any) -> Value | None:
        dim, logits = names.get("axis", dim), self._scaled(x, -1)
        if dim is not None and logits is not None and isinstance(logits.of, Logits):
            return self._softmax(logits, set(atoms(logits.dims[dim])))
        self.refused[self.node] = self._no_logits(x)
        return None

    def on_log_softmax(self, x: Node, dim: int | None = None, *_: Any, **names: Any) -> Value | None:
        value = self.on_softmax(x, dim, **names)
        return None if value is None else Value(value.dims, LogAttention(value.of))

    def on_exp(self, x: Node) -> Value | None:
        value = self.value(x)
        if isinstance(value.of, LogAttention):
            return Value(value.dims, replace(value.of.attention, node=self.node, dims=value.dims))
        return Value(value.dims, Exponential(value.of)) if isinstance(value.of, Logits) else None

    def _softmax(self, logits: Value, over: set[Axis] | frozenset[Axis]) -> Value | None:
        """Ours, if it runs over all axes that only the queries have, and at most batch axes beside them."""
        of = logits.of
        for i, j in (beside for bias in of.biases for beside in bias.beside):
            if atoms(j):
                identify(i, j)
        over = set(atoms(over))
        for q, k in ((of.a, of.b), (of.b, of.a)):
            batch = set(q.axes) & set(k.axes) - set(atoms(of.over))
            slots, inputs = set(q.axes) - set(k.axes), set(k.axes) - set(q.axes)
            if slots and slots <= over <= slots | batch and inputs:
                break
        else:
            self.refused[self.node] = self._no_slots(set(of.a.axes), set(of.b.axes), over)
            return None
        if of.mask and not set(of.mask.value.axes) <= slots | batch:
            self.refused[self.node] = "its mask is not one of slots"
            return None
        if not all(set(bias.value.axes) <= slots | batch for bias in of.biases):
            self.refused[self.node] = "what is added to its logits differs from input to input"
            return None
        if set(atoms(of.shifts)) & over:
            self.refused[self.node] = "what is subtracted from its logits differs from slot to slot"
            return None
        self.refused[self.node] = ESCAPES
        own = tuple(a for a in q.axes if a in slots)
        softmax = Softmax(
            node=self.node, queries=q.of.queries if isinstance(q.of, Joined) else (Query(q, own),), k=k,
            factor=of.factor * q.of.factor * k.of.factor, features=atoms(of.over), slots=own,
            inputs=tuple(a for a in k.axes if a in inputs),
            batch=tuple(a for a in atoms(a for d in logits.dims for a in d) if a in batch),
            heads=tuple(a for a in q.axes if a in batch and a in over), mask=of.mask, biases=of.biases,
            scales=of.scales,
        )  # fmt: skip
        return Value(logits.dims, Attention(softmax, self.node, logits.dims, own))

    @staticmethod
    def _no_slots(a: set[Axis], b: set[Axis], over: set[Axis]) -> str:
        """Why a softmax over these axes does not run over slots, of logits whose factors have axes a and b."""
        if over <= a & b and (a < b or b < a):
            return "its keys differ from slot to slot"
        return "it does not run over an axis that the queries alone have: no slots compete"

    def _no_logits(self, x: Node) -> str:
        """Why these are not a slot attention's logits: what they went through after a product, element by element."""
        chain = [x]
        for node in chain:
            for before in node.all_input_nodes:
                joins = name_of(node) in ("cat", "concat", "concatenate", "stack")
                if not isinstance(example(before), Tensor):
                    continue
                if example(before).shape != example(x).shape and not joins:
                    continue
                if before in self.values and isinstance(self.values[before].of, Logits):
                    return f"its logits go through {name_of(node)!r}, which is not known there"
                if before not in chain:
                    chain.append(before)
        return "its logits are not a product of two tensors times a number"

    def on_cat(self, tensors: Any, dim: int = 0, **names: Any) -> Value | None:
        """Logits of several queries with the same keys, one after another along the slots."""
        values, dim = [self.value(x) for x in tensors], names.get("axis", dim)
        if not all(isinstance(value.of, Logits) and not (value.of.mask or value.of.biases) for value in values):
            return None
        for k in (values[0].of.b, values[0].of.a):
            queries = [query for value in values if (query := self._query(value, k, dim)) is not None]
            sizes = [example(x).shape[dim] for x in tensors]
            if len(queries) != len(values) or not all(isinstance(size, int) for size in sizes):
                continue
            over, kept = atoms(values[0].of.over), {frozenset(q.value.axes) & frozenset(k.axes) for q in queries}
            if len(kept) != 1 or any(set(atoms(value.of.over)) != set(over) for value in values):
                continue
            dims, (slots,) = list(values[0].dims), fresh([sum(sizes)])
            dims[dim] = slots
            factor = queries[0].factor or 1.0 if len({query.factor for query in queries}) == 1 else 1.0
            batch = tuple(axis for axis in k.axes if axis in queries[0].value.axes and axis not in over)
            joined = Joined(tuple(replace(query, factor=query.factor / factor) for query in queries))
            return Value(tuple(dims), Logits(Value((batch, slots, over), joined), k, over, factor))
        return None

    on_concat = on_concatenate = on_cat

    @staticmethod
    def _query(value: Value, k: Value, dim: int) -> Query | None:
        """The queries whose logits with these keys a value is, if `dim` is that of their slots."""
        logits, slots = value.of, atoms(value.dims[dim])
        for q, other in ((logits.a, logits.b), (logits.b, logits.a)):
            own = set(q.axes) - set(k.axes) == set(slots) and not logits.shifts
            if is_same(other, k) and own and isinstance(q.of, Leaf) and k.of.factor:
                return Query(q, slots, logits.factor * q.of.factor * other.of.factor / k.of.factor, logits.scales)
        return None
