"""Puts `slot_attention` where a graph spells it out, once it has proved in float64 that both are the same."""

from __future__ import annotations

import operator
from dataclasses import replace

from torch.fx import Graph

from iio_kernels.acceleration.graph import VIEWS, name_of, place_of, written_by
from iio_kernels.acceleration.recognition.reader import read
from iio_kernels.acceleration.recognition.terms import Update
from iio_kernels.acceleration.replacement.call import Call
from iio_kernels.acceleration.replacement.plan import Refused, Source, dying_with, grouped, plan
from iio_kernels.acceleration.replacement.proof import TOLERANCE, check_gradients, distance, nans_where_empty
from iio_kernels.acceleration.report import Reason


def rewrite(graph: Graph) -> tuple[list[Call], list[Reason]]:
    """Replace all slot attention in a graph of torch's functions: by what, and why what else is softmax was not."""
    updates, refused = read(graph)
    calls, reasons = [], [Reason(why, place_of(softmax)) for softmax, why in refused.items()]
    for group in grouped(updates):
        try:
            call, sources = plan(group)
            check_gradients(group, call, sources)
            try:
                apart = distance(graph, group, call, sources)
                call = replace(call, empty=nans_where_empty(graph, group, call, sources))
                apart_if_empty = [distance(graph, group, call, sources, mask) for mask in call.taking_part]
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise Refused(f"its proof in float64 did not run: {error!r}") from error
            if not apart <= TOLERANCE:
                raise Refused(f"in float64 what would replace it is {apart:.1g} off")
            if not max(apart_if_empty, default=0.0) <= TOLERANCE:
                raise Refused("where all is masked what would replace it is something else")
            replace_in(graph, group, call, sources)
            calls.append(call)
        except Refused as reason:
            reasons.append(Reason(str(reason), place_of(group[0].softmax.node)))
    graph.lint()
    return calls, reasons


def replace_in(graph: Graph, group: list[Update], call: Call, sources: list[Source]) -> None:
    """Put a call in the place of updates, and erase what nothing needs any more."""
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
    dying = dying_with(set(replaced), sources)
    with graph.inserting_before(first):
        operands = [source.of(lambda node: node, lambda f, *args: graph.call_function(f, args)) for source in sources]
        called = graph.call_function(call, tuple(operands))
        results = [graph.call_function(operator.getitem, (called, i)) for i in range(len(replaced))]
    for old, new in zip(replaced, results, strict=True):
        new.meta |= old.meta
        old.replace_all_uses_with(new)
    for node in sorted(dying, key=order.__getitem__, reverse=True):
        graph.erase_node(node)
