"""Compiles csrc on first use, caches the result, and loads it: a library for CPUs, and one for NVIDIA GPUs.

`libraries` says what they are made of, `compilers` what makes them, `compilation` has ninja do it, and `library_cache`
where they lie and which of them may be loaded.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import warnings

import torch

from iio_kernels.runtime.build_errors import BuildError, NoCompiler, one_line
from iio_kernels.runtime.compilers import compiler_version, find_compiler, find_nvcc
from iio_kernels.runtime.libraries import CPU, CUDA, INSTRUCTION_SETS, Library, csrc
from iio_kernels.runtime.library_cache import PRIVATE, built, cache_folders
from iio_kernels.runtime.torch_private import constant_when_compiled

__all__ = [
    "CPU",
    "CUDA",
    "INSTRUCTION_SETS",
    "BuildError",
    "Library",
    "NoCompiler",
    "built",
    "cache_folders",
    "compiler_version",
    "csrc",
    "cuda_missing",
    "find_compiler",
    "find_nvcc",
    "instruction_set",
    "missing",
    "said_by",
]

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
