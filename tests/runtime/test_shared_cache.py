"""Caches that several users share: nothing is loaded that another could have written, and nothing is compiled twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from iio_kernels.runtime import build
from iio_kernels.runtime.build import cache

ROOT = Path(__file__).parents[2]
USER, OTHER = 12345, 12346

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
needs_kernels = pytest.mark.skipif(build.missing() is not None, reason=f"no CPU kernels: {build.missing()}")

#: Takes requests line by line: a user, a umask, an environment, and whether to enter a user namespace with this user
#: alone, as root. As that user it loads the library for CPUs and the one for GPUs in a new process, and prints what
#: that wrote to stderr. What is imported, is imported by root.
SERVER = """
import ctypes, json, os, sys, tempfile, threading, warnings
import torch
import iio_kernels, iio_kernels.runtime.build as build

warnings.simplefilter("ignore", DeprecationWarning)
torch.version.cuda = "13.0"
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda device=None: (9, 0)
for line in sys.stdin:
    user, umask, environment, namespace = json.loads(line)
    read, write = os.pipe()
    if os.fork() == 0:
        os.dup2(write, 2)
        os.umask(umask)
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        if namespace:
            libc = ctypes.CDLL(None)
            libc.prctl(4, 1)  # PR_SET_DUMPABLE: the next file is one's own to write
            assert libc.unshare(0x10000000) == 0  # CLONE_NEWUSER
            with open("/proc/self/uid_map", "w") as file:
                file.write(f"0 {user} 1")
        os.environ.update(environment)
        tempfile.tempdir = None
        try:
            missing = [reason for reason in (build.missing(), build.cuda_missing()) if reason]
            missing or build.instruction_set()
            print("missing: " + "; ".join(missing) if missing else "both loaded", file=sys.stderr, flush=True)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as heard:
        print(json.dumps(heard.read()), flush=True)
    os.wait()
"""

#: A compiler, and an nvcc, of no delay: it notes the libraries that it links, which are copies of a real one.
COMPILER = """#!/bin/sh
[ "$1" = --version ] && echo "a compiler for tests, release 1" && exit
link=yes
for argument; do
  [ "$previous" = -o ] && out=$argument
  [ "$argument" = -c ] && link=
  previous=$argument
