"""The call that replaces slot attention in a graph, and how its operands and results lie there."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iio_kernels.acceleration.replacement.emptiness import Empty
from iio_kernels.ops.slot_attention.api import attend, attend_from_inputs
from iio_kernels.ops.slot_attention.common import InputOperands, Operands, Options
from iio_kernels.runtime import backends
from iio_kernels.runtime.numerics import arithmetic_dtype

Layout = tuple[tuple[int, ...], ...]


"""The axes that each dimension holds, by number."""


class Operand(NamedTuple):
    """An argument of the call: how its tensor lies in the graph, and how the call wants it."""

    name: str
    layout: Layout
    wanted: Layout
    factor: float = 1.0
    """What it is multiplied by."""


class Result(NamedTuple):
    """An update: the slots that it has, if not all, how the call makes it, and how it lies in the graph."""

    part: tuple[int, int] | None
    layout: Layout
    wanted: Layout
    dtype: torch.dtype


class Mean(NamedTuple):
    """A mean that is not an option of the operations: the sum of weighted values, divided by a sum of weights plus
    `eps` that is at least `at_least`."""

    eps: float
    at_least: float | None
    eps_if_masked: float
    """What is added to all weights, those of masked inputs too."""


@dataclass(frozen=True, eq=False)
class Call:
    """A call of `slot_attention` or `slot_attention_from_inputs` on tensors laid out in any way.

    Called on the operands, it returns the updates as the graph had them laid out and the attention, if it is wanted.
    Operands named "q" follow each other along the slots, and those named "logit_bias" are added to the logits.
    """

    operands: tuple[Operand, ...]
    sizes: dict[int, int]
    """Of the axes whose sizes are known; others are taken from a dimension that holds nothing else."""
    updates: tuple[Result, ...]
    attention: Result
    taking_part: dict[str, bool]
    fill: float
    """The logits of a masked slot."""
    factor: float
    options: dict[str, Any]
    mean: Mean | None
    return_attention: bool
    place: tuple[str, int] | None
    """The file and line of its softmax."""
    empty: tuple[Empty, ...] = ()
    """What becomes NaN where masks leave nothing."""

    __name__ = "slot_attention"

    @property
    def from_inputs(self) -> bool:
        return any(operand.name == "x" for operand in self.operands)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if _made is not None:
            _made[self] += 1
        return self.results(*tensors)

    def results(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What it returns."""
        sizes = self.sizes_of(tensors)
        several: dict[str, list[Tensor]] = defaultdict(list)
        for operand, x in zip(self.operands, tensors, strict=True):
            x = arranged(x, operand.layout, operand.wanted, sizes)
            several[operand.name].append(x if operand.factor == 1 else x * operand.factor)
        queries, biases = several.pop("q"), several.pop("logit_bias", [])
        given = {name: x for name, (x,) in several.items()}
        for mask, taking_part in self.taking_part.items():
            given[mask] = given[mask] if taking_part else ~given[mask]
        q = queries[0] if len(queries) == 1 else torch.cat(queries, -2)
        logit_bias, slot_mask, input_mask = None, given.get("slot_mask"), given.get("input_mask")
        if biases:
            logit_bias = functools.reduce(torch.add, (x.to(arithmetic_dtype(q)).expand(q.shape[:-1]) for x in biases))
        given |= {"q": q} if logit_bias is None else {"q": q, "logit_bias": logit_bias}
        if slot_mask is not None:
            slot_mask = slot_mask.expand(q.shape[:-1])
            if self.fill != -inf:
                q, logit_bias = self._filled(q, logit_bias, slot_mask)
                slot_mask = None
        if input_mask is not None:
            input_mask = input_mask.expand(*q.shape[:-2], input_mask.shape[-1])
        backend = backends.choose("slot_attention", "auto", q.device)
        rest, call = (logit_bias, slot_mask, input_mask), (Options(**self.options), self.return_attention, backend)
        U: Tensor
        if self.from_inputs:
            x, wk, wv = given["x"], given["wk"], given["wv"]
            U, S, A = attend_from_inputs(InputOperands(x, q, wk, given.get("bk"), wv, given.get("bv"), *rest), *call)
        else:
            k, v = given["k"], given["v"]
            U, S, A = attend(Operands(q, k, None if v is k else v, *rest), *call)
        if self.mean is not None:
            U = self._divided(self.mean, U, S, **given)
        for empty in self.empty:
            U, A = empty.applied(U, A, given, self.options["joint_heads"])
        U = U if self.factor == 1 else U * self.factor
        results = []
        for part, layout, wanted, dtype in self.updates:
            own = U if part is None else U[..., part[0] : part[1], :]
            own_sizes = sizes if part is None else sizes | dict.fromkeys(layout[-2], part[1] - part[0])
            results.append(arranged(own, layout, wanted, own_sizes).to(dtype))
        if A is not None:
            results.append(arranged(A, self.attention.layout, self.attention.wanted, sizes).to(self.attention.dtype))
        return tuple(results)

    def _filled(self, q: Tensor, logit_bias: Tensor | None, slot_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and what is added to their logits, so that a masked slot's logits are `fill` and nothing else: in
        an image that has no other slots they decide."""
        bias = q.new_zeros(q.shape[:-1], dtype=arithmetic_dtype(q)) if logit_bias is None else logit_bias
        return q.masked_fill(~slot_mask.unsqueeze(-1), 0), bias.masked_fill(~slot_mask, self.fill)

    def sizes_of(self, tensors: Sequence[Tensor]) -> dict[int, Any]:
        """Of all axes, given the operands."""
        sizes = dict(self.sizes)
        for operand, x in zip(self.operands, tensors, strict=True):
            sizes |= {dim[0]: x.shape[i] for i, dim in enumerate(operand.layout) if len(dim) == 1}
        return sizes

    def _divided(self, mean: Mean, U: Tensor, S: Tensor, **given: Tensor) -> Tensor:
        """The mean, from what the operation makes with a normaliser of S, a sum or a mean."""
        eps, at_least, eps_if_masked = mean
        U = U if self.options["normalize"] == "sum" else U * S.unsqueeze(-1)
        if eps_if_masked:
            if self.from_inputs:
                x, bv = given["x"], given.get("bv")
                N, values = x.shape[-2], x.sum(-2, keepdim=True, dtype=U.dtype) @ given["wv"].mT.to(U.dtype)
                values = values if bv is None else values + N * bv.unsqueeze(-2)
            else:
                N, values = given["v"].shape[-2], given["v"].sum(-2, keepdim=True, dtype=U.dtype)
            U, S = U + eps_if_masked * values, S + N * eps_if_masked
        S = S + eps if eps else S
        return U / (S if at_least is None else S.clamp(min=at_least)).unsqueeze(-1)

    def __str__(self) -> str:
        said = []
        if self.mean is not None and self.mean.eps_if_masked:
            said.append(f"eps {self.mean.eps_if_masked:g} in weights, masked inputs' too")
        elif self.options["normalize"] == "mean":
            said.append(f"eps {self.options['eps']:g} in {self.options['eps_in']}")
        elif self.mean is None:
            said.append("a sum")
        if self.mean is not None and self.mean.eps:
            said.append(f"eps {self.mean.eps:g} in denominator")
        if self.mean is not None and self.mean.at_least is not None:
            said.append(f"divided by {self.mean.at_least:g} at least")
        if self.options["joint_heads"]:
            said.append("joint heads")
        return f"{'slot_attention_from_inputs' if self.from_inputs else 'slot_attention'} ({', '.join(said)})"


#: How often each call was made, while somebody counts.
_made: Counter[Call] | None = None


@contextmanager
def counted() -> Iterator[Counter[Call]]:
    """How often each call is made meanwhile, the proofs' aside."""
    global _made
    before, _made = _made, Counter()
    try:
        yield _made
    finally:
        _made = before


def arranged(x: Tensor, layout: Layout, wanted: Layout, sizes: dict[int, Any]) -> Tensor:
    """x, whose dimensions hold the axes of `layout`, with those of `wanted`; an axis that it lacks has size 1."""
    if layout == wanted:
        return x
    have = [axis for dim in layout for axis in dim]
    if any(len(dim) != 1 for dim in layout):
        x = x.reshape([sizes[axis] for axis in have])
    x = x.permute([have.index(axis) for dim in wanted for axis in dim if axis in have])
    if any(len(dim) != 1 or dim[0] not in have for dim in wanted):
        x = x.reshape([prod(sizes[axis] for axis in dim if axis in have) for dim in wanted])
    return x
