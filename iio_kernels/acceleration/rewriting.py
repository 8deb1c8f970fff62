"""Puts `slot_attention` where a graph spells it out, once it has proved in float64 that both are the same."""

from __future__ import annotations

import functools
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf, isnan, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node, map_arg

from iio_kernels.acceleration.axes import Axis, Dim, atoms
from iio_kernels.acceleration.emptiness import Empty
from iio_kernels.acceleration.recognition import (
    VIEWS,
    Reason,
    Scale,
    Update,
    Value,
    _memory,
    example,
    is_same,
    name_of,
    place_of,
    read,
    written_by,
)
from iio_kernels.ops.slot_attention.api import attend, attend_from_inputs
from iio_kernels.ops.slot_attention.common import InputOperands, Operands, Options
from iio_kernels.runtime import backends
from iio_kernels.runtime.autograd import without_autocast
from iio_kernels.runtime.numerics import arithmetic_dtype

#: How far results and gradients may be apart in float64, of the largest of each: rounding makes 1e-13, and an epsilon
#: of 1e-8 in another place 1e-8.
TOLERANCE = 1e-10

#: What changes a tensor's dtype and nothing else.
CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as"}

SYMBOLS = (torch.SymInt, torch.SymFloat)
NUMBERS = (int, float, *SYMBOLS)

Layout = tuple[tuple[int, ...], ...]
"""The axes that each dimension holds, by number."""


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


def rewrite(graph: Graph) -> tuple[list[Call], list[Reason]]:
    """Replace all slot attention in a graph of torch's functions: by what, and why what else is softmax was not."""
    updates, refused = read(graph)
    calls, reasons = [], [Reason(why, place_of(softmax)) for softmax, why in refused.items()]
    for group in _grouped(updates):
        try:
            call, sources = _planned(group)
            _check_gradients(group, call, sources)
            try:
                apart = distance(graph, group, call, sources)
                call = replace(call, empty=_nans(graph, group, call, sources))
                apart_if_empty = [distance(graph, group, call, sources, mask) for mask in call.taking_part]
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise Refused(f"its proof in float64 did not run: {error!r}") from error
            if not apart <= TOLERANCE:
                raise Refused(f"in float64 what would replace it is {apart:.1g} off")
            if not max(apart_if_empty, default=0.0) <= TOLERANCE:
                raise Refused("where all is masked what would replace it is something else")
            _replace(graph, group, call, sources)
            calls.append(call)
        except Refused as reason:
            reasons.append(Reason(str(reason), place_of(group[0].softmax.node)))
    graph.lint()
    return calls, reasons


class Refused(Exception):
    """Why an update is left alone."""


def _grouped(updates: Iterable[Update]) -> list[list[Update]]:
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


def _planned(group: list[Update]) -> tuple[Call, list[Source]]:
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
        return_attention=node not in _dying({u.node for u in group}, sources),
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


def _dying(replaced: set[Node], sources: Sequence[Source]) -> set[Node]:
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
        alive = {_memory(node) for node in graph.nodes if node not in dying and isinstance(example(node), Tensor)}
        needed = {node for node in writes & dying if (target := written_by(node)) and _memory(target) in alive}
        if not needed:
            return dying
        writes -= needed


def _replace(graph: Graph, group: list[Update], call: Call, sources: list[Source]) -> None:
    order = {node: i for i, node in enumerate(graph.nodes)}
    replaced = [update.node for update in group]
    if call.return_attention and group[0].attention.node is not None:
        replaced.append(group[0].attention.node)
    first = min(replaced, key=order.__getitem__)
    late, stack = set(), [node for source in sources for node in source.nodes]
    while stack:
        node = stack.pop()
        if order[node] > order[first] and node not in late:
            late.add(node)
            stack += node.all_input_nodes
    if late:
        # Views of what is there already may as well be taken earlier, unless something happens in between.
        between = list(graph.nodes)[order[first] : max(map(order.__getitem__, late))]
        happens = any(written_by(node) is not None or "_grad_" in str(node.target) for node in between)
        if happens or not all(name_of(node) in VIEWS for node in late):
            raise Refused("its attention is used before its values are made")
    for node in sorted(late, key=order.__getitem__):
        first.prepend(node)
    dying = _dying(set(replaced), sources)
    with graph.inserting_before(first):
        operands = [source.of(lambda node: node, lambda f, *args: graph.call_function(f, args)) for source in sources]
        called = graph.call_function(call, tuple(operands))
        results = [graph.call_function(operator.getitem, (called, i)) for i in range(len(replaced))]
    for old, new in zip(replaced, results, strict=True):
        new.meta |= old.meta
        old.replace_all_uses_with(new)
    for node in sorted(dying, key=order.__getitem__, reverse=True):
        graph.erase_node(node)


