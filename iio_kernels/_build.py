"""Compiles csrc on first use, caches the result, and loads it.

The library is built in a folder of its own and renamed into the cache, so that a kill at any moment leaves either
nothing or all of it. Processes that start together wait for the first of them by a lock that the operating system
drops when its holder dies: it cannot go stale. The name in the cache is a hash of the sources, the compiler, its flags
and torch's version; what does not match is simply not found.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

#: Flags for each instruction set that the kernels are compiled for; which one runs is decided at run time.
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [*avx2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS |= {"avx2": avx2, "avx512": avx512}

#: Not -ffast-math: a NaN has to travel, and an empty mask's sum is compared with 0.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
         "-ffp-contract=fast", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # fmt: skip

#: Compilation takes seconds; a compiler that has not ended by then never will.
TIMEOUT = 300.0


class BuildError(Exception):
    """The kernels cannot be built or loaded here, for a reason told in one line."""


@torch.compiler.assume_constant_result
def missing() -> str | None:
    """None where the compiled CPU kernels are loaded, after building them if need be; otherwise why they are not."""
    reason = _load()
    if reason is not None:
        _warn(reason)
    return reason


@functools.cache
def _load() -> str | None:
    try:
        path = library()
        try:
            torch.ops.load_library(path)
        except OSError:
            # Someone damaged the cached file: once more from the sources.
            path.unlink()
            torch.ops.load_library(library())
    except BuildError as error:
        return str(error)
    except OSError as error:
        return f"the compiled kernels cannot be loaded: {one_line(str(error))}"
    return None


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"iio_kernels: the CPU kernels are not available, and plain PyTorch serves instead, several times slower: "
        f"{reason}. `python -m iio_kernels` shows what was found",
        RuntimeWarning,
        stacklevel=2,
    )


def instruction_set() -> str | None:
    """Which of `INSTRUCTION_SETS` runs on this machine, as the library itself decides; None if it is not loaded."""
    if missing() is not None:
        return None
    chosen = ctypes.CDLL(str(library())).iio_kernels_instruction_set
    chosen.restype = ctypes.c_char_p
    return chosen().decode()


def library() -> Path:
    """The compiled library, built now if it is not in the cache."""
    compiler = find_compiler()
    name = f"cpu-{fingerprint(compiler)}.so"
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / "lock"):
            if not (folder / name).exists():
                _build(compiler, folder, name)
        return folder / name
    except OSError as error:
        if (folder / name).exists():
            return folder / name
        # Nothing can be written there. A folder of this process alone serves, though the next one compiles again.
        private = Path(tempfile.mkdtemp(prefix="iio_kernels-"))
        print(f"iio_kernels: {folder} cannot be used ({error.strerror or error}): set IIO_KERNELS_CACHE to a folder "
              f"that can, or the kernels are compiled anew in every process", file=sys.stderr)  # fmt: skip
        try:
            _build(compiler, private, name)
            return private / name
        except OSError as second:
            shutil.rmtree(private, ignore_errors=True)
            raise BuildError(f"no folder to build them in: {second.strerror or second}") from None


def cache_folder() -> Path:
    """$IIO_KERNELS_CACHE, or iio_kernels in the user's cache folder."""
    if folder := os.environ.get("IIO_KERNELS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iio_kernels"


def sources() -> Path:
    """The folder csrc: inside the package where it is installed, beside it in the repository."""
    here = Path(__file__).parent
    for folder in (here / "csrc", here.parent / "csrc"):
        if (folder / "simd.h").exists():
            return folder
    raise BuildError(f"the sources are not there: {here / 'csrc'} does not exist")


def find_compiler() -> str:
    """The C++ compiler's path: $CXX, or the first of c++, g++ and clang++."""
    if os.name == "nt":
        raise BuildError("they are built on Linux and macOS only")
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return path
    if asked:
        raise BuildError(f"CXX names {asked!r}, which is not a program that can be run")
    how = "`xcode-select --install`" if sys.platform == "darwin" else "`apt install g++` or your system's like of it"
    raise BuildError(f"there is no C++ compiler: install one with {how}, or name it in CXX")


def compiler_version(compiler: str) -> str:
    """The first line of what the compiler says of itself."""
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler {compiler} does not run: {one_line(str(error))}") from None
    if done.returncode != 0:
        raise BuildError(f"the compiler {compiler} does not run: {one_line(done.stderr)}")
    return (done.stdout.splitlines() or [""])[0]


def fingerprint(compiler: str) -> str:
    """A hash of all that the library depends on."""
    parts = [compiler, compiler_version(compiler), torch.__version__, platform.machine(), sys.platform]
    parts += [repr(INSTRUCTION_SETS), *FLAGS]
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=10)
    for path in sorted(sources().iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(repr((path.name, path.read_bytes())).encode())
    return digest.hexdigest()


def commands(compiler: str, build: Path, flags: list[str] = FLAGS) -> tuple[list[list[str]], list[str]]:
    """The commands that compile each file, and the one that links them to `build`/library.so.

    A kernel file is compiled for each instruction set, the bindings to torch once.
    """
    torch_folder = Path(torch.__file__).parent
    compile_all, objects = [], []
    for source in sorted(sources().glob("*.cpp")):
        if source.stem.endswith("_bindings"):
            targets = {"": ["-isystem", str(torch_folder / "include")]}
        else:
            targets = {name: [f"-DIIO_ISA={name}", *flags_] for name, flags_ in INSTRUCTION_SETS.items()}
        for name, more in targets.items():
            objects.append(str(build / f"{source.stem}-{name}.o"))
            compile_all.append([compiler, *flags, *more, "-c", str(source), "-o", objects[-1]])
    libraries = ["-L" + str(torch_folder / "lib"), "-ltorch", "-ltorch_cpu", "-lc10"]
    shared = ["-dynamiclib", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    return compile_all, [compiler, *flags, *shared, *objects, *libraries, "-o", str(build / "library.so")]


def _build(compiler: str, folder: Path, name: str) -> None:
    """Compile into `folder`/`name`."""
    for left in folder.glob("build-*"):  # by a process that was killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    build = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    print(f"iio_kernels: compiling the CPU kernels with {compiler}, once, in a few seconds, to {folder}",
          file=sys.stderr, flush=True)  # fmt: skip
    try:
        compile_all, link = commands(compiler, build)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_call, compile_all))
        _call(link)
        os.replace(build / "library.so", folder / name)
    finally:
        shutil.rmtree(build, ignore_errors=True)


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise BuildError(f"the compiler {command[0]} did not end within {TIMEOUT:.0f} s") from None
    if done.returncode != 0:
        if "No space left on device" in done.stderr:
            raise OSError(28, "No space left on device")
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise BuildError(f"the compiler {command[0]} failed: {one_line(errors[0]) if errors else 'it says nothing'}")


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock on a file. Where files cannot be locked, or its holder never ends, go on without it."""
    import fcntl

    with path.open("w") as file:
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        yield


def one_line(text: str) -> str:
    return " ".join(text.split())[:300]
