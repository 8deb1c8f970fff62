"""Docstrings of functions that say some things in the same words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def documented(shared: dict[str, str]) -> Callable[[Any], Any]:
    """Decorate a function whose docstring has {names} in place of what `shared` holds."""

    def decorate(function: Any) -> Any:
        if function.__doc__ is not None:  # as it is under python -OO
            for name, text in shared.items():
                function.__doc__ = function.__doc__.replace("{" + name + "}", text)
        return function

    return decorate
