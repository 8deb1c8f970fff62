"""Why kernels cannot be built, and what is said of it."""

from __future__ import annotations

import contextlib
import functools
import sys


class BuildError(Exception):
    """The kernels cannot be built or loaded here, for a reason told in one line."""


class NoCompiler(BuildError):
    """There is nothing to build them with, or nothing to build them for."""


class LinkError(BuildError):
    """All files compile, and what comes of them does not go together."""


def say(text: str) -> None:
    """A line on stderr, if anyone hears it: it may be closed."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(f"iio_kernels: {text}\n")
        sys.stderr.flush()


say_once = functools.cache(say)


def one_line(text: str) -> str:
    return " ".join(text.split())[:300]
