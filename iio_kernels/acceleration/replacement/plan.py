"""Which call replaces an update, and on which tensors of the graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from math import inf, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from iio_kernels.acceleration.graph import example, place_of, written_by
from iio_kernels.acceleration.recognition.axes import Axis, Dim, atoms
from iio_kernels.acceleration.recognition.terms import Scale, Update, Value, is_same
from iio_kernels.acceleration.replacement.call import Call, Layout, Mean, Operand, Result
from iio_kernels.acceleration.torch_private import memory_of
from iio_kernels.runtime import backends


class Refused(Exception):
    """Why an update is left alone."""


class Source(NamedTuple):
    """Where an operand comes from: a node of the graph, or a part of it, times numbers that are nodes too."""

    node: Node
    part: tuple[Any, ...] | None
    scales: tuple[Scale, ...] = ()

    @property
    def nodes(self) -> list[Node]:
        return [self.node, *(scale.node for scale in self.scales)]

    def of(self, value: Callable[[Node], Any], call: Callable[..., Any]) -> Any:
        """The operand itself, made of the nodes' values by calls of functions."""
        x = value(self.node)
        x = x if self.part is None else call(operator.getitem, x, self.part)
        for scale in self.scales:
            by = value(scale.node)
            by = call(torch.reshape, by, ()) if isinstance(example(scale.node), Tensor) else by
            x = call(operator.truediv if scale.divides else operator.mul, x, by)
        return x


def grouped(updates: Iterable[Update]) -> list[list[Update]]:
    """Updates of some slots each, the background's and the objects' say, that one call makes together."""
    groups: list[list[Update]] = []

    def together(a: Update, b: Update) -> bool:
        same = a.softmax is b.softmax and a.attention.mask is b.attention.mask and a.attention.eps == b.attention.eps
        totals = [(u.total.eps, u.total.at_least) if u.total else None for u in (a, b)]
        return same and totals[0] == totals[1] and is_same(a.v, b.v) and a.v.of.factor == b.v.of.factor

    for update in updates:
        parts = (group for group in groups if group[0].attention.part and together(group[0], update))
        group = next(parts, None) if update.attention.part else None
        if group is None:
            groups.append([update])
        else:
            group.append(update)
    return groups


def plan(group: list[Update]) -> tuple[Call, list[Source]]:
    """The call that makes updates of one softmax, and the nodes it is to be called on."""
    update = group[0]
    attention, softmax, v = update.attention, update.softmax, update.v
    if attention.node is not None and attention.node not in set(update.node.graph.nodes):
        raise Refused("another product took its attention")
    device = example(update.node).device
    if backends.choose("slot_attention", "auto", device) == "reference":
        raise Refused(f"no kernels serve {device.type} tensors here, see iio_kernels.backends()")
    batch, heads, slots, inputs, features = (
        atoms(axes) for axes in (softmax.batch, softmax.heads, softmax.slots, softmax.inputs, softmax.features)
    )
    leading = [(axis,) for axis in batch if axis not in heads] + ([heads] if heads else [])
    values = tuple(axis for axis in v.axes if axis not in batch and axis not in inputs)
    scale, factor = softmax.factor, v.of.factor
    operands = [("q", q.value, (*leading, atoms(q.slots), features), q.factor) for q in softmax.queries]
    scales = [(*q.scales, *softmax.scales) for q in softmax.queries]
    operands += [("logit_bias", bias.value, (*leading, slots), bias.factor) for bias in softmax.biases]
    scales += [bias.scales for bias in softmax.biases]
    of_keys, of_values = (_projection(*of, batch, inputs) for of in ((softmax.k, features), (v, values)))
    if of_keys is not None and of_values is not None and _projection_free(of_keys, of_values, batch):
        (x, wk, bk), (_, wv, bv) = of_keys, of_values
        scale, factor = scale * x.of.factor * wk.of.factor, factor * x.of.factor * wv.of.factor
        width = tuple(axis for axis in x.axes if axis in wk.axes)
        operands += [("x", x, (*leading, inputs, width), 1.0)]
        operands += [("wk", wk, (*leading, features, width), 1.0), ("wv", wv, (*leading, values, width), 1.0)]
        operands += [("bk", bk, (*leading, features), 1.0)] if bk else []
        operands += [("bv", bv, (*leading, values), 1.0)] if bv else []
    else:
        operands += [("k", softmax.k, (*leading, inputs, features), 1.0), ("v", v, (*leading, inputs, values), 1.0)]
    masks = {"slot_mask": (softmax.mask, slots), "input_mask": (attention.mask, inputs)}
    operands += [(name, mask.value, (*leading, own), 1.0) for name, (mask, own) in masks.items() if mask]

    numbers: dict[Axis, int] = {}

    def numbered(dims: Iterable[Dim]) -> Layout:
        return tuple(tuple(numbers.setdefault(axis, len(numbers)) for axis in atoms(dim)) for dim in dims)

    laid_out = tuple(Operand(name, numbered(x.of.shape), numbered(wanted), by) for name, x, wanted, by in operands)
    sources = [Source(x.of.node, x.of.index) for _, x, _, _ in operands]
    sources[: len(scales)] = [source._replace(scales=of) for source, of in zip(sources, scales, strict=False)]
    node = attention.node or softmax.node
    made = tuple(
        Result(
            part=u.attention.part,
            layout=numbered([*leading, u.attention.slots, values]),
            wanted=numbered(u.dims),
            dtype=example(u.node).dtype,
        )
        for u in group
    )
    options, mean = _averaging(update)
    call = Call(
        operands=laid_out,
        updates=made,
        attention=Result(
            part=None,
            layout=numbered([*leading, slots, inputs]),
            wanted=numbered(attention.dims),
            dtype=example(node).dtype,
        ),
        sizes={number: axis.size for axis, number in numbers.items() if isinstance(axis.size, int)},
        taking_part={name: mask.taking_part for name, (mask, _) in masks.items() if mask},
        fill=softmax.mask.fill if softmax.mask else -inf,
        factor=factor,
        options=options | {"scale": scale, "joint_heads": bool(heads)},
        mean=mean,
        return_attention=node not in dying_with({u.node for u in group}, sources),
        place=place_of(softmax.node),
    )
    if call.return_attention and attention.node is None:
        raise Refused("its attention is used, and masked after epsilon was added")
    known = call.sizes.keys() | {dim[0] for operand in laid_out for dim in operand.layout if len(dim) == 1}
    if not set(numbers.values()) <= known:
        raise Refused("where shapes are dynamic its sizes cannot be told apart")
    return call, sources


