"""The backends: which exist, whether each can serve here, and which one serves a call.

A backend is one entry in `BACKENDS`, and one file `<name>.py` in the folder of each operation that it has kernels for,
imported only when it is used. Backends never import each other.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from iio_kernels.runtime import build, triton_support
from iio_kernels.runtime.options import Present
from iio_kernels.runtime.torch_private import constant_when_compiled

#: The folder of the operations, and their names, which are those of its folders.
FOLDER = Path(__file__).parents[1] / "ops"
OPERATIONS = tuple(sorted(found.name for found in pkgutil.iter_modules([str(FOLDER)]) if found.ispkg))
_FILES = {op: {found.name for found in pkgutil.iter_modules([str(FOLDER / op)])} for op in OPERATIONS}


def with_file(backend: str) -> tuple[str, ...]:
    """The operations whose folders have a file `backend`.py."""
    return tuple(op for op in OPERATIONS if backend in _FILES[op])


@dataclass(frozen=True)
class Backend:
    """One way to compute the operations.

    `device_types` are the kinds of device it serves, None meaning all of them; `missing` returns None where the
    backend can serve on this machine and otherwise the reason why it cannot, in words for the user; `operations` are
    those it has kernels for.
    """

    device_types: tuple[str, ...] | None
    missing: Callable[[], str | None]
    operations: tuple[str, ...] = OPERATIONS

    def refuses(self, device: torch.device) -> str | None:
        """Why this backend cannot serve tensors on `device`; None where it can."""
        if self.device_types is not None and device.type not in self.device_types:
            return f"it serves {', '.join(self.device_types)} tensors, and these are on {device}"
        return self.missing()


#: In order of preference: "auto" takes the first that serves the tensors' device.
BACKENDS: dict[Present, Backend] = {
    "cpu": Backend(("cpu",), build.missing, with_file("cpu")),
    "triton": Backend(
        ("cuda", "cpu") if triton_support.INTERPRETED else ("cuda",), triton_support.missing, with_file("triton")
    ),
    "cuda": Backend(("cuda",), build.cuda_missing, with_file("cuda")),
    "reference": Backend(None, lambda: None, with_file("reference")),
}


def backends() -> dict[Present, str | None]:
    """The backends of this package: for each name None where it can be used here, otherwise why it cannot.

    >>> iio_kernels.backends()
    {'cpu': None, 'triton': None, 'cuda': 'there is no nvcc: install the CUDA toolkit, ...', 'reference': None}
    """
    return {name: backend.missing() for name, backend in BACKENDS.items()}


def choose(op: str, backend: str, device: torch.device) -> str:
    """The name of the backend that serves a call of `op`: `backend` itself, or by the device for "auto".

    A backend asked for by name never falls back to another: it raises with the reason.

    Raises:
        ValueError: there is no backend of that name, or it does not have this operation or serve this kind of device.
        RuntimeError: it serves this kind of device, but not on this machine.
    """
    candidates: dict[str, Backend]
    candidates = {name: candidate for name, candidate in BACKENDS.items() if op in candidate.operations}
    if backend == "auto":
        return next(
            name
            for name, candidate in candidates.items()
            # Triton's interpreter is for those who ask for it: the reference is a hundred times faster.
            if candidate.refuses(device) is None and (name, device.type) != ("triton", "cpu")
        )
    names = ", ".join(map(repr, ("auto", *candidates)))
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {names}, got {backend!r}")
    if backend not in candidates:
        raise ValueError(f"backend: {backend!r} has no kernels of this function: expected one of {names}")
    reason = candidates[backend].refuses(device)
    if reason is not None:
        kind = RuntimeError if reason == candidates[backend].missing() else ValueError
        raise kind(f"backend: {backend!r} cannot be used: {reason}")
    return backend


def implementation(op: str, backend: str) -> ModuleType:
    """The module that holds `backend`'s kernels of the operation `op`."""
    name = f"iio_kernels.ops.{op}.{backend}"
    _load(name)
    return sys.modules[name]


@constant_when_compiled
def _load(name: str) -> bool:
    """Import a module, out of sight of torch.compile, which cannot trace an import."""
    importlib.import_module(name)
    return True
