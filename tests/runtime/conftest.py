"""A compiler for tests."""

from __future__ import annotations

import stat
import sys
import textwrap
from pathlib import Path

import pytest
from building import behave

from iio_kernels.runtime import build


@pytest.fixture
def compiler(tmp_path) -> Path:
    """A compiler of no delay: it notes its calls in `calls`, does what `behaviour` says, and links the real library."""
    path = tmp_path / "c++"
    path.write_text(
        textwrap.dedent(f"""\
        #!{sys.executable}
        import os, pathlib, shutil, sys, time
        here = pathlib.Path({str(tmp_path)!r})
        if "--version" in sys.argv:
            sys.stdout.buffer.write(b"a compiler for t\\xe9sts\\n")
            sys.exit()
        behaviour = (here / "behaviour").read_text()
        with (here / "calls").open("a") as calls:
            calls.write("link\\n" if "-c" not in sys.argv else "compile\\n")
        if behaviour == "hang":
            time.sleep(600)
        if behaviour == "foreign":
            sys.stderr.buffer.write(b"caf\\xe9.h:1: error: this machine has no vectors\\n")
            sys.exit(1)
        if behaviour == "fail":
            sys.exit("simd.h:1: error: this machine has no vectors")
        if behaviour == "full":
            sys.exit("fatal error: error writing to x.o: No space left on device")
        out = sys.argv[sys.argv.index("-o") + 1]
        if "-c" in sys.argv:
            time.sleep(0.05)
            pathlib.Path(out).touch()
        elif behaviour == "rubbish":
            pathlib.Path(out).write_text("not a library")
        else:
            shutil.copy({str(build.built(build.CPU)) if build.missing() is None else ""!r}, out)
        """)
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    behave(path, "work")
    return path
