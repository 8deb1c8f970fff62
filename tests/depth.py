"""How much of the suite a run takes: the quick part, all of it, or what the quick part leaves.

Quick is, of every test, its first case on each backend, but for tests marked `long`. So every operation meets every
backend, and every module a test, in minutes.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iio_kernels.runtime import triton_support
from iio_kernels.runtime.backends import BACKENDS

ROOT = Path(__file__).parents[1]
#: Of which a test's case may name one.
TESTED = (*BACKENDS, "written_out")
#: These serve every test: a change of theirs touches all.
SHARED = ("tests/conftest.py", "tests/depth.py", "tests/serving.py", "pyproject.toml", ".ci/run")
#: What a change touches besides what is named like it.
ALSO = {
    "train": ("training",), "csrc": ("ops", "runtime"), "README": ("docs",), "CONTRIBUTING": ("docs", "contributing"),
    "CHANGELOG": ("docs",), "comparing": ("ops",), "plain": ("models",), "aot": ("triton",),
}  # fmt: skip
#: Whether the run takes the whole suite, which has time for more examples of each kind.
if "--deep" in sys.argv:
    os.environ["IIO_KERNELS_TESTS"] = "deep"  # pytest-xdist's processes do not see the command line
DEEP = os.environ.get("IIO_KERNELS_TESTS") == "deep"


def examples(number: int) -> int:
    """How many examples hypothesis draws of one test: a fifth where the run does not take the whole suite."""
    return number if DEEP else max(5, number // 5)


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("depth", "how much of the suite")
    group.addoption(
        "--deep", dest="depth", action="store_const", const="deep", default="quick", help="all tests, every case"
    )
    group.addoption(
        "--rest", dest="depth", action="store_const", const="rest", help="what a run without --deep leaves out"
    )
    group.addoption(
        "--until", type=float, default=float("inf"), metavar="SECONDS",
        help="start no test after this time, in seconds since 1970; what is left is skipped",
    )  # fmt: skip
    group.addoption("--since", metavar="COMMIT", help="what changed since this commit is tested first")


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the items of the run's depth; of the rest, those that a change touches come first."""
    mark(items)
    depth = config.option.depth
    if depth != "deep":
        quick = _quick(items)
        keep = [item for item in items if (item in quick) == (depth == "quick")]
        config.hook.pytest_deselected(items=[item for item in items if (item in quick) != (depth == "quick")])
        items[:] = keep
    if depth == "rest":
        touched, commit = _changed(config.option.since), _git("rev-parse", "HEAD")
        # Behind what is touched, another order at each commit: what one run has no time for, the next one takes.
        order = {
            path: (not _touches(path, touched), hashlib.sha256(f"{commit}{path}".encode()).digest())
            for path in {item.path for item in items}
        }
        items.sort(key=lambda item: order[item.path])


def stop_in_time(item: pytest.Item) -> None:
    """Skip an item that would start too late."""
    if time.time() > item.config.option.until:
        pytest.skip("the time for this part of the suite is over")


def _quick(items: list[pytest.Item]) -> set[pytest.Item]:
    """The first case of every test on each backend, without what is marked `long`."""
    first: dict[tuple[str, ...], pytest.Item] = {}
    for item in items:
        name, backends, long = item.nodeid.partition("[")[0], _backends(item), item.get_closest_marker("long")
        if long is None or (long.args and not set(long.args) & set(backends)):
            first.setdefault((name, *backends), item)
    return set(first.values())


def _backends(item: pytest.Item) -> list[str]:
    """The backends that a test's case names."""
    return [word for word in re.split(r"[-\[\]]", item.nodeid.partition("[")[2]) if word in TESTED]


def mark(items: list[pytest.Item]) -> None:
    """Mark items by what they do, to choose among them: `pytest -m "not interpreter"`."""
    for item in items:
        long = item.get_closest_marker("long")
        if long and long.args and not _backends(item):
            raise pytest.UsageError(f"{item.nodeid} is long on {', '.join(long.args)}, and its case names no backend")
        path, name = item.path.relative_to(ROOT).as_posix(), item.nodeid.partition("::")[2]
        if "triton" in _backends(item) and triton_support.INTERPRETED:
            item.add_marker("interpreter")
        if re.search("compile|fullgraph|inductor", name) or "acceleration" in path:
            item.add_marker("compile")
        if re.search("runtime/test_(build|compil|cuda|pack|sanit|shared)|test_triton.py|cuda_on_host", path):
            item.add_marker("build")
        if re.search("tests/training/|tests/contributing/|gpu_script", path):
            item.add_marker("training")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def _changed(since: str | None) -> set[str]:
    """Words of the paths that changed: the names of files and of the folders they are in."""
    paths = _git("diff", "--name-only", since).split() if since else []
    if set(paths) & set(SHARED):
        return {"tests"}
    words = {word for path in paths for word in (*Path(path).parts[:-1], _subject(Path(path)))}
    return (words | {other for word in words for other in ALSO.get(word, ())}) - {"tests", "iio_kernels"}


def _subject(path: Path) -> str:
    """What a file is about, by its name: csrc/compose_bindings.cpp is about compose."""
    return re.sub("_(cuda_)?(bindings|operators)$", "", path.stem.removeprefix("test_"))


def _touches(path: Path, changed: set[str]) -> bool:
    """Whether a test file is about what changed: of its path's words, one is a changed file's or its folder's."""
    parts = path.relative_to(ROOT).parts
    stem = path.stem.removeprefix("test_")
    return bool(changed & {*parts[:-1]}) or any(stem == word or stem.startswith(f"{word}_") for word in changed)
