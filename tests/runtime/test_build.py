"""Compiling csrc on first use: whatever happens, a program that works or one clear line, and never a hang."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from iio_kernels.runtime import build
from iio_kernels.runtime.build import cache, libraries
from iio_kernels.runtime.build.ninja import compile_library, find_ninja

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
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out, errors


@needs_kernels
def test_it_is_built_once_with_one_line_and_then_found(tmp_path, compiler):
    out, errors = finish(start(tmp_path / "cache", compiler))
    assert "serves: ['cpu', 'reference']" in out
    assert len(errors.splitlines()) == 1
    assert "compiling the CPU kernels" in errors
    once = calls(compiler)
    assert once.count("link") == 1
    out, errors = finish(start(tmp_path / "cache", compiler))
    assert "serves: ['cpu', 'reference']" in out
    assert errors == ""
    assert calls(compiler) == once


@needs_kernels
def test_four_processes_at_once_build_it_once(tmp_path, compiler):
    processes = [start(tmp_path / "cache", compiler) for _ in range(4)]
    assert all("serves: ['cpu', 'reference']" in finish(process)[0] for process in processes)
    assert calls(compiler).count("link") == 1
    left = {path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()}
    assert left == {"lock", "cpu", "objects"}  # no folder that a build was made in
    assert len(list((tmp_path / "cache").glob("*.so"))) == 1


@needs_kernels
def test_a_process_that_waits_for_another_says_so(tmp_path, compiler):
    (tmp_path / "cache").mkdir()
    with cache.exclusive(tmp_path / "cache" / "lock"):
        waiting = start(tmp_path / "cache", compiler)
        assert f"another process compiles to {tmp_path / 'cache'}; waiting for it" in waiting.stderr.readline()
    assert "serves: ['cpu', 'reference']" in finish(waiting)[0]


@needs_kernels
def test_kill_9_in_mid_build_leaves_nothing_in_the_way(tmp_path, compiler):
    behave(compiler, "hang")
    killed = start(tmp_path / "cache", compiler)
    end = time.monotonic() + 60
    while not calls(compiler) and time.monotonic() < end:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    subprocess.run(["pkill", "-9", "-f", str(compiler)], check=False)
    behave(compiler, "work")
    out, _ = finish(start(tmp_path / "cache", compiler))
    assert "serves: ['cpu', 'reference']" in out
    assert not list((tmp_path / "cache").glob("build-*"))


@needs_kernels
def test_a_cache_that_cannot_be_written(tmp_path, compiler):
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    program = PROGRAM + "print(iio_kernels.runtime.build.instruction_set())"
    cache, temporary = tmp_path / "file" / "cache", tmp_path / "tmp"
    own = temporary / f"iio_kernels-{os.geteuid()}"
    out, errors = finish(start(cache, compiler, program, TMPDIR=str(temporary)))
    assert "serves: ['cpu', 'reference']" in out
    assert len(errors.splitlines()) == 1
    assert f"to {own}: {cache} cannot be used (" in errors
    assert "IIO_KERNELS_CACHE can name another folder" in errors
    once = calls(compiler)
    out, errors = finish(start(cache, compiler, program, TMPDIR=str(temporary)))
    assert errors == ""
    assert calls(compiler) == once
    # Not even there: a folder of this process alone, which leaves nothing.
    shutil.rmtree(own)
    own.touch()
    out, errors = finish(start(cache, compiler, program, TMPDIR=str(temporary)))
    assert "serves: ['cpu', 'reference']" in out
    assert "the next process compiles anew" in errors
    assert list(temporary.iterdir()) == [own]


@needs_kernels
@pytest.mark.parametrize("cache", ["", "~/cache"])
def test_no_home(tmp_path, compiler, cache):
    """As in a container that runs under a bare user id."""
    program = "import os; os.path.expanduser = lambda path: path\n" + PROGRAM
    out, _ = finish(start(cache, compiler, program, XDG_CACHE_HOME="", TMPDIR=str(tmp_path)))
    assert "serves: ['cpu', 'reference']" in out
    assert not Path("~").exists()
    assert list(tmp_path.glob("iio_kernels-*/*.so"))


@needs_kernels
@pytest.mark.parametrize("variable", ["IIO_KERNELS_CACHE", "XDG_CACHE_HOME"])
def test_a_cache_below_home(tmp_path, compiler, variable):
    """Where no shell has put the home in place of "~"."""
    out, _ = finish(start("", compiler, **{variable: "~/here", "HOME": str(tmp_path)}))
    assert "serves: ['cpu', 'reference']" in out
    assert list((tmp_path / "here").rglob("*.so"))


@needs_kernels
def test_a_stderr_that_is_closed(tmp_path, compiler):
    """Nothing is said then, not on stdout either."""
    program = "import os, sys; os.close(2); sys.stderr = None\n" + PROGRAM
    out, errors = finish(start(tmp_path / "cache", compiler, program))
    assert out == "serves: ['cpu', 'reference']\n"
    assert errors == ""


@needs_kernels
def test_a_file_system_without_locks(tmp_path, compiler):
    """Processes then build beside each other, and leave each other's builds alone."""
    no_locks = "import fcntl\ndef flock(*_): raise OSError(38, 'no locks')\nfcntl.flock = flock\n"
    (tmp_path / "cache" / "build-of-another-process").mkdir(parents=True)
    processes = [start(tmp_path / "cache", compiler, no_locks + PROGRAM) for _ in range(3)]
    assert all("serves: ['cpu', 'reference']" in finish(process)[0] for process in processes)
    assert (tmp_path / "cache" / "build-of-another-process").exists()


