"""Composition and its error."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.races import OURS, Inputs, OddCall, Race, case_dtype
from iio_kernels import composition_error
from iio_kernels.testing.compose import BENCHMARKS, Case

# The races


def contenders(case: Case) -> dict[str, Callable[..., Tensor]]:
    def eager(image, decoded):
        return composition_error(image, decoded, backend="reference")

    return {"eager": eager, "torch.compile": eager, "ours": functools.partial(composition_error, backend=OURS)}


def make(case: Case, dtype: torch.dtype, device: str, seed: int, contender: str) -> Inputs:
    """Decoded is stored as decoders leave it."""
    (image, decoded), _ = case.make(dtype, device, seed)
    return Inputs((image.float(), decoded), (decoded,))


RACES = (
    Race(
        "composition_error", BENCHMARKS, contenders, make,
        label=lambda case: f"B{case.B} K{case.K} {case.H}x{case.W}", dtypes=case_dtype,
    ),
)  # fmt: skip

# The calls


def inputs(case: Case, device: str) -> tuple[tuple[Tensor, ...], None]:
    random = torch.Generator(device).manual_seed(0)
    image = torch.randn(case.B, case.C, case.H, case.W, generator=random, device=device).sigmoid()
    decoded = torch.randn(case.B, case.K, case.H, case.W, case.C + 1, generator=random, device=device)
    decoded = decoded.permute(0, 1, 4, 2, 3)
    return (image, decoded if case.channels_last else decoded.contiguous()), None


def function(case: Case) -> Callable[..., Tensor]:
    return functools.partial(composition_error, reduction="none", **case.options)


def odd_calls(backend: str, device: str) -> Iterator[OddCall]:
    for channels_last in (False, True):
        tensors, _ = Case("odd", K=5, H=35, W=37, channels_last=channels_last).make(torch.float32, device)
        label = f"composition, {backend}, channels last: {channels_last}"
        yield OddCall(label, functools.partial(composition_error, backend=backend), tensors)


# The launch settings

DTYPES = (torch.float32,)


def launch_settings() -> dict[str, dict[str, Any]]:
    several = (
        {"NUMBERS": 1024}, {"NUMBERS": 4096}, {"WARPS": 2}, {"NUMBERS": 4096, "WARPS": 2},
        {"NUMBERS": 8192, "WARPS": 4},
    )  # fmt: skip
    return {f"{settings}": settings for settings in several}
