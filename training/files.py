"""Files written whole or not at all, and their names for a shell."""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from pathlib import Path


def write(path: Path, content: bytes | memoryview | str) -> None:
    """Write a file whole or not at all: a reader, or a kill at any moment, never meets half of it.

    Raises:
        OSError: it cannot be written, as where the disk is full; what was there before still is, and nothing else.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        # A name in it may be no UTF-8.
        temporary.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def quoted(name: str) -> str:
    """A file's name for a shell, and for a terminal: what is no UTF-8 as the bytes' numbers."""
    try:
        name.encode()
    except UnicodeEncodeError:
        escaped = "".join(chr(b) if 32 <= b < 127 and chr(b) not in "\\'" else f"\\x{b:02x}" for b in os.fsencode(name))
        return f"$'{escaped}'"
    return shlex.quote(name)
