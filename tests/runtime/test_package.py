"""What is shipped: the wheel and the sdist hold the package, and the sources that it compiles."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_build import finish, start

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    """A copy of what is in the repository: building packages leaves folders behind."""
    copy = tmp_path_factory.mktemp("shipped") / "project"
    ignored = shutil.ignore_patterns(".git", "runs", "*.egg-info", "build", "dist", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def build_backend(project: Path, call: str, out: Path) -> Path:
    """Call setuptools' build backend as pip does."""
    program = f"import setuptools.build_meta as b; print(b.{call}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


def test_the_wheel_holds_the_package_and_its_sources_alone(shipped, tmp_path):
    wheel = build_backend(shipped, "build_wheel", tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"iio_kernels"}
    inside = {name for name in names if ".dist-info" not in name}
    assert {f"iio_kernels/csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= inside
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "iio_kernels").rglob("*.py")} <= inside
    assert "iio_kernels/py.typed" in inside  # without it type checkers take the package for untyped
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    program = "import iio_kernels, iio_kernels.runtime.build as b; print(b.sources())"
    process = start(tmp_path / "cache", "c++", program, PYTHONPATH=str(tmp_path / "installed"))
    assert finish(process)[0].strip() == str(tmp_path / "installed" / "iio_kernels" / "csrc")


def test_the_sdist_holds_what_the_wheel_is_made_of(shipped, tmp_path):
    sdist = build_backend(shipped, "build_sdist", tmp_path)
    with tarfile.open(sdist) as file:
        names = {name.split("/", 1)[-1] for name in file.getnames()}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "iio_kernels").rglob("*.py")} <= names
    assert "iio_kernels/py.typed" in names