@needs_kernels
def test_a_compiler_with_arguments(tmp_path, compiler):
    out, _ = finish(start(tmp_path / "cache", f"env SOME=thing {compiler}"))
    assert "serves: ['cpu', 'reference']" in out


@needs_kernels
def test_a_compiler_of_blanks_is_none_that_is_asked_for(tmp_path, compiler):
    out, errors = finish(start(tmp_path / "cache", " ", PATH=str(compiler.parent)))
    assert "serves: ['cpu', 'reference']" in out
    assert f"with {compiler}" in errors


@needs_kernels
def test_a_compiler_below_home(tmp_path, compiler):
    out, _ = finish(start(tmp_path / "cache", "~/c++", HOME=str(tmp_path)))
    assert "serves: ['cpu', 'reference']" in out


@needs_kernels
def test_a_library_that_is_there_needs_no_compiler(tmp_path, compiler):
    """Built in one image of a container, say, and used in another."""
    finish(start(tmp_path / "cache", compiler))
    out, errors = finish(start(tmp_path / "cache", "/no/such/c++"))
    assert "serves: ['cpu', 'reference']" in out
    assert errors == ""


@needs_kernels
@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_cache_that_is_read_only(tmp_path, compiler):
    (tmp_path / "cache").mkdir(mode=0o555)
    out, errors = finish(start(tmp_path / "cache", compiler, TMPDIR=str(tmp_path)))
    assert "serves: ['cpu', 'reference']" in out
    assert "IIO_KERNELS_CACHE" in errors


@needs_kernels
def test_a_damaged_file_in_the_cache_is_built_again(tmp_path, compiler):
    finish(start(tmp_path / "cache", compiler))
    (library,) = (tmp_path / "cache").glob("*.so")
    library.write_bytes(library.read_bytes()[:100])
    out, _ = finish(start(tmp_path / "cache", compiler))
    assert "serves: ['cpu', 'reference']" in out


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ("fail", "this machine has no vectors"),
        ("foreign", "caf\N{REPLACEMENT CHARACTER}.h:1: error: this machine has no vectors"),
        ("full", "No space left on device"),
        ("rubbish", "the compiled kernels cannot be loaded"),
    ],
)
def test_a_build_that_fails_is_told_once_and_the_reference_serves(tmp_path, compiler, behaviour, says):
    behave(compiler, behaviour)
    out, errors = finish(start(tmp_path / "cache", compiler, TMPDIR=str(tmp_path)))
    assert "serves: ['reference']" in out
    assert errors.count("RuntimeWarning") == 1
    assert says in errors
    assert not list(tmp_path.glob("*/*.so")) or behaviour == "rubbish"