def distance(
    graph: Graph, group: list[Update], call: Call, sources: Sequence[Source], empty: str | None = None
) -> float:
    """How far apart a graph's updates and attention and a call's are, and their gradients, in float64.

    The operands are random; the distance is relative to the largest number of each. `empty`: the mask that leaves
    nothing. What is NaN in both is the same then.
    """
    theirs, ours = _both(graph, group, call, sources, empty)
    return max(_apart(a, b, nan_is_nan=empty is not None) for a, b in zip(theirs, ours, strict=False))


def _nans(graph: Graph, group: list[Update], call: Call, sources: Sequence[Source]) -> tuple[Empty, ...]:
    """What the graph makes NaN of where masks leave nothing."""
    found = []
    for mask in call.taking_part:
        theirs, _ = _both(graph, group, call, sources, mask)
        updates, A, gradients = theirs[: len(group)], theirs[len(group)], theirs[len(group) + 1 :]
        by_node = dict(zip(_leaves(call, sources), gradients, strict=True))
        operands = []
        for operand, source in zip(call.operands, sources, strict=True):
            if operand.name not in call.taking_part:
                gradient = by_node[source.node]
                if (gradient if source.part is None else gradient[source.part]).isnan().any():
                    operands.append(operand.name)
        if any(U.isnan().any() for U in updates):
            found.append(Empty(mask, A is not None and bool(A.isnan().any()), tuple(operands)))
    return tuple(found)


def _leaves(call: Call, sources: Sequence[Source]) -> list[Node]:
    """The nodes to which there are gradients."""
    leaves: dict[Node, None] = {}
    for operand, (node, _, scales) in zip(call.operands, sources, strict=True):
        if operand.name not in call.taking_part:
            leaves[node] = None
        leaves |= {scale.node: None for scale in scales if isinstance(example(scale.node), Tensor)}
    return list(leaves)


Results = list[Any]
"""Tensors; attention may be None."""


def _both(
    graph: Graph, group: list[Update], call: Call, sources: Sequence[Source], empty: str | None
) -> tuple[Results, Results]:
    """Updates, attention and gradients to `_leaves`, of a graph and of a call. The graph's attention may be None.

    They are of few images and inputs unless the graph has the numbers of these written into it.
    """
    images = {dim[0] for dim in call.attention.layout[:-2] if len(dim) == 1}
    inputs = set(call.attention.layout[-1])
    for few in (dict.fromkeys(images, 2) | dict.fromkeys(inputs, 32), dict.fromkeys(images, 2), {}):
        try:
            return _both_of_few(graph, group, call, sources, empty, few)
        except (RuntimeError, ValueError, IndexError):
            if not few:
                raise
    raise AssertionError("unreachable")


def _both_of_few(
    graph: Graph, group: list[Update], call: Call, sources: Sequence[Source], empty: str | None, few: dict[int, int]
) -> tuple[Results, Results]:
    device = example(sources[0].node).device
    generator = torch.Generator(device).manual_seed(0)

    def drawn(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)

    given = {}
    with torch.enable_grad(), without_autocast(device):
        for operand, (node, index, scales) in zip(call.operands, sources, strict=True):
            shape = [_hint(size) for size in example(node).shape]
            left = [i for i in range(len(shape)) if index is None or isinstance(index[i], slice)]
            for i, dim in zip(left, operand.layout, strict=True):
                shape[i] = min(shape[i], few.get(dim[0], shape[i])) if len(dim) == 1 else shape[i]
            if operand.name in call.taking_part:
                nothing = torch.zeros(shape, dtype=torch.bool, device=device)
                mask = nothing if operand.name == empty else _drawn_mask(drawn, shape)
                given[node] = mask == call.taking_part[operand.name]
            else:
                # A mask of -1e9 and 0 would leave no attention to compare.
                given[node] = (drawn(shape) / max(1.0, abs(operand.factor))).requires_grad_()
            for scale in scales:
                like = example(scale.node)
                tensor = isinstance(like, Tensor)
                given[scale.node] = (drawn(like.shape).abs() + 0.5).requires_grad_() if tensor else _hint(like)
        theirs = _evaluated(graph, group, dict(given))
        wide = replace(
            call,
            updates=tuple(update._replace(dtype=torch.float64) for update in call.updates),
            attention=call.attention._replace(dtype=torch.float64),
            return_attention=True,
        )
        made = wide.results(*(source.of(given.__getitem__, lambda f, *args: f(*args)) for source in sources))
        ours = list(made[: len(theirs)])
        weights = [drawn(x.shape) for x in theirs]
        leaves = [given[node] for node in _leaves(call, sources)]
        both: list[Results] = []
        for results in (theirs, ours):
            total = torch.stack([(x * w).sum() for x, w in zip(results, weights, strict=True)]).sum()
            missing = [None] * (len(group) + 1 - len(results))
            both.append([*results, *missing, *torch.autograd.grad(total, leaves)])
        return both[0], both[1]


