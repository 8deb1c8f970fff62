"""What tests and benchmarks of an operation share, a file for each operation: iio_kernels/testing/<operation>.py.

Such a file has

- `CASES`: named calls, small ones, the first of them with no option set (`Case` below);
- `BENCHMARKS`: for "cpu", "cuda" and "toy" (the kernels of a GPU, interpreted) the cases that are measured;
- `allowed_error(truth, eager)`: how far a result may lie from the truth, given what plain PyTorch gets;
- `FUNCTION`, where its cases are calls of another public function than that of the folder's name;
- `LAUNCHES`, where it has Triton kernels: named calls on the meta device, to be compiled for GPUs that are not here
  (`aot.py`).

That is all that tests/ops/test_every_operation.py needs of an operation, and benchmarks find it by the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor

import iio_kernels


class Case(Protocol):
    """A named call of a public function."""

    @property
    def name(self) -> str: ...

    def make(
        self, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments in their order and the keyword arguments, the same numbers on every device."""

    def bytes_moved(self, dtype: torch.dtype, backward: bool = False) -> int:
        """The least traffic of a call, or with `backward` of the backward pass."""

    def flops(self, backward: bool = False) -> int:
        """The operations that a call takes, or with `backward` the backward pass."""


class Samples(Protocol):
    """What iio_kernels/testing/<operation>.py has."""

    CASES: Sequence[Case]
    BENCHMARKS: Mapping[str, Sequence[Case]]

    def allowed_error(self, truth: Tensor, eager: Tensor) -> float:
        """How far a result may lie from the truth."""


def samples(operation: str) -> Samples:
    """The file of an operation."""
    return cast(Samples, import_module(f"iio_kernels.testing.{operation}"))


def function(operation: str) -> Callable[..., Any]:
    """The public function that an operation's cases are calls of."""
    return getattr(samples(operation), "FUNCTION", None) or getattr(iio_kernels, operation)


def launches(operation: str) -> dict[str, Callable[[], None]]:
    """The calls of an operation whose kernels are compiled for GPUs that are not here."""
    return getattr(samples(operation), "LAUNCHES", {})
