"""Puts `slot_attention` where a graph spells it out, once it has proved in float64 that both are the same."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import isnan, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node, map_arg

from iio_kernels import _backends
from iio_kernels._autograd import without_autocast
from iio_kernels.acceleration.axes import Axis, Dim, atoms
from iio_kernels.acceleration.emptiness import Empty
from iio_kernels.acceleration.recognition import (
    VIEWS,
    Scale,
    Update,
    Value,
    _memory,
    example,
    name_of,
    read,
    written_by,
)
from iio_kernels.ops.slot_attention import slot_attention, slot_attention_from_inputs

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


@dataclass(frozen=True, eq=False)
class Call:
    """A call of `slot_attention` or `slot_attention_from_inputs` on tensors laid out in any way.

    Called on the operands, it returns the update as the graph had it laid out and the attention, if it is wanted.
    `eps_if_masked`: masked inputs add nothing but epsilon, which the operations cannot express by themselves.
    """

    operands: tuple[Operand, ...]
    sizes: dict[int, int]
    """Of the axes whose sizes are known; others are taken from a dimension that holds nothing else."""
    update: tuple[Layout, Layout]
    attention: tuple[Layout, Layout]
    dtypes: tuple[torch.dtype, torch.dtype]
    factor: float
    taking_part: dict[str, bool]
    eps_if_masked: float | None
    options: dict[str, Any]
    return_attention: bool
    empty: tuple[Empty, ...] = ()
    """What becomes NaN where masks leave nothing."""

    __name__ = "slot_attention"

    @property
    def from_inputs(self) -> bool:
        return self.operands[1].name == "x"

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        sizes = self.sizes_of(tensors)
        given: dict[str, Any]
        given = {o.name: arranged(x, o.layout, o.wanted, sizes) for o, x in zip(self.operands, tensors, strict=True)}
        for mask, taking_part in self.taking_part.items():
            given[mask] = given[mask] if taking_part else ~given[mask]
        options = self.options | {"return_attention": self.return_attention or self.eps_if_masked is not None}
        out: Any
        if self.from_inputs:
            given = {"bk": None, "bv": None} | given
            out = slot_attention_from_inputs(**given, **options)
        else:
            out = slot_attention(**given, **options)
        U, A = out if options["return_attention"] else (out, out)
        if self.eps_if_masked is not None:
            U = self._with_eps(U, A, self.eps_if_masked, **given)
        for empty in self.empty:
            U, A = empty.applied(U, A, given, self.options["joint_heads"])
        U = arranged(U if self.factor == 1 else U * self.factor, *self.update, sizes).to(self.dtypes[0])
        return U, arranged(A, *self.attention, sizes).to(self.dtypes[1]) if self.return_attention else None

    def sizes_of(self, tensors: Sequence[Tensor]) -> dict[int, Any]:
        """Of all axes, given the operands."""
        sizes = dict(self.sizes)
        for operand, x in zip(self.operands, tensors, strict=True):
            sizes |= {dim[0]: x.shape[i] for i, dim in enumerate(operand.layout) if len(dim) == 1}
        return sizes

    def _with_eps(self, U: Tensor, A: Tensor, eps: float, **given: Any) -> Tensor:
        """The mean under A + eps of all values, from the sum U of those that are not masked under A."""
        if self.from_inputs:
            values = given["x"].sum(-2, keepdim=True) @ given["wv"].mT
            N = given["x"].shape[-2]
            values = values if given["bv"] is None else values + N * given["bv"].unsqueeze(-2)
        else:
            values, N = given["v"].sum(-2, keepdim=True), given["v"].shape[-2]
        return (U + eps * values) / (A.sum(-1, keepdim=True) + N * eps)

    def __str__(self) -> str:
        if self.eps_if_masked is not None:
            eps = f"eps {self.eps_if_masked:g} in weights, masked inputs' too"
        elif self.options["normalize"] == "sum":
            eps = "a sum"
        else:
            eps = f"eps {self.options['eps']:g} in {self.options['eps_in']}"
        heads = ", joint heads" if self.options["joint_heads"] else ""
        return f"{'slot_attention_from_inputs' if self.from_inputs else 'slot_attention'} ({eps}{heads})"


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


def rewrite(graph: Graph) -> tuple[list[Call], list[str]]:
    """Replace all slot attention in a graph of torch's functions: by what, and why what else is softmax was not."""
    updates, refused = read(graph)
    calls, reasons = [], list(refused.values())
    for update in updates:
        try:
            call, sources = _planned(update)
            _check_gradients(update, call, sources)
            try:
                apart = distance(graph, update, call, sources)
                call = replace(call, empty=_nans(graph, update, call, sources))
                apart_if_empty = [distance(graph, update, call, sources, mask) for mask in call.taking_part]
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise Refused(f"its proof in float64 did not run: {error!r}") from error
            if not apart <= TOLERANCE:
                raise Refused(f"in float64 what would replace it is {apart:.1g} off")
            if not max(apart_if_empty, default=0.0) <= TOLERANCE:
                raise Refused("where all is masked what would replace it is something else")
            _replace(graph, update, call, sources)
            calls.append(call)
        except Refused as reason:
            reasons.append(str(reason))
    graph.lint()
    return calls, reasons


