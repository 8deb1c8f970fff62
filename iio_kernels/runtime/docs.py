"""Docstrings of functions that say some things in the same words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def documented(shared: dict[str, str]) -> Callable[[F], F]:
    """Decorate a function whose docstring has {names} in place of what `shared` holds."""

    def decorate(function: F) -> F:
        if function.__doc__ is not None:  # as it is under python -OO
            for name, text in shared.items():
                function.__doc__ = function.__doc__.replace("{" + name + "}", text)
        return function

    return decorate
