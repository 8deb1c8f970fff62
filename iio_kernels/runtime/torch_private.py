"""What this package takes of PyTorch that PyTorch does not promise to keep, and why it does (`acceleration` apart).

Each was tried on torch 2.11 and 2.13. What a later version lacks is missed here and nowhere else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch._compile import _disable_dynamo

F = TypeVar("F", bound=Callable[..., Any])

#: Decorate a function that torch.compile is to call as it is. `torch.compiler.disable` does the same, but imports the
#: whole of torch.compile, and Triton with it, with the file that it stands in: that takes seconds.
disable_compile: Any = _disable_dynamo


def constant_when_compiled(function: F) -> F:
    """Decorate a function whose result is a constant of the program: torch.compile calls it, out of its sight.

    `torch.compiler.assume_constant_result` says so by the same attribute, but imports the whole of torch.compile, too.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010, a type checker knows no such attribute
    return function


def register_with_compile(name: str, backend: Callable[[], Callable[..., Any]]) -> None:
    """Register a backend of torch.compile where that has looked for all of them already; it never looks again."""
    registry = sys.modules.get("torch._dynamo.backends.registry")
    if registry is not None and name not in registry._BACKENDS:
        registry.register_backend(backend(), name=name)
