"""The proof in float64 that a call computes what the graph does, gradients included."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import isnan
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node, map_arg

from iio_kernels.acceleration.graph import example, name_of, written_by
from iio_kernels.acceleration.recognition.terms import Update
from iio_kernels.acceleration.replacement.call import Call
from iio_kernels.acceleration.replacement.emptiness import Empty
from iio_kernels.acceleration.replacement.plan import Refused, Source
from iio_kernels.runtime.autograd import without_autocast

#: How far results and gradients may be apart in float64, of the largest of each: rounding makes 1e-13, and an epsilon
#: of 1e-8 in another place 1e-8.
TOLERANCE = 1e-10


#: What changes a tensor's dtype and nothing else.
CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as"}


SYMBOLS = (torch.SymInt, torch.SymFloat)


NUMBERS = (int, float, *SYMBOLS)


def distance(
    graph: Graph, group: list[Update], call: Call, sources: Sequence[Source], empty: str | None = None
) -> float:
    """How far apart a graph's updates and attention and a call's are, and their gradients, in float64.

    The operands are random; the distance is relative to the largest number of each. `empty`: the mask that leaves
    nothing. What is NaN in both is the same then.
    """
    theirs, ours = _both(graph, group, call, sources, empty)
    return max(_apart(a, b, nan_is_nan=empty is not None) for a, b in zip(theirs, ours, strict=False))


def nans_where_empty(graph: Graph, group: list[Update], call: Call, sources: Sequence[Source]) -> tuple[Empty, ...]:
    """What the graph makes NaN of where masks leave nothing."""
    found = []
    for mask in call.taking_part:
        theirs, _ = _both(graph, group, call, sources, mask)
        updates, A, gradients = theirs[: len(group)], theirs[len(group)], theirs[len(group) + 1 :]
        by_node = dict(zip(leaves_of(call, sources), gradients, strict=True))
        operands = []
        for operand, source in zip(call.operands, sources, strict=True):
            if operand.name not in call.taking_part:
                gradient = by_node[source.node]
                if (gradient if source.part is None else gradient[source.part]).isnan().any():
                    operands.append(operand.name)
        if any(U.isnan().any() for U in updates):
            found.append(Empty(mask, A is not None and bool(A.isnan().any()), tuple(operands)))
    return tuple(found)


def leaves_of(call: Call, sources: Sequence[Source]) -> list[Node]:
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
    """Updates, attention and gradients to `leaves_of`, of a graph and of a call. The graph's attention may be None.

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
            shape = [hint(size) for size in example(node).shape]
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
                given[scale.node] = (drawn(like.shape).abs() + 0.5).requires_grad_() if tensor else hint(like)
        theirs = evaluated(graph, group, dict(given))
        wide = replace(
            call,
            updates=tuple(update._replace(dtype=torch.float64) for update in call.updates),
            attention=call.attention._replace(dtype=torch.float64),
            return_attention=True,
        )
        made = wide.results(*(source.of(given.__getitem__, lambda f, *args: f(*args)) for source in sources))
        ours = list(made[: len(theirs)])
        weights = [drawn(x.shape) for x in theirs]
        leaves = [given[node] for node in leaves_of(call, sources)]
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


def evaluated(graph: Graph, group: list[Update], env: dict[Node, Any]) -> list[Tensor]:
    """The graph's own updates, and attention if a node holds it, of other operands and without casts."""
    needed = nodes_between(env.keys(), [update.node for update in group])
    attention: list[Tensor] = []

    def value_of(node: Node) -> Any:
        """A node's value, or what has its shape, where nothing else of it is needed."""
        if node in env:
            return env[node]
        like = example(node)
        return torch.empty([hint(size) for size in like.shape], dtype=torch.float64, device=like.device)

    for node in graph.nodes:
        if node not in needed:
            continue
        name, like = name_of(node), example(node)
        if isinstance(like, NUMBERS):
            env[node] = hint(like)
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


def nodes_between(operands: Iterable[Node], results: Iterable[Node]) -> set[Node]:
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


def check_gradients(group: list[Update], call: Call, sources: Sequence[Source]) -> None:
    """Refuse updates if gradients are recorded for a part of them alone: the call has all of them or none."""
    recorded = group[0].recorded
    between = nodes_between([node for source in sources for node in source.nodes], [update.node for update in group])
    modes = {recorded[node] for node in between if node in recorded}
    if not call.return_attention and all(recorded[update.node] is False for update in group):
        return  # where none are recorded for the result, none get further
    if len(modes) > 1:
        raise Refused("gradients are recorded for a part of it alone")


def hint(size: Any) -> Any:
    """The number that a symbolic size had when the graph was made."""
    return size.node.hint if isinstance(size, SYMBOLS) else size
