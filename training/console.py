"""What is printed: on process number 0, and whatever becomes of the output."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

from training.processes import rank


def open_standard_streams() -> None:
    """Let output and errors take all that is printed: what the shell closed leads nowhere, what an encoding has not is
    escaped."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # or the next file to be opened would be number 2, and get what libraries say of errors
    os.close(handle)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def say(words: str, file: TextIO | None = None) -> None:
    """Print on process number 0. The work goes on where that fails, as where a reader like `head` has left."""
    if rank() > 0:
        return
    stream = file or sys.stdout
    try:
        print(words, file=stream, flush=True)
    except OSError as error:
        # What is printed from now on leads nowhere, and so does what the stream still holds.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        if stream is sys.stdout:
            warn(f"nothing more can be printed ({error.strerror}); the work goes on")


def warn(words: str) -> None:
    say(f"train.py: warning: {words}", file=sys.stderr)
