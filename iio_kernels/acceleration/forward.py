"""The forward of an accelerated module, in the place of its own."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from iio_kernels.acceleration import torch_private
from iio_kernels.acceleration.compiler import Compiler
from iio_kernels.acceleration.quiet import quiet_traces
from iio_kernels.acceleration.report import Reason
from iio_kernels.acceleration.tracing import CheckFailed, modes_as_before, our_rules


class Accelerated:
    """A module's forward with slot attention replaced, in the place of its own: `module.forward`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own = module.__dict__.get("forward")
        self.log: list[tuple[list[str], list[Reason]]] = []
        self._traced: Callable | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch_private.in_transform():
            own = self.own
            return type(self.module).forward(self.module, *args, **kwargs) if own is None else own(*args, **kwargs)
        if self._traced is None:
            self._traced = torch.compile(with_cache_of_its_own(self.plain), backend=Compiler(self.log))
        try:
            with our_rules(self._traced), quiet_traces(), modes_as_before():
                return self._traced(*args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, CheckFailed):
            pass
        # It cannot be traced, or an assertion fails: the module's own code says what is wrong, or runs.
        return self.plain(*args, **kwargs)

    @property
    def plain(self) -> Callable:
        """The module's own forward."""
        return type(self.module).forward.__get__(self.module) if self.own is None else self.own

    def __getattr__(self, name: str) -> Any:
        """What others look up in a method, its signature first of all."""
        if name in ("__wrapped__", "__code__", "__defaults__", "__kwdefaults__", "__name__", "__func__", "__self__"):
            return self.plain if name == "__wrapped__" else getattr(self.plain, name)
        raise AttributeError(name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_traced": None, "log": []}


def with_cache_of_its_own(forward: Any) -> Callable:
    """A method of a copy of its code, by which torch.compile counts traces: instances would share them, and floats in
    which they differ become symbols."""
    f = getattr(forward, "__func__", None)
    if not isinstance(f, types.FunctionType):
        return forward
    own = types.FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    own.__kwdefaults__ = f.__kwdefaults__
    if hasattr(f, "__wrapped__"):
        own.__wrapped__ = f.__wrapped__  # type: ignore[attr-defined]
    return types.MethodType(own, forward.__self__)
