"""Compiling by ninja: what changed, and that alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from building import PROGRAM, finish, start

from iio_kernels.runtime import build, compilation, library_cache
from iio_kernels.runtime.build_errors import LinkError
from iio_kernels.runtime.libraries import LINKED, Edge


@pytest.fixture
def sources(tmp_path) -> list[Path]:
    """Two files, of which one includes a header."""
    folder = tmp_path / "of the user"  # a space is nothing to stumble over
    folder.mkdir()
    (folder / "number.h").write_text("#define NUMBER 1\n")
    (folder / "one.cpp").write_text('#include "number.h"\nint one() { return NUMBER; }\n')
    (folder / "two.cpp").write_text("int two() { return 2; }\n")
    return sorted(folder.iterdir())


def edges(compiler: list[str]) -> list[Edge]:
    own = [
        Edge(
            f"{name}.o", (f"csrc/{name}.cpp",),
            (*compiler, "-fPIC", "-MMD", "-MF", f"{name}.o.d", "-c", f"csrc/{name}.cpp", "-o", f"{name}.o"),
        )
        for name in ("one", "two")
    ]  # fmt: skip
    return [*own, Edge(LINKED, ("one.o", "two.o"), (*compiler, "-shared", "one.o", "two.o", "-o", LINKED))]


def made(folder: Path, sources: list[Path]) -> set[str]:
    """Make all in a folder: which files were made."""
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.[os]*")}
    compilation.make(folder, sources, edges(build.find_compiler()))
    return {name for name in ("one.o", "two.o", LINKED) if before.get(name) != (folder / name).stat().st_mtime_ns}


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")


@needs_compiler
def test_what_changed_is_compiled_again_and_nothing_else(tmp_path, sources):
    header, _, two = sources
    folder = tmp_path / "build of it"
    folder.mkdir()
    assert made(folder, sources) == {"one.o", "two.o", LINKED}
    assert made(folder, sources) == set()
    for path in sources:
        path.touch()  # newer, and the same
    assert made(folder, sources) == set()
    two.write_text("int two() { return 3; }\n")
    assert made(folder, sources) == {"two.o", LINKED}
    header.write_text("#define NUMBER 2\n")
    assert made(folder, sources) == {"one.o", LINKED}
    folder.rename(tmp_path / "elsewhere")  # as the cache does
    assert made(tmp_path / "elsewhere", sources) == set()


@needs_compiler
def test_an_error_is_told_in_a_line_and_mended_without_the_rest(tmp_path, sources):
    _, one, _ = sources
    folder = tmp_path / "build"
    folder.mkdir()
    one.write_text("int one() { return NUMBER; }\n")
    with pytest.raises(build.BuildError, match=r"failed: csrc/one.cpp:1:.*error: .*NUMBER"):
        compilation.make(folder, sources, edges(build.find_compiler()))
    one.write_text("int one() { return 1; }\n")
    assert "one.o" in made(folder, sources)


def test_without_ninja_the_reference_serves(tmp_path):
    out, errors = finish(start(tmp_path / "cache", "c++", "import sys; sys.modules['ninja'] = None\n" + PROGRAM))
    assert "serves: ['reference']" in out
    assert "the package ninja, which compiles them, is not installed: `pip install ninja`" in errors


def test_kept_objects_that_do_not_link_are_made_anew(tmp_path, monkeypatch):
    """Once: where nothing was kept, the failure is told."""
    held = []

    def make(folder, sources, edges):
        held.append([path.name for path in folder.iterdir()])
        if held[-1] or "always" in sources:
            raise LinkError("it does not link")
        (folder / LINKED).write_text("a library")

    library = SimpleNamespace(name="cpu", kernels="kernels", time="no time", sources=list, edges=lambda *_: [])
    monkeypatch.setattr(compilation, "make", make)
    objects = library_cache._objects(tmp_path, "cpu-1-2")
    objects.mkdir()
    (objects / "damaged.o").touch()
    assert library_cache._build(library, [["c++"]], tmp_path, "cpu-1-2", []).read_text() == "a library"
    assert held == [["damaged.o"], []]
    library.sources = lambda: ["always"]
    shutil.rmtree(objects)
    with pytest.raises(LinkError):
        library_cache._build(library, [["c++"]], tmp_path, "cpu-1-2", [])
    assert held[2:] == [[]]
