"""What the Triton kernels share, and whether Triton can run them here.

It can on a GPU, or in its interpreter on a CPU (TRITON_INTERPRET=1, for tests). Where there is no Triton this file can
be imported none the less.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iio_kernels.runtime.torch_private import constant_when_compiled

#: Kernels then run as Python on tensors of any device. Triton reads it when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@constant_when_compiled
def missing() -> str | None:
    """None where Triton's kernels can run, otherwise why they cannot."""
    return _missing()


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return (
            "there is no GPU, or this PyTorch was built without support for it (to try it on a CPU, slowly, set "
            "TRITON_INTERPRET=1 before Python starts)"
        )
    capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    if torch.version.hip is None and min(capabilities) < (8, 0):
        return "it needs GPUs of compute capability 8.0 or more"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler: install gcc, or name one in CC"
    return None


def inlined(function: Callable[..., Any]) -> Any:
    """Decorate what kernels call: the interpreter takes a millisecond to enter a jitted function."""
    if INTERPRETED:
        return function
    import triton

    return triton.jit(function)


def index_type(*tensors: Tensor) -> Any:
    """The type of offsets: 32 bits, or 64 where an element of a tensor lies 2^31 or more from its first."""
    import triton.language as tl

    extents = (
        sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        for x in tensors
    )
    return tl.int64 if max(extents) >= 2**31 else tl.int32
