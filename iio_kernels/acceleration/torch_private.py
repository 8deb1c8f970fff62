"""What of torch is private and used here, each with the reason that nothing public does it.

`tracing.py` has the tracer's own classes besides: it changes some of their methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes


def in_transform() -> bool:
    """Whether a call is part of a transform of torch.func, of forward-mode differentiation or of somebody's tracing.

    All of these are to see the module's own code. No public function says that one of them is active.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def memory_of(node: Node) -> int:
    """What tells the memory of a node's example from others': a fake tensor's `data_ptr()` raises."""
    x: Any = node.meta.get("example_value", node.meta.get("val"))
    return identity_of(x.untyped_storage())


def identity_of(memory: torch.UntypedStorage) -> int:
    """What tells a storage from others.

    One storage has many objects in Python, and `data_ptr()` is 0 of all that are empty.
    """
    return memory._cdata


@contextmanager
def without_modes_and_subclasses() -> Iterator[None]:
    """Have tensors do what torch's own do, whatever modes are active and whatever their class makes of it.

    The public `torch.overrides.enable_torch_function` turns on what this turns off, and modes have nothing of the kind.
    """
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def set_version(x: Tensor, version: int) -> None:
    """Set the version that autograd counts: what was put back is what a graph from before has saved."""
    torch._C._autograd._unsafe_set_version_counter((x,), (version,))


def trace_callbacks() -> Any:
    """What is called where torch.compile begins and ends a trace: warnings are silenced in between alone."""
    return torch._dynamo.callback.callback_handler


def remove_forward_pre_hooks(module: nn.Module, kind: type) -> None:
    """Remove the hooks of one class, of copies and pickles too, whose handles nobody has."""
    for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, kind)]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def forward_pre_hooks(module: nn.Module) -> list[Callable]:
    """The hooks before a module's forward, which has no public list."""
    return list(module._forward_pre_hooks.values())


def compile_by_inductor(graph: torch.fx.GraphModule, example_inputs: list[Any], patches: dict[str, Any]) -> Callable:
    """Compile a graph by Inductor, with changes of its settings; `torch._inductor.compile` takes no fake tensors."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(graph, example_inputs, config_patches=patches or None)
    return compiled


def inductor_settings(mode: str | None) -> dict[str, Any]:
    """The settings of Inductor that a mode of torch.compile means."""
    from torch._inductor import list_mode_options

    return list_mode_options(mode) if mode else {}
