"""An operation is added by one folder, one file of samples and the line that exports it; nothing else names it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FILES = {
    "ops/cube/__init__.py": """
from iio_kernels.ops.cube.api import cube

__all__ = ["cube"]
""",
    "ops/cube/api.py": """
import torch

from iio_kernels.ops.cube import reference
from iio_kernels.runtime import backends, checks
from iio_kernels.runtime.autograd import differentiable_once, signature_kept


def cube(x, *, backend="auto"):
    '''x (N) to the power of three.'''
    checks.tensor("x", x, "(N)")
    name = backends.choose("cube", backend, x.device)
    return reference.forward(x) if name == "reference" else CubeFunction.apply(x, name)


@signature_kept
class CubeFunction(torch.autograd.Function):
    @staticmethod
    def forward(x, backend):
        return backends.implementation("cube", backend).forward(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.backend = inputs
        ctx.save_for_backward(x)

    @staticmethod
    @differentiable_once
    def backward(ctx, d_out):
        return backends.implementation("cube", ctx.backend).backward(d_out, *ctx.saved_tensors), None
""",
    "ops/cube/reference.py": """
def forward(x):
    return x * x * x


def backward(d_out, x):
    return 3 * x * x * d_out
""",
    "testing/cube.py": """
from dataclasses import dataclass

import torch

from iio_kernels.runtime.numerics import twice_and_4_units as allowed_error


@dataclass(frozen=True)
class Case:
    name: str
    N: int = 5

    def make(self, dtype=torch.float64, device="cpu", seed=0):
        random = torch.Generator().manual_seed(seed)
        return (torch.randn(self.N, generator=random, dtype=torch.float64).to(dtype).to(device),), {}

    def bytes_moved(self, dtype, backward=False):
        return (3 if backward else 2) * self.N * dtype.itemsize

    def flops(self, backward=False):
        return (3 if backward else 2) * self.N


CASES = (Case("plain"),)
BENCHMARKS = {sizes: CASES for sizes in ("cpu", "cuda", "toy")}
""",
}
EXPORT = """
from iio_kernels.ops.cube import cube

__all__ += ["cube"]
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and its tests with one operation more."""
    copy = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("iio_kernels", "csrc", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    for name, text in FILES.items():
        path = copy / "iio_kernels" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    with (copy / "iio_kernels" / "__init__.py").open("a") as file:
        file.write(EXPORT)
    return copy


def test_it_is_tested_like_every_other(project):
    command = [sys.executable, "-m", "pytest", "-q", "--deep", "-p", "no:cacheprovider", "-k", "cube", "-rN"]
    environment = os.environ | {"PYTHONPATH": str(project)}
    done = subprocess.run(
        [*command, "tests/ops/test_every_operation.py"], cwd=project, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    passed = int(done.stdout.rpartition(" passed")[0].split()[-1])
    assert passed == 11  # five of the operation, and three on each of its two backends