class Refused(Exception):
    """Why an update is left alone."""


def _planned(update: Update) -> tuple[Call, list[Source]]:
    """The call that makes an update, and the nodes it is to be called on."""
    if update.attention.node is not None and update.attention.node not in set(update.node.graph.nodes):
        raise Refused("another product took its attention")
    device = example(update.node).device
    if _backends.choose("slot_attention", "auto", device) == "reference":
        raise Refused(f"no kernels serve {device.type} tensors here, see iio_kernels.backends()")
    softmax, v = update.softmax, update.v
    batch, heads, slots, inputs, features = (
        atoms(axes) for axes in (softmax.batch, softmax.heads, softmax.slots, softmax.inputs, softmax.features)
    )
    leading = [(axis,) for axis in batch if axis not in heads] + ([heads] if heads else [])
    values = tuple(axis for axis in v.axes if axis not in batch and axis not in inputs)
    scale, factor = softmax.factor, v.of.factor
    operands = [("q", softmax.q, (*leading, slots, features))]
    of_keys, of_values = (_projection(*of, batch, inputs) for of in ((softmax.k, features), (v, values)))
    if of_keys is not None and of_values is not None and _projection_free(of_keys, of_values, batch):
        (x, wk, bk), (_, wv, bv) = of_keys, of_values
        scale, factor = scale * x.of.factor * wk.of.factor, factor * x.of.factor * wv.of.factor
        width = tuple(axis for axis in x.axes if axis in wk.axes)
        operands += [("x", x, (*leading, inputs, width))]
        operands += [("wk", wk, (*leading, features, width)), ("wv", wv, (*leading, values, width))]
        operands += [("bk", bk, (*leading, features))] if bk else []
        operands += [("bv", bv, (*leading, values))] if bv else []
    else:
        operands += [("k", softmax.k, (*leading, inputs, features)), ("v", v, (*leading, inputs, values))]
    either = {"slot_mask": (softmax.mask, slots), "input_mask": (update.attention.mask, inputs)}
    masks = {name: (*mask, (*leading, own)) for name, (mask, own) in either.items() if mask}
    operands += [(name, mask, wanted) for name, (mask, _, wanted) in masks.items()]

    numbers: dict[Axis, int] = {}

    def numbered(dims: Iterable[Dim]) -> Layout:
        return tuple(tuple(numbers.setdefault(axis, len(numbers)) for axis in atoms(dim)) for dim in dims)

    laid_out = tuple(Operand(name, numbered(x.of.shape), numbered(wanted)) for name, x, wanted in operands)
    sources = [Source(x.of.node, x.of.index) for _, x, _ in operands]
    sources[0] = sources[0]._replace(scales=softmax.scales)
    eps_if_masked = update.eps if update.attention.eps_if_masked else None
    call = Call(
        operands=laid_out,
        update=(numbered([*leading, slots, values]), numbered(update.dims)),
        attention=(numbered([*leading, slots, inputs]), numbered(update.attention.dims)),
        sizes={number: axis.size for axis, number in numbers.items() if isinstance(axis.size, int)},
        dtypes=(example(update.node).dtype, example(update.attention.node or softmax.node).dtype),
        factor=factor,
        taking_part={name: taking_part for name, (_, taking_part, _) in masks.items()},
        eps_if_masked=eps_if_masked,
        options=dict(
            scale=scale,
            eps=update.eps,
            eps_in=update.eps_in,
            joint_heads=bool(heads),
            normalize=update.normalize if eps_if_masked is None else "sum",
        ),
        return_attention=(update.attention.node or softmax.node) not in _dying({update.node}, sources),
    )
    if call.return_attention and update.attention.node is None:
        raise Refused("its attention is used, and masked after epsilon was added")
    known = call.sizes.keys() | {dim[0] for operand in laid_out for dim in operand.layout if len(dim) == 1}
    if not set(numbers.values()) <= known:
        raise Refused("where shapes are dynamic its sizes cannot be told apart")
    return call, sources


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


def _replace(graph: Graph, update: Update, call: Call, sources: list[Source]) -> None:
    order = {node: i for i, node in enumerate(graph.nodes)}
    replaced = [update.node]
    if call.return_attention and update.attention.node is not None:
        replaced.append(update.attention.node)
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


def distance(graph: Graph, update: Update, call: Call, sources: Sequence[Source], empty: str | None = None) -> float:
    """How far apart a graph's update and attention and a call's are, and their gradients, in float64.

    The operands are random; the distance is relative to the largest number of each. `empty`: the mask that leaves
    nothing. What is NaN in both is the same then.
    """
    theirs, ours = _both(graph, update, call, sources, empty)
    return max(_apart(a, b, nan_is_nan=empty is not None) for a, b in zip(theirs, ours, strict=False))