def _drawn_mask(drawn: Callable[[Sequence[int]], Tensor], shape: list[int]) -> Tensor:
    """A random mask in which something is masked, but nowhere all."""
    for _ in range(1000):
        taking_part = drawn(shape) < 0.5
        if not taking_part.all() and all(taking_part.any(i).all() for i in range(len(shape)) if shape[i] > 1):
            return taking_part
    raise Refused("its mask leaves nothing to mask")


def _apart(a: Tensor | None, b: Tensor | None, nan_is_nan: bool) -> float:
    if a is None or b is None:
        return 0.0
    if a.shape != b.shape or not (nan_is_nan or a.isfinite().all()):
        return float("inf")
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    number = ~a.isnan()
    a, b = a[number], b[number]
    difference = ((a - b).abs().max() / a.abs().max().clamp(min=1e-300)).item() if a.numel() else 0.0
    return float("inf") if isnan(difference) else difference


def _evaluated(graph: Graph, group: list[Update], env: dict[Node, Any]) -> list[Tensor]:
    """The graph's own updates, and attention if a node holds it, of other operands and without casts."""
    needed = _between(env.keys(), [update.node for update in group])
    attention: list[Tensor] = []

    def value_of(node: Node) -> Any:
        """A node's value, or what has its shape, where nothing else of it is needed."""
        if node in env:
            return env[node]
        like = example(node)
        return torch.empty([_hint(size) for size in like.shape], dtype=torch.float64, device=like.device)

    for node in graph.nodes:
        if node not in needed:
            continue
        name, like = name_of(node), example(node)
        if isinstance(like, NUMBERS):
            env[node] = _hint(like)
            continue
        if not node.op.startswith("call"):
            raise Refused(f"its softmax depends on {node} in a way not known here")
        args, kwargs = map_arg((node.args, {k: v for k, v in node.kwargs.items() if k != "dtype"}), value_of)
        made: Any
        if name in CASTS:
            made = args[0].double() if args[0].dtype == torch.bool and like.is_floating_point() else args[0]
        elif node.op == "call_method":
            made = getattr(args[0], node.target)(*args[1:], **kwargs)
        else:
            made = node.target(*args, **kwargs)
        env[node] = made
        if node is group[0].attention.node:
            attention = [made.clone()]
    return [*(env[update.node] for update in group), *attention]


#: What takes nothing but the shape of one of its arguments, and where that is.
SHAPED_LIKE = {
    "expand_as": 1, "full_like": 0, "new_full": 0, "new_ones": 0, "new_zeros": 0, "ones_like": 0, "reshape_as": 1,
    "type_as": 1, "view_as": 1, "zeros_like": 0,
}  # fmt: skip


def _between(operands: Iterable[Node], results: Iterable[Node]) -> set[Node]:
    """The nodes that make the results of the operands, the results and whatever writes to one of them included."""
    between, stack = set(operands), list(results)
    while stack:
        node = stack.pop()
        if node not in between:
            between.add(node)
            if not isinstance(example(node), NUMBERS):
                like = SHAPED_LIKE.get(name_of(node))
                read = [x for x in node.all_input_nodes if like is None or x is not node.args[like]]
                stack += [*read, *(user for user in node.users if written_by(user) is node)]
    return between - set(operands)


def _check_gradients(group: list[Update], call: Call, sources: Sequence[Source]) -> None:
    """Refuse updates if gradients are recorded for a part of them alone: the call has all of them or none."""
    recorded = group[0].recorded
    between = _between([node for source in sources for node in source.nodes], [update.node for update in group])
    modes = {recorded[node] for node in between if node in recorded}
    if not call.return_attention and all(recorded[update.node] is False for update in group):
        return  # where none are recorded for the result, none get further
    if len(modes) > 1:
        raise Refused("gradients are recorded for a part of it alone")


def _hint(size: Any) -> Any:
    """The number that a symbolic size had when the graph was made."""
    return size.node.hint if isinstance(size, SYMBOLS) else size
