"""Which modules of a model take a softmax, in which others, and on what arguments."""

from __future__ import annotations

import sys
import types
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from iio_kernels.acceleration.graph import TORCH


@dataclass
class Softmaxes:
    """The softmaxes that one module takes."""

    codes: set[types.CodeType] = field(default_factory=set)
    """The functions that take them."""
    times: Counter[nn.Module] = field(default_factory=Counter)
    """How many, in the first call of it and of each module around it."""

    def holds(self, place: tuple[str, int] | None) -> bool:
        """Whether a file and line belong to them."""
        return place is None or any(
            code.co_filename == place[0]
            and code.co_firstlineno <= place[1] <= max(line or 0 for _, _, line in code.co_lines())
            for code in self.codes
        )


class Watch(TorchDispatchMode):
    """While a model runs, sees which modules normalise by exponentials, in which others, and with what arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.stack: list[nn.Module] = []
        self.softmaxes: dict[tuple[nn.Module, ...], Softmaxes] = {}
        self.calls: dict[nn.Module, tuple[tuple, dict]] = {}
        self.first: set[nn.Module] = set()
        self.exponentials, self.sums, self.logarithms = (WeakTensorKeyDictionary() for _ in range(3))

    def __enter__(self) -> Watch:
        def entered(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.stack.append(module)
            if module not in self.calls:
                self.calls[module] = args, kwargs
                self.first.add(module)

        def left(module: nn.Module, *_: Any) -> None:
            self.stack.remove(module)
            if module not in self.stack:
                self.first.discard(module)

        # ScriptModules have no hooks of their own.
        scripted = {module for module in self.model.modules() if isinstance(module, torch.jit.ScriptModule)}

        self.hooks = [
            hook
            for module in self.model.modules()
            if not type(module).__module__.startswith("torch.nn") and not isinstance(module, torch.jit.ScriptModule)
            for hook in (
                module.register_forward_pre_hook(entered, with_kwargs=True),
                module.register_forward_hook(left, always_call=True),
            )
        ]
        if scripted:
            self.hooks += [
                register_module_forward_pre_hook(lambda m, args: entered(m, args, {}) if m in scripted else None),
                register_module_forward_hook(lambda m, *_: left(m) if m in scripted else None, always_call=True),
            ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **kwargs or {})
        name = func.__name__
        normalises = self._divides(name, args, out) or "softmax" in name or "logsumexp" in name
        if self.stack and normalises:
            softmaxes = self.softmaxes.setdefault(tuple(self.stack), Softmaxes())
            softmaxes.codes.add(_calling())
            if "logsumexp" not in name:
                softmaxes.times.update(self.first.intersection(self.stack))
        return out

    def _divides(self, name: str, args: tuple, out: Any) -> bool:
        """Whether exponentials are divided by their sum, a softmax that is written out; keeps account of both, and of
        logarithms of softmaxes, whose exponentials are no such thing."""
        x, by = ([x for x in args if isinstance(x, Tensor)] + [None, None])[:2]
        if x is None or name.startswith("_softmax"):  # of logits that a learnt temperature, an exponential, scales
            return False
        if name.startswith(("_log_softmax", "logsumexp")):
            self.logarithms[out] = True
        elif name.startswith(("exp.", "exp_.")):
            if x not in self.logarithms:
                self.exponentials[out] = True
        elif name.startswith("sum.") and x in self.exponentials:
            self.sums[out] = True
        elif name.startswith(("div.", "div_.")):
            return by is not None and x in self.exponentials and by in self.sums
        elif isinstance(out, Tensor):
            # Views, sums with epsilon, masks.
            for account in (self.exponentials, self.sums, self.logarithms):
                if any(own in account and own.numel() <= out.numel() for own in (x, by) if own is not None):
                    account[out] = True
        return False


def _calling() -> types.CodeType:
    """The code of the innermost function that is not torch's, nor ours."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith((TORCH, __file__)):
        frame = frame.f_back
    return frame.f_code
