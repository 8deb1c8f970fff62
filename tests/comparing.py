"""How tests compare what operations return, and what they say of bad arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


def comparison(names: tuple[str, ...], relative: float) -> Callable[..., None]:
    """assert_all_close(got, expected, relative) of results that are called so, each relative to its largest value or
    1."""

    def assert_all_close(got, expected, relative: float = relative) -> None:
        for name, x, y in zip(names, got, expected, strict=True):
            scale = max(y.abs().max().item(), 1) if y.numel() else 1
            torch.testing.assert_close(
                x, y, rtol=0, atol=relative * scale, msg=lambda text, name=name: f"{name}: {text}"
            )

    return assert_all_close


def assert_refused(
    function: Callable[..., object], arguments: dict[str, object], error: type[Exception], words: list[str]
) -> None:
    """The call raises this very error, whose message begins with the first word, an argument, and has all in order."""
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) is error
    message = str(caught.value)
    assert message.startswith(f"{words[0]}: expected")
    at = 0
    for word in words:
        assert word in message[at:], f"{word!r} is not in {message[at:]!r}"
        at = message.index(word, at) + len(word)
