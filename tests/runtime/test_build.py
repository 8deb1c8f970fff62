"""Compiling csrc on first use: whatever happens, a program that works or one clear line, and never a hang."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from building import PROGRAM, ROOT, behave, calls, finish, needs_kernels, start

from iio_kernels.runtime import build, library_cache


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


@pytest.mark.long
@needs_kernels
def test_four_processes_at_once_build_it_once(tmp_path, compiler):
    processes = [start(tmp_path / "cache", compiler) for _ in range(4)]
    assert all("serves: ['cpu', 'reference']" in finish(process)[0] for process in processes)
    assert calls(compiler).count("link") == 1
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()) == ["cpu", "lock", "objects"]


@pytest.mark.long
@needs_kernels
def test_a_process_that_waits_for_another_says_so(tmp_path, compiler):
    (tmp_path / "cache").mkdir()
    with library_cache.exclusive(tmp_path / "cache" / "lock"):
        waiting = start(tmp_path / "cache", compiler)
        assert f"another process compiles to {tmp_path / 'cache'}; waiting for it" in waiting.stderr.readline()
    assert "serves: ['cpu', 'reference']" in finish(waiting)[0]


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
@needs_kernels
@pytest.mark.parametrize("cache", ["", "~/cache"])
def test_no_home(tmp_path, compiler, cache):
    """As in a container that runs under a bare user id."""
    program = "import os; os.path.expanduser = lambda path: path\n" + PROGRAM
    out, _ = finish(start(cache, compiler, program, XDG_CACHE_HOME="", TMPDIR=str(tmp_path)))
    assert "serves: ['cpu', 'reference']" in out
    assert not Path("~").exists()
    assert list(tmp_path.glob("iio_kernels-*/*.so"))


@pytest.mark.long
@needs_kernels
@pytest.mark.parametrize("variable", ["IIO_KERNELS_CACHE", "XDG_CACHE_HOME"])
def test_a_cache_below_home(tmp_path, compiler, variable):
    """Where no shell has put the home in place of "~"."""
    out, _ = finish(start("", compiler, **{variable: "~/here", "HOME": str(tmp_path)}))
    assert "serves: ['cpu', 'reference']" in out
    assert list((tmp_path / "here").rglob("*.so"))


@pytest.mark.long
@needs_kernels
def test_a_stderr_that_is_closed(tmp_path, compiler):
    """Nothing is said then, not on stdout either."""
    program = "import os, sys; os.close(2); sys.stderr = None\n" + PROGRAM
    out, errors = finish(start(tmp_path / "cache", compiler, program))
    assert out == "serves: ['cpu', 'reference']\n"
    assert errors == ""


@pytest.mark.long
@needs_kernels
def test_a_file_system_without_locks(tmp_path, compiler):
    """Processes then build beside each other, and leave each other's builds alone."""
    no_locks = "import fcntl\ndef flock(*_): raise OSError(38, 'no locks')\nfcntl.flock = flock\n"
    (tmp_path / "cache" / "build-of-another-process").mkdir(parents=True)
    processes = [start(tmp_path / "cache", compiler, no_locks + PROGRAM) for _ in range(3)]
    assert all("serves: ['cpu', 'reference']" in finish(process)[0] for process in processes)
    assert (tmp_path / "cache" / "build-of-another-process").exists()


@pytest.mark.long
@needs_kernels
def test_a_compiler_with_arguments(tmp_path, compiler):
    out, _ = finish(start(tmp_path / "cache", f"env SOME=thing {compiler}"))
    assert "serves: ['cpu', 'reference']" in out


@pytest.mark.long
@needs_kernels
def test_a_compiler_of_blanks_is_none_that_is_asked_for(tmp_path, compiler):
    out, errors = finish(start(tmp_path / "cache", " ", PATH=str(compiler.parent)))
    assert "serves: ['cpu', 'reference']" in out
    assert f"with {compiler}" in errors


@pytest.mark.long
@needs_kernels
def test_a_compiler_below_home(tmp_path, compiler):
    out, _ = finish(start(tmp_path / "cache", "~/c++", HOME=str(tmp_path)))
    assert "serves: ['cpu', 'reference']" in out


@pytest.mark.long
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


@pytest.mark.long
@needs_kernels
def test_a_damaged_file_in_the_cache_is_built_again(tmp_path, compiler):
    finish(start(tmp_path / "cache", compiler))
    (library,) = (tmp_path / "cache").glob("*.so")
    library.write_bytes(library.read_bytes()[:100])
    out, _ = finish(start(tmp_path / "cache", compiler))
    assert "serves: ['cpu', 'reference']" in out


@pytest.mark.long
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
    library = tmp_path / f"{library_cache.PRIVATE}1" / "cpu-1.so"
    library.parent.mkdir()
    library.write_text("not a library")
    monkeypatch.setattr(build, "built", lambda _: library)
    assert "the compiled kernels cannot be loaded" in str(build._load.__wrapped__(build.CPU))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_a_compiler_that_never_ends(tmp_path, compiler):
    behave(compiler, "hang")
    program = "import iio_kernels.runtime.compilation as c; c.TIMEOUT = 1.0\n" + PROGRAM
    out, errors = finish(start(tmp_path / "cache", compiler, program))
    assert "serves: ['reference']" in out
    assert "did not end within 1 s" in errors


@pytest.mark.long
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


@pytest.mark.long
def test_no_compiler_anywhere(tmp_path):
    (tmp_path / "empty").mkdir()
    out, errors = finish(start(tmp_path / "cache", "", PATH=str(tmp_path / "empty")))
    assert "serves: ['reference']" in out
    assert "there is no C++ compiler: install one with" in errors


@pytest.mark.long
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


@pytest.mark.long
def test_the_report_names_backends_compiler_cache_and_instruction_set(tmp_path):
    program = "import iio_kernels.__main__ as m; print(m.report())"
    out, _ = finish(start(tmp_path / "cache", "/no/such/c++", program))
    assert "CXX names" in out
    assert str(tmp_path / "cache") in out
    if build.missing() is None:
        out = subprocess.run([sys.executable, "-m", "iio_kernels"], cwd=ROOT, capture_output=True, text=True).stdout
        assert build.find_compiler()[0] in out
        assert "instruction set" in out
