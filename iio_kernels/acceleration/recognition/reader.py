"""Reads a graph node by node, by all rules."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Graph, Node

from iio_kernels.acceleration.graph import descendants, example, name_of, written_by
from iio_kernels.acceleration.recognition.arithmetic import ArithmeticRules
from iio_kernels.acceleration.recognition.axes import Unlike
from iio_kernels.acceleration.recognition.products import ProductRules
from iio_kernels.acceleration.recognition.terms import Attention, Leaf, Update, Weights
from iio_kernels.acceleration.recognition.views import ViewRules
from iio_kernels.acceleration.report import ESCAPES, OTHERWISE
from iio_kernels.acceleration.torch_private import memory_of


def read(graph: Graph) -> tuple[list[Update], dict[Node, str]]:
    """The updates of a graph with "example_value"s, in its order, and of every softmax without one, why."""
    reader = Reader()
    for node in graph.nodes:
        reader.read(node)
    return reader.result()


class Reader(ViewRules, ArithmeticRules, ProductRules):
    """Reads a graph node by node; its bases hold the rules."""

    def read(self, node: Node) -> None:
        if node.op not in ("call_function", "call_method"):
            return
        name, written = name_of(node), written_by(node)
        if name == "set_grad_enabled":
            self.recording = node.args[0]
        elif "inference_mode" in name:
            self.recording = object()  # like nothing before or after
        self.recorded[node] = self.recording
        if written is not None:
            self.writes[memory_of(written)] = self.age(written) + 1
        rule = getattr(self, f"on_{name}", None)
        self.node = node
        try:
            value = rule(*node.args, **{k: v for k, v in node.kwargs.items() if k != "inplace"}) if rule else None
        except (Unlike, TypeError):
            value = None
        if value is None:
            for of in (self.values[x].of for x in node.all_input_nodes if x in self.values):
                if (attention := of if isinstance(of, Attention) else getattr(of, "attention", None)) is not None:
                    self.lost.setdefault(attention.softmax.node, []).append(node)
        if written is not None:
            self._overwritten(written)
            if value is None or isinstance(value.of, Leaf):
                value = (
                    self.new_leaf(node) if isinstance(example(node), Tensor) else None
                )  # its memory holds the result
            elif written is not node:
                self.values[written] = value
        if value is not None and isinstance(example(node), Tensor):
            self.values[node] = value

    def result(self) -> tuple[list[Update], dict[Node, str]]:
        """Of two that share a softmax, an update not yet divided and the same divided, the latter counts."""
        updates = [u for u in self.updates.values() if (u.total or u.attention.eps == 0) and self._unchanged(u)]
        divided = {(u.softmax.node, u.attention.part) for u in updates if u.total}
        updates = [u for u in updates if u.total or (u.softmax.node, u.attention.part) not in divided]
        for softmax in {u.softmax.node for u in updates}:
            self.refused.pop(softmax, None)
        for softmax, why in self.refused.items():
            if why == ESCAPES and softmax in self.lost:
                blocks = self._blocks(softmax)
                if blocks is not None:
                    name = name_of(blocks)
                    other = f"{OTHERWISE} alone: " if name == "logsumexp" else ""
                    self.refused[softmax] = f"{other}its attention goes through {name!r}, which is not known there"
        return updates, self.refused

    def _blocks(self, softmax: Node) -> Node | None:
        """Of what a softmax's attention goes through that is not known, the first on its way into a product with
        something else: copies that are kept or shown have no say. None, if the attention leaves the graph."""
        own = descendants(softmax)

        def meets(node: Node) -> bool:
            tensors = [x for x in node.all_input_nodes if isinstance(example(x), Tensor) and example(x).dim() > 1]
            return name_of(node) in PRODUCTS and not own.issuperset(tensors)

        lost = self.lost[softmax]
        blocking = [node for node in lost if any(map(meets, descendants(node)))]
        held = [node for node, value in self.values.items() if isinstance(value.of, (Attention, Weights))]
        if not blocking and any(user.op == "output" for node in held if node in own for user in node.users):
            return None
        return min(blocking or lost, key=lambda node: name_of(node) == "detach")

    def _overwritten(self, node: Node) -> None:
        """Whatever was known of a tensor that is written to, and of all that share its memory, is known no more."""
        memory = memory_of(node)
        for other in [other for other in self.values if memory_of(other) == memory]:
            self.values[other] = self.new_leaf(other)

    def _unchanged(self, update: Update) -> bool:
        """Whether all that the update reads still holds, at the end, what it held when it was read."""
        softmax = update.softmax
        values = [softmax.k, update.v, *(query.value for query in softmax.queries)]
        values += [x for value in values for x in value.of.linear or () if x is not None]
        values += [mask.value for mask in (softmax.mask, update.attention.mask) if mask]
        values += [bias.value for bias in softmax.biases]
        scales = [*softmax.scales, *(scale for query in softmax.queries for scale in query.scales)]
        scales += [scale for bias in softmax.biases for scale in bias.scales]
        if all(self.age(value.of.node) == value.of.age for value in values) and all(
            scale.age is None or scale.age == self.age(scale.node) for scale in scales
        ):
            return True
        self.refused[update.softmax.node] = "queries, keys or values are overwritten"
        return False


#: Where attention meets values.
PRODUCTS = {
    "addmm", "baddbmm", "bmm", "dot", "einsum", "linear", "matmul", "mm", "mul", "multiply", "mv",
    "scaled_dot_product_attention", "tensordot",
}  # fmt: skip