done
if [ -z "$link" ]; then : > "$out"; else echo "${0##*/}" >> "$CALLS"; cp LIBRARY "$out"; fi
"""


@pytest.fixture(scope="module")
def world() -> Iterator[SimpleNamespace]:
    """A folder that all users can read, with the package, compilers and the server."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "iio_kernels", folder / "site" / "iio_kernels", ignore=ignored)
    shutil.copytree(ROOT / "csrc", folder / "site" / "csrc", ignore=ignored)
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
    shutil.copy(build.built(build.CPU), folder / "cpu.so")
    source = folder / "cuda.cpp"
    source.write_text('extern "C" const char* iio_kernels_cuda_trouble() { return nullptr; }')
    subprocess.run([*build.find_compiler(), "-shared", "-fPIC", str(source), "-o", str(folder / "cuda.so")], check=True)
    (folder / "bin").mkdir()
    for name, library in (("c++", "cpu.so"), ("nvcc", "cuda.so")):
        (folder / library).chmod(0o777)  # what is linked, is so less the umask
        (folder / "bin" / name).write_text(COMPILER.replace("LIBRARY", str(folder / library)))
        (folder / "bin" / name).chmod(0o755)
    environment = os.environ | {"PYTHONPATH": str(folder / "site"), "TRITON_INTERPRET": "0"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen([sys.executable, "-c", SERVER], env=environment, text=True, cwd="/", **pipes)
    yield SimpleNamespace(folder=folder, server=server)
    server.communicate(timeout=60)
    shutil.rmtree(folder)


class Case:
    """A cache, homes of users and a folder for temporary files, all new."""

    def __init__(self, world: SimpleNamespace) -> None:
        self.world, self.folder = world, Path(tempfile.mkdtemp(dir=world.folder))
        self.folder.chmod(0o755)
        self.calls = self.new("calls", 0o777) / "calls"
        self.calls.touch()
        self.calls.chmod(0o666)
        self.cache, self.temporary = self.new("cache", 0o755), self.new("tmp", 0o1777)
        for user in (USER, OTHER):
            self.new(f"home{user}", 0o700, user)

    def new(self, name: str, mode: int, user: int = 0) -> Path:
        path = self.folder / name
        path.mkdir()
        path.chmod(mode)
        os.chown(path, user, user)
        return path

    def load(self, user: int, umask: int = 0o022, namespace: bool = False, **environment: str) -> list[str]:
        """What loading both libraries says, when they have been loaded."""
        environment = {
            "IIO_KERNELS_CACHE": str(self.cache), "XDG_CACHE_HOME": str(self.folder / f"home{user}"),
            "TMPDIR": str(self.temporary), "CALLS": str(self.calls), "CXX": str(self.world.folder / "bin" / "c++"),
            "CUDA_HOME": str(self.world.folder), "IIO_KERNELS_TRUST_CACHE": "", **environment,
        }  # fmt: skip
        print(json.dumps([user, umask, environment, namespace]), file=self.world.server.stdin, flush=True)
        *lines, last = json.loads(self.world.server.stdout.readline()).splitlines()
        assert last == "both loaded", (lines, last)
        return lines

    def compiled(self) -> list[str]:
        """What has been linked since the last call."""
        linked = self.calls.read_text().split()
        self.calls.write_text("")
        return linked


@pytest.fixture
def case(world) -> Case:
    return Case(world)


BOTH = ["c++", "nvcc"]
LIBRARIES = "cpu-*.so", "cuda-*.so"


@needs_kernels
def test_what_root_keeps_for_all_is_loaded_without_a_word(case):
    assert len(case.load(0)) == 2
    assert case.compiled() == BOTH
    assert case.load(USER) == case.load(OTHER) == []
    assert case.compiled() == []


@needs_kernels
def test_where_everyone_can_write_nothing_is_loaded_and_each_user_compiles_once(case):
    case.cache.chmod(0o777)
    (case.cache / "lock").touch()
    for user in (USER, OTHER):
        why, *compiling = case.load(user)
        assert f"nothing is loaded from {case.cache}: {case.cache} can be written by everyone" in why
        assert "IIO_KERNELS_TRUST_CACHE=1" in why
        assert len(compiling) == 2
        assert case.compiled() == BOTH
        assert case.load(user) == [why]
    assert case.compiled() == []
    assert {path.name for path in case.cache.iterdir()} == {"lock"}


@needs_kernels
def test_what_another_user_put_into_the_cache_is_not_loaded(case):
    """Even by root."""
    case.load(0)
    case.compiled()
    for pattern in LIBRARIES:
        (library,) = case.cache.glob(pattern)
        os.chown(library, OTHER, OTHER)
    assert f"belongs to user {OTHER}" in case.load(USER)[0]
    assert case.compiled() == BOTH
    assert f"belongs to user {OTHER}" in case.load(0)[0]
    assert case.compiled() == BOTH  # and replaces it
    assert case.load(0) == case.load(USER) == []


@needs_kernels
def test_a_library_that_its_group_can_write_is_not_loaded(case):
    case.load(0)
    case.compiled()
    for pattern in LIBRARIES:
        (library,) = case.cache.glob(pattern)
        library.chmod(0o775)
    assert "can be written by group 0" in case.load(USER)[0]
    assert case.compiled() == BOTH


@needs_kernels
def test_users_who_trust_each_other_compile_once(case):
    case.cache.chmod(0o777)
    (case.cache / "lock").touch()
    trust = {"IIO_KERNELS_TRUST_CACHE": "1"}
    assert len(case.load(USER, **trust)) == 2
    assert case.compiled() == BOTH
    assert case.load(USER, **trust) == case.load(OTHER, **trust) == []
    assert case.compiled() == []


@needs_kernels
@pytest.mark.parametrize("damage", [b"", b"\x7fELF"])
def test_what_is_damaged_in_a_cache_one_cannot_write_is_built_once_in_ones_own(case, damage):
    case.load(0)
    case.compiled()
    for pattern in LIBRARIES:
        (library,) = case.cache.glob(pattern)
        library.write_bytes(damage)
    compiling = case.load(USER)
    assert all(f"{case.cache} cannot be used (Permission denied)" in line for line in compiling)
    assert case.compiled() == BOTH
    assert case.load(USER) == []
    assert case.compiled() == []


@needs_kernels
def test_without_a_home_it_is_built_once_among_the_temporary_files(case):
    nowhere = {"IIO_KERNELS_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "~"}
    case.load(USER, **nowhere)
    assert case.compiled() == BOTH
    assert (case.temporary / f"iio_kernels-{USER}").is_dir()
    assert case.load(USER, **nowhere) == []
    assert case.compiled() == []


@needs_kernels
def test_a_folder_among_the_temporary_files_that_another_user_made_is_left_alone(case):
    nowhere = {"IIO_KERNELS_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "~"}
    (case.temporary / f"iio_kernels-{USER}").mkdir()
    os.chown(case.temporary / f"iio_kernels-{USER}", OTHER, OTHER)
    assert f"belongs to user {OTHER}" in case.load(USER, **nowhere)[0]
    assert case.compiled() == BOTH
    assert [path.name for path in case.temporary.rglob("*")] == [f"iio_kernels-{USER}"]


@needs_kernels
def test_what_is_built_under_a_umask_of_0_is_found_again(case):
    home = case.folder / f"home{USER}"
    case.load(USER, umask=0, IIO_KERNELS_CACHE=str(home / "new" / "cache"))
    assert case.compiled() == BOTH
    assert case.load(USER, umask=0, IIO_KERNELS_CACHE=str(home / "new" / "cache")) == []
    assert case.compiled() == []


def namespaces() -> bool:
    """Whether users may make user namespaces here."""
    try:
        return subprocess.run(["unshare", "-Ur", "true"], user=USER, capture_output=True).returncode == 0
    except OSError:
        return False


@needs_kernels
@pytest.mark.skipif(not namespaces(), reason="no user namespaces")
def test_in_a_user_namespace_without_root_it_is_built_once(case):
    """As in a container that needs no privileges. What root keeps cannot be told from what others do."""
    home = case.folder / f"home{USER}"
    case.load(USER, namespace=True, IIO_KERNELS_CACHE=str(home / "cache"))
    assert case.compiled() == BOTH
    assert case.load(USER, namespace=True, IIO_KERNELS_CACHE=str(home / "cache")) == []
    assert case.compiled() == []
    case.load(0)
    case.compiled()
    assert "belongs to user" in case.load(USER, namespace=True)[0]
    assert case.compiled() == BOTH


@needs_kernels
def test_a_pipe_in_place_of_the_lock_hangs_nobody(case):
    """As another user can make in a folder like /tmp."""
    lock = case.temporary / "lock"
    os.mkfifo(lock)
    lock.chmod(0o644)
    os.chown(lock, OTHER, OTHER)

    def it_hangs(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, it_hangs)
    signal.alarm(5)
    os.seteuid(USER)
    try:
        with cache.exclusive(lock) as alone:
            assert alone
    finally:
        os.seteuid(0)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path, monkeypatch):
    """Not even one that took the place of another user's lock after that could not be written."""
    (tmp_path / "file").touch()
    (tmp_path / "lock").symlink_to(tmp_path / "file")
    opened = os.open

    def cannot_write(path, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", cannot_write)
    with pytest.raises(OSError, match="symbolic links"), cache.exclusive(tmp_path / "lock"):
        pass
