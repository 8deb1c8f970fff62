"""What torch.compile is told of functions that it cannot trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant_when_compiled(function: F) -> F:
    """Decorate a function whose result is a constant of the program: torch.compile calls it, out of its sight.

    `torch.compiler.assume_constant_result` says so by the same attribute, but imports the whole of torch.compile, and
    Triton with it, which takes seconds.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010, a type checker knows no such attribute
    return function
