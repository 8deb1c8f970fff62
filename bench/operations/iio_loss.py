"""The IIO loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import iio_kernels
from bench.races import DEVICE, OURS, Inputs, OddCall, Race
from iio_kernels import iio_loss
from iio_kernels.testing.iio_loss import BENCHMARKS, Case, literal_iio_loss

# The races


def contenders(case: Case) -> dict[str, Callable[..., Tensor]]:
    def eager(image, masks):
        return iio_loss(image, masks, backend="reference", **case.options)

    found = {
        "literal": lambda image, masks: literal_iio_loss(image, masks).mean(),
        "eager": eager,
        "torch.compile": eager,
        "ours": functools.partial(iio_loss, **case.options, backend=OURS),
    }
    if DEVICE == "cuda":
        found["ours, cuda"] = functools.partial(iio_loss, **case.options, backend="cuda")
    return found


def practical(case: Case, contender: str) -> bool:
    """All subsets of many masks are too many to visit for all but ours."""
    return contender.startswith("ours") or case.K <= 7 or (contender != "literal" and "subsets" in case.options)


def make(case: Case, dtype: torch.dtype, device: str, seed: int, contender: str) -> Inputs:
    random = torch.Generator(device).manual_seed(seed)
    image = torch.rand(case.B, case.C, case.H, case.W, generator=random, device=device)
    masks = torch.randn(case.B, case.K, case.H, case.W, generator=random, device=device).softmax(1)
    return Inputs((image, masks), (masks,))


def floor(case: Case, machine: dict[str, float], dtype: torch.dtype, backward: bool) -> float:
    """One pass serves loss and gradient."""
    return max(
        case.bytes_moved(torch.float32, backward) / machine["bytes_per_second"],
        case.flops(backward) / machine["operations_per_second"],
    )


RACES = (
    Race(
        "iio_loss", BENCHMARKS, contenders, make,
        label=lambda case: f"B{case.B} K{case.K} {case.H}x{case.W}",
        dtypes=lambda case: (torch.float32,), floor=floor, practical=practical,
    ),
)  # fmt: skip

# The calls


def inputs(case: Case, device: str) -> tuple[tuple[Tensor, ...], None]:
    random = torch.Generator(device).manual_seed(0)
    image = torch.randn(case.B, case.C, case.H, case.W, generator=random, device=device).sigmoid()
    return (image, torch.randn(case.B, case.K, case.H, case.W, generator=random, device=device).softmax(1)), None


def function(case: Case) -> Callable[..., Tensor]:
    return functools.partial(iio_loss, reduction="none", **case.options)


def odd_calls(backend: str, device: str) -> Iterator[OddCall]:
    for K, H, W in ((3, 37, 41), (9, 12, 13)):
        tensors, options = Case("odd", B=2, K=K, H=H, W=W).make(torch.float32, device)
        for name in ("iio_loss", "conditional_entropies", "inpaint"):
            call = functools.partial(getattr(iio_kernels, name), **options, backend=backend)
            yield OddCall(f"{name}, K{K}, {backend}", call, tensors)


# The launch settings

DTYPES = (torch.float32,)


def launch_settings() -> dict[str, dict[str, Any]]:
    several = {"LINES": (32, 512)}, {"LINES": (128, 512)}, {"SETS": (256, 256)}
    return {f"{settings}": settings for settings in several}
