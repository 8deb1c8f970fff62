"""Ctrl-C and SIGTERM wait for the end of a step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from training.processes import any_rank, num_ranks


class Interrupted(Exception):
    """Ctrl-C or SIGTERM came, and the run's state is saved."""

    def __init__(self, signum: int) -> None:
        self.exit_code = 128 + signum


@contextmanager
def deferred_signals() -> Iterator[Callable[[], int | None]]:
    """Ctrl-C and SIGTERM wait for the end of the step, where the state is whole; a second one does not wait.

    But torchrun passes on what its processes get from the terminal, too; it kills what does not stop.
    """
    received: list[int] = []

    def remember(signum: int, frame: Any) -> None:
        if received and num_ranks() == 1:
            raise KeyboardInterrupt
        received.append(signum)

    previous = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def stop_if_asked(signalled: Callable[[], int | None]) -> None:
    """Stop between steps, where all is saved, if any process was signalled: all of them together."""
    if interrupt := any_rank(signalled() or 0):
        raise Interrupted(interrupt)
