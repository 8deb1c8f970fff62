"""Compiles csrc on first use, caches the result, and loads it: a library for CPUs, and one for NVIDIA GPUs.

A library is built in a folder of its own and renamed into the cache, so that a kill at any moment leaves either
nothing or all of it. Processes that start together wait for the first of them by a lock that the operating system
drops when its holder dies: it cannot go stale. The name in the cache is three hashes: of the sources, flags and torch's
version, of the compiler, and of the library itself. What does not match is not found; where there is no compiler, any
compiler's serves.

The folder of a build stays in the cache, for its user alone, under the hashes of all that its objects depend on but the
sources. The next build with these begins as its copy: while one works on csrc, only what has changed is compiled again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch

from iio_kernels.runtime.build.cache import cache_folders, cached, content_hash, exclusive, make_folder, trusted
from iio_kernels.runtime.build.compilers import compiler_version, compilers_hash, find_compiler, find_nvcc
from iio_kernels.runtime.build.libraries import CPU, CUDA, INSTRUCTION_SETS, Library, fingerprint, sources
from iio_kernels.runtime.build.messages import BuildError, NoCompiler, one_line, say
from iio_kernels.runtime.build.ninja import compile_library, find_ninja
from iio_kernels.runtime.compile import constant_when_compiled
from iio_kernels.runtime.trust import open_to_others

__all__ = [
    "CPU",
    "CUDA",
    "INSTRUCTION_SETS",
    "BuildError",
    "NoCompiler",
    "built",
    "cache_folders",
    "compiler_version",
    "cuda_missing",
    "find_compiler",
    "find_nvcc",
    "instruction_set",
    "missing",
    "said_by",
    "sources",
]

#: How the folder of a library begins that only its own process can use.
PRIVATE = "iio_kernels-once-"

#: The libraries that are loaded.
_loaded: dict[str, ctypes.CDLL] = {}


@constant_when_compiled
def missing() -> str | None:
    """None where the compiled CPU kernels are loaded, after building them if need be; otherwise why they are not."""
    error = _load(CPU)
    if error is not None:
        _warn(CPU, str(error))
    return None if error is None else str(error)


@constant_when_compiled
def cuda_missing() -> str | None:
    """The same of the CUDA kernels. No warning where there is no GPU or no nvcc, as on most machines: others serve."""
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if not _has_gpu():
        return "there is no GPU"
    error = _load(CUDA)
    if error is not None and not isinstance(error, NoCompiler):
        _warn(CUDA, str(error))
    return None if error is None else str(error)


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()


@functools.cache
def _load(library: Library) -> BuildError | None:
    path = None
    try:
        path = built(library)
        torch.ops.load_library(path)
        _loaded[library.name] = ctypes.CDLL(str(path))
    except BuildError as error:
        return error
    except OSError as error:
        reason = one_line(f"{error}: {error.__cause__ or ''}")
        return BuildError(f"the compiled kernels cannot be loaded: {reason}")
    finally:
        if path is not None and path.parent.name.startswith(PRIVATE):
            shutil.rmtree(path.parent, ignore_errors=True)  # what is loaded needs no file any more
    if library is CUDA and (trouble := said_by(CUDA, "iio_kernels_cuda_trouble")):
        return BuildError(f"the compiled kernels do not run: {trouble}")
    return None


@functools.cache
def _warn(library: Library, reason: str) -> None:
    warnings.warn(
        f"iio_kernels: the {library.kernels} are not available, and {library.instead}: {reason}. "
        f"`python -m iio_kernels` shows what was found",
        RuntimeWarning,
        stacklevel=2,
    )


def said_by(library: Library, function: str) -> str:
    """What a function of a loaded library returns."""
    call = getattr(_loaded[library.name], function)
    call.restype = ctypes.c_char_p
    return (call() or b"").decode()


def instruction_set() -> str | None:
    """Which of `INSTRUCTION_SETS` runs on this machine, as the library itself decides; None if it is not loaded."""
    return None if missing() else said_by(CPU, "iio_kernels_instruction_set")


def built(library: Library) -> Path:
    """The compiled library, built now if the cache does not have it."""
    files = library.files()
    folders, name = cache_folders(), f"{library.name}-{fingerprint(library, files)}"
    try:
        compilers = library.compilers()
        name += f"-{compilers_hash(compilers)}"
    except BuildError:
        for folder in folders:
            if path := cached(folder, name):
                return path
        raise
    refused: list[str] = []
    for folder in folders:
        if path := cached(folder, name):
            return path
        if trusted(folder) is None:
            continue
        try:
            make_folder(folder)
            with exclusive(folder / "lock") as alone:
                if alone:
                    for left in folder.glob("build-*"):  # by a process that was killed
                        shutil.rmtree(left, ignore_errors=True)
                if path := cached(folder, name):
                    return path
                for damaged in folder.glob(f"{name}-*.so"):
                    damaged.unlink()
                _build(library, compilers, files, folder, name, refused)
                if path := cached(folder, name):
                    return path
        except OSError as error:
            refused.append(f"{folder} cannot be used ({error.strerror or error})")
    try:
        with ExitStack() as on_failure:
            private = Path(os.path.realpath(tempfile.mkdtemp(prefix=PRIVATE)))
            on_failure.callback(shutil.rmtree, private, ignore_errors=True)
            if reason := open_to_others(private):
                raise BuildError(f"no folder to build them in is safe from other users: {reason}")
            path = _build(library, compilers, files, private, name, [*refused, "the next process compiles anew"])
            on_failure.pop_all()
            return path
    except OSError as error:
        raise BuildError(f"no folder to build them in: {error.strerror or error}") from None


def _build(
    library: Library, compilers: list[list[str]], files: dict[str, bytes], folder: Path, name: str, refused: list[str]
) -> Path:
    """Compile the files, into `folder`: the library's path. `refused` tells why not elsewhere."""
    ninja = find_ninja()
    build = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    used = " and ".join(" ".join(compiler) for compiler in compilers)
    reason = f": {'; '.join(refused)}. IIO_KERNELS_CACHE can name another folder" if refused else ""
    say(f"compiling the {library.kernels} with {used}, once, in {library.time}, to {folder}{reason}")
    before = folder / f"objects-{library.name}-{library.settings_hash()}-{compilers_hash(compilers)}"
    try:
        if trusted(before) is not None and os.access(before, os.R_OK | os.X_OK):
            shutil.copytree(before, build, dirs_exist_ok=True)  # with the files' times
        linked = compile_library(ninja, build, files, library.commands(*compilers))
        path = folder / f"{name}-{content_hash(linked)}.so"
        linked.chmod(linked.stat().st_mode & ~0o022)  # with a umask of 0 anyone could write it: it would not be loaded
        os.replace(linked, path)
        with contextlib.suppress(OSError):  # of another user, who is trusted, or made anew by another process
            if before.exists():
                shutil.rmtree(before)
            build.rename(before)
        return path
    finally:
        shutil.rmtree(build, ignore_errors=True)
