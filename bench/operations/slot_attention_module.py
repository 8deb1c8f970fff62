"""The iterations of the Slot Attention module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.races import OURS, Inputs, OddCall, Race
from iio_kernels import SlotAttentionWeights, slot_attention_module
from iio_kernels.testing.slot_attention_module import BENCHMARKS, Case, literal_slot_attention_module

# The races


def contenders(case: Case) -> dict[str, Callable[..., Tensor]]:
    """Against the algorithm with keys and values, projected once for all iterations."""

    def eager(*given):
        return literal_slot_attention_module(*given)[0]

    return {"eager": eager, "torch.compile": eager, "ours": functools.partial(slot_attention_module, backend=OURS)}


def make(case: Case, dtype: torch.dtype, device: str, seed: int, contender: str) -> Inputs:
    (x, slots, weights, T), _ = case.make(dtype, device, seed)
    if contender != "ours":
        x = x.float()  # which torch's layers do not mix with others
    return Inputs((x, slots, weights, T), (x, slots, *weights), (torch.ones_like(slots),))


RACES = (
    Race(
        "slot_attention_module", BENCHMARKS, contenders, make,
        label=lambda case: f"B{case.B} N{case.N} K{case.K} D{case.D} x{case.Dx} T{case.T}",
    ),
)  # fmt: skip

# The calls


def flat(x: Tensor, slots: Tensor, *weights: Tensor, **options: Any) -> Tensor:
    """The module of its weights one by one."""
    return slot_attention_module(x, slots, SlotAttentionWeights(*weights), **options)


def inputs(case: Case, device: str) -> tuple[tuple[Tensor, ...], Tensor]:
    (x, slots, weights, _), _ = case.make(torch.float32, device)
    random = torch.Generator(device).manual_seed(0)
    return (x, slots, *weights), torch.randn(slots.shape, generator=random, device=device)


def function(case: Case) -> Callable[..., Tensor]:
    return functools.partial(flat, iterations=case.T, **case.options)


def odd_calls(backend: str, device: str) -> Iterator[OddCall]:
    for dtype in (torch.float32, torch.bfloat16):
        (x, slots, weights, T), _ = Case("odd", K=5, N=83, Dx=24, D=40).make(dtype, device)
        call = functools.partial(flat, iterations=T, backend=backend)
        yield OddCall(f"iterations, {dtype}, {backend}", call, (x, slots, *weights))


# The launch settings

DTYPES = (torch.float32,)


def launch_settings() -> dict[str, dict[str, Any]]:
    several = {"SMALL": (32, 8)}, {"SMALL": (64, 4)}, {"LARGE": (32, 8)}, {"LARGE": (16, 4)}
    return {f"{settings}": settings for settings in several}
