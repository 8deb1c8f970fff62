"""The backends of torch.compile: one that replaces slot attention and nothing else, and Inductor behind it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch

from iio_kernels.acceleration import torch_private
from iio_kernels.acceleration.replacement import rewriting
from iio_kernels.acceleration.report import Reason


def inductor(
    module: torch.fx.GraphModule, example_inputs: list[Any], *, mode: str | None = None, options: dict | None = None
) -> Callable:
    """The backend of `torch.compile(model, backend="iio_kernels")`: slot attention replaced, the rest by Inductor.

    `mode` and `options` are Inductor's. What is replaced, and what not, is logged to "iio_kernels" at level INFO.
    """
    patches = {**torch_private.inductor_settings(mode), **(options or {})}
    return torch_private.compile_by_inductor(rewritten(module, []), example_inputs, patches)


class Compiler:
    """The backend of one module's traces. torch.compile keeps it for ever, so it knows nothing of the module."""

    def __init__(self, log: list[tuple[list[str], list[Reason]]]) -> None:
        self.log = log

    def __call__(self, module: torch.fx.GraphModule, _: list[Any]) -> Callable:
        return rewritten(module, self.log).forward


def rewritten(module: torch.fx.GraphModule, log: list[tuple[list[str], list[Reason]]]) -> torch.fx.GraphModule:
    """A graph with its slot attention replaced, what and why not appended to `log`."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    try:
        # The proofs save tensors of their own, of which no one else is to know, torch.utils.checkpoint least of all.
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            calls, reasons = rewriting.rewrite(graph)
    except Exception as error:  # whatever it is, the module's own code is right
        warnings.warn(f"iio_kernels: slot attention is left as it is, since {error!r}", stacklevel=2)
        calls, reasons = [], [Reason(repr(error), None)]
    log.append(([str(call) for call in calls], reasons))
    logging.getLogger("iio_kernels").info("replaced: %s; left alone: %s", log[-1][0], [why.text for why in reasons])
    return torch.fx.GraphModule(module, graph) if calls else module
