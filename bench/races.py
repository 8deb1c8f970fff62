"""What a race of an operation is: contenders that compute the same from the same inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["DEVICE", "OURS", "SIZES", "Inputs", "OddCall", "Race", "bound_by_passes", "case_dtype", "each_dtype"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: "toy" is for gpu.sh --dry-run: the kernels of a GPU, in Triton's interpreter.
SIZES = os.environ.get("IIO_KERNELS_BENCH_SIZES", DEVICE)
OURS = "triton" if SIZES == "toy" else "auto"

Call = Callable[..., Any]


class Inputs(NamedTuple):
    """What one call is made with.

    Attributes:
        arguments: of every contender.
        leaves: those of them, or in them, whose gradients are asked for.
        incoming: the gradients to the results, the first ones; None where the result is one number.
    """

    arguments: tuple[Any, ...]
    leaves: Sequence[Tensor]
    incoming: Sequence[Tensor] | None = None


class OddCall(NamedTuple):
    """A call of the result and the gradients to all inputs, and what it is called."""

    label: str
    function: Call
    inputs: tuple[Tensor, ...]


def each_dtype(case: Any) -> tuple[torch.dtype, ...]:
    """The types that a kernel for tensor cores is timed in; a CPU has no fast bfloat16."""
    return (torch.float32,) if SIZES == "cpu" else (torch.float32, torch.bfloat16)


def case_dtype(case: Any) -> tuple[torch.dtype, ...]:
    return (case.dtype,)


def bound_by_passes(case: Any, machine: dict[str, float], dtype: torch.dtype, backward: bool) -> float:
    """Seconds for the least traffic at a copy's speed, or the operations at a matrix product's: two passes."""
    bytes_moved = case.bytes_moved(dtype, backward) + (case.bytes_moved(dtype) if backward else 0)
    operations = case.flops() + case.flops(backward=True) if backward else case.flops()
    rate = machine.get(f"{str(dtype).removeprefix('torch.')}_operations_per_second", machine["operations_per_second"])
    return max(bytes_moved / machine["bytes_per_second"], operations / rate)


@dataclass(frozen=True)
class Race:
    """Contenders that compute one function, forward alone and with its gradients.

    Attributes:
        function: what is computed.
        benchmarks: the cases by kind of size, "cpu", "cuda" and "toy".
        contenders: by name, what computes the function of a case; "torch.compile" has what is to be compiled.
        make: inputs of (case, dtype, device, seed, contender).
        label: a case's sizes.
        dtypes: in which a case is timed.
        floor: seconds that any contender takes of (case, machine, dtype, backward).
        nbytes: how many bytes inputs of (case, dtype) have, for a cache to forget them.
        practical: whether a contender gets through a case.
    """

    function: str
    benchmarks: Mapping[str, Sequence[Any]]
    contenders: Callable[[Any], dict[str, Call]]
    make: Callable[[Any, torch.dtype, str, int, str], Inputs]
    label: Callable[[Any], str]
    dtypes: Callable[[Any], tuple[torch.dtype, ...]] = each_dtype
    floor: Callable[[Any, dict[str, float], torch.dtype, bool], float] = bound_by_passes
    nbytes: Callable[[Any, torch.dtype], int] = lambda case, dtype: case.bytes_moved(dtype)
    practical: Callable[[Any, str], bool] = lambda case, contender: True

    def group(self, case: Any, dtype: torch.dtype, backward: bool) -> str:
        """What the contenders' results stand under."""
        kind = "" if dtype == torch.float32 else f" {str(dtype).removeprefix('torch.')}"
        return f"{self.function}, {case.name}, {self.label(case)}{kind}, {direction(backward)}"


def direction(backward: bool) -> str:
    return "forward+backward" if backward else "forward"
