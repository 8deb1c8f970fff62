"""Runs the edges of a library with ninja, which compiles what changed since the last time in the same folder.

What counts as changed is the content: sources are copied where theirs differs, whatever their times say.
"""

from __future__ import annotations

import errno
import io
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from iio_kernels.runtime.build_errors import BuildError, LinkError, one_line
from iio_kernels.runtime.libraries import Edge

#: Compilation takes seconds, of CUDA code about a minute; a compiler that has not ended by then never will.
TIMEOUT = 600.0


def make(folder: Path, sources: Iterable[Path], edges: Sequence[Edge]) -> str:
    """Make what the edges make in a folder, and return what compilers say.

    Raises:
        BuildError: there is no ninja, or a compiler failed or did not end.
        OSError: the folder cannot be written, as where the disk is full.
    """
    try:
        import ninja
    except ImportError:
        raise BuildError("the package ninja, which compiles them, is not installed: `pip install ninja`") from None
    copy_changed(sources, folder / "csrc")
    (folder / "build.ninja").write_text(ninja_file(edges))
    return _run([os.path.join(ninja.BIN_DIR, "ninja"), "--quiet"], folder, edges)


def copy_changed(sources: Iterable[Path], folder: Path) -> None:
    """Have a folder hold these files and no others, and write those alone that differ."""
    folder.mkdir(exist_ok=True)
    contents = {path.name: path.read_bytes() for path in sources}
    for path in folder.iterdir():
        if path.name not in contents:
            path.unlink()
    for name, content in contents.items():
        copy = folder / name
        if not copy.exists() or copy.read_bytes() != content:
            copy.write_bytes(content)


def ninja_file(edges: Sequence[Edge]) -> str:
    """A build.ninja of the edges: a rule each, for each has a command of its own."""
    from ninja import ninja_syntax

    text: Any = io.StringIO()  # ninja's own types ask for a str, to which none could write
    writer = ninja_syntax.Writer(text, width=sys.maxsize)  # where a line is wrapped, spaces in names would be lost
    for number, edge in enumerate(edges):
        depfile, deps = (f"{edge.output}.d", "gcc") if edge.compiles else (None, None)
        command = ninja_syntax.escape(" ".join(map(shlex.quote, edge.command)))
        writer.rule(f"edge{number}", command, depfile=depfile, deps=deps)
        writer.build([edge.output], f"edge{number}", list(edge.inputs))
    return text.getvalue()


def _run(command: list[str], folder: Path, edges: Sequence[Edge]) -> str:
    try:
        # In a session of their own, ninja and the compilers can be ended together.
        ninja = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",  # a compiler may quote any file
            start_new_session=True,
        )
    except OSError as error:
        raise BuildError(f"ninja does not run: {one_line(str(error))}") from None
    try:
        said, _ = ninja.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        _end(ninja)
        raise BuildError(f"the compiler {edges[0].command[0]} did not end within {TIMEOUT:.0f} s") from None
    except BaseException:  # Ctrl-C
        _end(ninja)
        raise
    if ninja.returncode != 0:
        raise _failure(said, edges)
    return said


def _end(ninja: subprocess.Popen[str]) -> None:
    os.killpg(ninja.pid, signal.SIGKILL)
    ninja.wait()


def _failure(said: str, edges: Sequence[Edge]) -> Exception:
    """What went wrong, from what ninja says: "FAILED: [code=1] <file>", the command, what this said, and so on."""
    if "No space left on device" in said:
        return OSError(errno.ENOSPC, "No space left on device")
    lines = said.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("FAILED: ")), None)
    if start is None:
        return BuildError(f"ninja failed: {one_line(said)}")
    failed = next((edge for edge in edges if edge.output in lines[start].split()), edges[0])
    own = [line for line in lines[start + 2 :] if not line.startswith("ninja: ")]
    errors = [line for line in own if "error" in line.lower()] or own
    kind = BuildError if failed.compiles else LinkError
    return kind(f"the compiler {failed.command[0]} failed: {one_line(errors[0]) if errors else 'it says nothing'}")
