"""torch.compile keeps to itself what it thinks of the code that it traces: its users did not ask for a compiler."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from iio_kernels.acceleration import torch_private


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, and none of torch's log lines at level WARNING; of more that somebody asked for, all."""
    loggers = [
        logger
        for name, logger in list(logging.root.manager.loggerDict.items())
        if name.partition(".")[0] == "torch" and isinstance(logger, logging.Logger) and logger.level == logging.WARNING
    ]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger in loggers:
            logger.setLevel(logging.WARNING)


class _Call(threading.local):
    """Whether this thread is in a call of ours, and what ends the silence of the trace that it is in."""

    ours = False
    trace: ExitStack | None = None


_call = _Call()


@contextmanager
def quiet_traces() -> Iterator[None]:
    """Whatever is traced within is traced quietly; what runs there is heard."""
    handler = torch_private.trace_callbacks()
    if _starts not in handler.start_callbacks:  # torch._dynamo.reset() removes it
        handler.register_start_callback(_starts)
        handler.register_end_callback(_ends)
    before, _call.ours = _call.ours, True
    try:
        yield
    finally:
        _call.ours = before
        if not before:
            _ends()  # where another thread's trace ended last


def _starts(_: Any) -> None:
    if _call.ours and _call.trace is None:
        _call.trace = ExitStack()
        _call.trace.enter_context(quiet())


def _ends(_: Any = None) -> None:
    if _call.trace is not None:
        _call.trace.close()
        _call.trace = None