def _averaging(update: Update) -> tuple[dict[str, Any], Mean | None]:
    """Options of the operation, and what is done to its result where they do not say it all."""
    attention, total = update.attention, update.total
    if total is None:
        return {"eps": 0.0, "eps_in": "weights", "normalize": "sum"}, None
    if attention.eps_if_masked:
        mean = Mean(total.eps, total.at_least, attention.eps)
        return {"eps": 0.0, "eps_in": "weights", "normalize": "sum"}, mean
    if total.at_least is not None or (attention.eps and total.eps):
        # Without an epsilon the sum itself is what is divided.
        options = {"eps": attention.eps, "eps_in": "weights", "normalize": "mean" if attention.eps else "sum"}
        return options, Mean(total.eps, total.at_least, 0.0)
    eps_in = "denominator" if total.eps else "weights"
    return {"eps": total.eps or attention.eps, "eps_in": eps_in, "normalize": "mean"}, None


Projection = tuple[Value, Value, "Value | None"]


def _projection(projected: Value, own: Dim, batch: Dim, inputs: Dim) -> Projection | None:
    """x, weight and bias, where keys or values are a linear map of inputs, perhaps one for each head."""
    if projected.of.linear is None:
        return None
    a, b, bias = projected.of.linear
    x, weight = (a, b) if set(inputs) <= set(a.axes) else (b, a)
    has, width, all_batch = set(x.axes), set(x.axes) & set(weight.axes), set(batch)
    fits = (
        has - width <= {*batch, *inputs}
        and set(inputs) <= has - width
        and set(own) <= set(weight.axes) - width <= {*own, *batch}
        and not width & {*own, *batch}
        and all_batch <= has | set(weight.axes)
        and (bias is None or x.of.factor == weight.of.factor == 1)
    )
    return (x, weight, bias) if fits else None


def _projection_free(keys: Projection, values: Projection, batch: Dim) -> bool:
    """Whether both are linear in one x, and reading x for each head is no more than reading its keys and values."""
    (x, wk, _), (other, wv, _) = keys, values
    same = (x.of.node, x.of.age, x.of.index, x.axes) == (other.of.node, other.of.age, other.of.index, other.axes)
    width = set(x.axes) & set(wk.axes)
    if not same or width != set(x.axes) & set(wv.axes) or (set(wk.axes) ^ set(wv.axes)) & set(batch):
        return False
    heads, read = ([axis.size for axis in axes] for axes in (set(wk.axes) & set(batch), width))
    made = [[axis.size for axis in weight.axes if axis not in width and axis not in batch] for weight in (wk, wv)]
    if not all(isinstance(size, int) for size in (*heads, *read, *made[0], *made[1])):
        return False
    return prod(heads) == 1 or prod(read) <= 2 * (prod(made[0]) + prod(made[1]))


def dying_with(replaced: set[Node], sources: Sequence[Source]) -> set[Node]:
    """The nodes that nothing needs once some are replaced, these included."""
    graph = next(iter(replaced)).graph
    kept = {node for source in sources for node in source.nodes}
    writes = {node for node in graph.nodes if not node.users and written_by(node)}
    while True:
        dying = set(replaced)
        for node in reversed(graph.nodes):
            unneeded = node in writes or (node.users and dying.issuperset(node.users))
            if unneeded and node.op.startswith("call") and node not in kept:
                dying.add(node)
        # Nobody reads what a write returns; it is needed if anything else lies in the memory that it writes to, such as
        # a parameter of which the graph has but views.
        alive = {memory_of(node) for node in graph.nodes if node not in dying and isinstance(example(node), Tensor)}
        needed = {node for node in writes & dying if (target := written_by(node)) and memory_of(target) in alive}
        if not needed:
            return dying
        writes -= needed