def _nans(graph: Graph, update: Update, call: Call, sources: Sequence[Source]) -> tuple[Empty, ...]:
    """What the graph makes NaN of where masks leave nothing."""
    found = []
    for mask in call.taking_part:
        theirs, _ = _both(graph, update, call, sources, mask)
        U, A, *gradients = theirs
        by_node = dict(zip(_leaves(call, sources), gradients, strict=True))
        operands = []
        for operand, source in zip(call.operands, sources, strict=True):
            if operand.name not in call.taking_part:
                gradient = by_node[source.node]
                if (gradient if source.part is None else gradient[source.part]).isnan().any():
                    operands.append(operand.name)
        if U.isnan().any():
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
"""Tensors, of which the second may be None."""


def _both(
    graph: Graph, update: Update, call: Call, sources: Sequence[Source], empty: str | None
) -> tuple[Results, Results]:
    """Update, attention and gradients to `_leaves`, of a graph and of a call. The graph's attention may be None.

    They are of few images and inputs unless the graph has the numbers of these written into it.
    """
    images = {dim[0] for dim in call.update[0][:-2] if len(dim) == 1}
    inputs = set(call.attention[0][-1])
    for few in (dict.fromkeys(images, 2) | dict.fromkeys(inputs, 32), dict.fromkeys(images, 2), {}):
        try:
            return _both_of_few(graph, update, call, sources, empty, few)
        except (RuntimeError, ValueError, IndexError):
            if not few:
                raise
    raise AssertionError("unreachable")


def _both_of_few(
    graph: Graph, update: Update, call: Call, sources: Sequence[Source], empty: str | None, few: dict[int, int]
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
                given[node] = drawn(shape).requires_grad_()
            for scale in scales:
                like = example(scale.node)
                tensor = isinstance(like, Tensor)
                given[scale.node] = (drawn(like.shape).abs() + 0.5).requires_grad_() if tensor else _hint(like)
        theirs = _evaluated(graph, update, dict(given))
        with_attention = replace(call, dtypes=(torch.float64,) * 2, return_attention=True)
        made = with_attention(*(source.of(given.__getitem__, lambda f, *args: f(*args)) for source in sources))
        ours = [x for x in made if x is not None][: len(theirs)]
        weights = [drawn(x.shape) for x in theirs]
        leaves = [given[node] for node in _leaves(call, sources)]
        both: list[Results] = []
        for results in (theirs, ours):
            total = torch.stack([(x * w).sum() for x, w in zip(results, weights, strict=True)]).sum()
            both.append([*results, *[None] * (2 - len(results)), *torch.autograd.grad(total, leaves)])
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


def _evaluated(graph: Graph, update: Update, env: dict[Node, Any]) -> list[Tensor]:
    """The graph's own update, and attention if a node holds it, of other operands and without casts."""
    needed = _between(env.keys(), update.node)
    attention = []
    for node in graph.nodes:
        if node not in needed:
            continue
        name, like = name_of(node), example(node)
        if isinstance(like, NUMBERS):
            env[node] = _hint(like)
            continue
        if not node.op.startswith("call"):
            raise Refused(f"its softmax depends on {node} in a way not known here")
        args, kwargs = map_arg((node.args, {k: v for k, v in node.kwargs.items() if k != "dtype"}), env.__getitem__)
        if name in CASTS:
            made = args[0]
        elif node.op == "call_method":
            made = getattr(args[0], node.target)(*args[1:], **kwargs)
        else:
            made = node.target(*args, **kwargs)
        env[node] = made
        if node is update.attention.node:
            attention = [made.clone()]
    return [env[update.node], *attention]


def _between(operands: Iterable[Node], result: Node) -> set[Node]:
    """The nodes that make the result of the operands, the result and whatever writes to one of them included."""
    between, stack = set(operands), [result]
    while stack:
        node = stack.pop()
        if node not in between:
            between.add(node)
            if not isinstance(example(node), NUMBERS):
                stack += [*node.all_input_nodes, *(user for user in node.users if written_by(user) is node)]
    return between - set(operands)


def _check_gradients(update: Update, call: Call, sources: Sequence[Source]) -> None:
    """Refuse an update if gradients are recorded for a part of it alone: the call has all of them or none."""
    between = _between([node for source in sources for node in source.nodes], update.node)
    modes = {update.recorded[node] for node in between if node in update.recorded}
    if update.recorded[update.node] is False and not call.return_attention:
        return  # where none are recorded for the result, none get further
    if len(modes) > 1:
        raise Refused("gradients are recorded for a part of it alone")


def _hint(size: Any) -> Any:
    """The number that a symbolic size had when the graph was made."""
    return size.node.hint if isinstance(size, SYMBOLS) else size
