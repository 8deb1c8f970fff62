"""Processes that build the kernels, and a compiler for them that takes no time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from iio_kernels.runtime import build

ROOT = Path(__file__).parents[2]
needs_kernels = pytest.mark.skipif(build.missing() is not None, reason=f"no CPU kernels: {build.missing()}")

#: What every process runs: it uses the kernels, and says which backend served.
PROGRAM = """
import torch, iio_kernels
q, k = torch.rand(1, 2, 4), torch.rand(1, 5, 4)
U = iio_kernels.slot_attention(q, k, k)
torch.testing.assert_close(U, iio_kernels.slot_attention(q, k, k, backend="reference"))
print("serves:", [name for name, reason in iio_kernels.backends().items() if reason is None])
"""


def behave(compiler: Path, behaviour: str) -> None:
    (compiler.parent / "behaviour").write_text(behaviour)


def calls(compiler: Path) -> list[str]:
    return (compiler.parent / "calls").read_text().split() if (compiler.parent / "calls").exists() else []


def start(cache: Path | str, compiler: Path | str, program: str = PROGRAM, **environment: str) -> subprocess.Popen:
    environment = {"IIO_KERNELS_CACHE": str(cache), "CXX": str(compiler), "PYTHONPATH": str(ROOT), **environment}
    environment = {"XDG_CACHE_HOME": f"{cache}-of-the-user", "TRITON_INTERPRET": "0", **environment}
    command = [sys.executable, "-c", program]
    # In the root folder: Python looks for modules where it is started.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=os.environ | environment, text=True, cwd="/", **pipes)


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return out, errors
