"""Whether Triton can run kernels here: on a GPU, or in its interpreter on a CPU (TRITON_INTERPRET=1, for tests)."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

#: Kernels then run as Python on tensors of any device. Triton reads it when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@torch.compiler.assume_constant_result
def missing() -> str | None:
    """None where Triton's kernels can run, otherwise why they cannot."""
    return _missing()


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "there is no GPU, or this PyTorch was built without support for it"
    return None