def test_what_is_built_for_this_process_alone_and_does_not_load_is_removed(tmp_path, monkeypatch):
    library = tmp_path / f"{build.PRIVATE}1" / "cpu-1.so"
    library.parent.mkdir()
    library.write_text("not a library")
    monkeypatch.setattr(build, "built", lambda _: library)
    assert "the compiled kernels cannot be loaded" in str(build._load.__wrapped__(build.CPU))
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_never_ends(tmp_path, compiler):
    behave(compiler, "hang")
    program = "import iio_kernels.runtime.build.ninja as n; n.TIMEOUT = 1.0\n" + PROGRAM
    out, errors = finish(start(tmp_path / "cache", compiler, program))
    assert "serves: ['reference']" in out
    assert "did not end within 1 s" in errors


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/no/such/c++", "not a program that can be run"),
        ("no-such-compiler", "not a program that can be run"),
        ('g++ "-O2', "which is not a command: No closing quotation"),
    ],
)
def test_no_compiler(tmp_path, name, says):
    out, errors = finish(start(tmp_path / "cache", name))
    assert "serves: ['reference']" in out
    assert errors.count("RuntimeWarning") == 1
    assert says in errors


def test_no_compiler_anywhere(tmp_path):
    (tmp_path / "empty").mkdir()
    out, errors = finish(start(tmp_path / "cache", "", PATH=str(tmp_path / "empty")))
    assert "serves: ['reference']" in out
    assert "there is no C++ compiler: install one with" in errors


def test_a_backend_asked_for_by_name_says_why_it_is_missing(tmp_path):
    program = """
import torch, iio_kernels
q, k = torch.rand(1, 2, 4), torch.rand(1, 5, 4)
try:
    iio_kernels.slot_attention(q, k, k, backend="cpu")
except RuntimeError as error:
    print(error)
"""
    out, _ = finish(start(tmp_path / "cache", "/no/such/c++", program))
    assert out.startswith("backend: 'cpu' cannot be used: CXX names '/no/such/c++'")


def test_the_report_names_backends_compiler_cache_and_instruction_set(tmp_path):
    program = "import iio_kernels.__main__ as m; print(m.report())"
    out, _ = finish(start(tmp_path / "cache", "/no/such/c++", program))
    assert "CXX names" in out
    assert str(tmp_path / "cache") in out
    if build.missing() is None:
        out = subprocess.run([sys.executable, "-m", "iio_kernels"], cwd=ROOT, capture_output=True, text=True).stdout
        assert build.find_compiler()[0] in out
        assert "instruction set" in out


def test_no_ninja(tmp_path, compiler):
    program = "import sys; sys.modules['ninja'] = None\n" + PROGRAM
    out, errors = finish(start(tmp_path / "cache", compiler, program, PATH=str(tmp_path)))
    assert "serves: ['reference']" in out
    assert errors.count("RuntimeWarning") == 1
    assert "there is no ninja, which compiles them: install it with `pip install ninja`" in errors


def test_only_what_changed_is_compiled_again(tmp_path, compiler):
    """Told by contents: times of files deceive where another version of the sources takes their place."""
    commands = libraries.Commands(
        {f"{x}.o": [str(compiler), "-c", f"csrc/{x}.cpp", "-o", f"{x}.o"] for x in "ab"},
        [str(compiler), "a.o", "b.o", "-o", "library.so"],
    )
    files, took = {"a.cpp": b"1", "b.cpp": b"2"}, []
    (tmp_path / "build").mkdir()
    for change in ({}, {}, {"a.cpp": b"3"}, {"a.cpp": b"1"}, {"c.h": b""}):
        before = len(calls(compiler))
        compile_library(find_ninja(), tmp_path / "build", files := files | change, commands)
        took.append(calls(compiler)[before:])
    assert took == [["compile", "compile", "link"], [], ["compile", "link"], ["compile", "link"], []]
