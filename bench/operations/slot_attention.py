"""Slot attention, and the same from inputs that keys and values are projected from."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.races import OURS, Inputs, OddCall, Race
from iio_kernels import slot_attention, slot_attention_from_inputs
from iio_kernels.testing.slot_attention import BENCHMARKS, Case

# The races


def einsums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a careful user writes: inputs in the last dimension, where a softmax over few slots is quicker."""
    A = (torch.einsum("bkd,bnd->bkn", q, k) * q.shape[-1] ** -0.5).softmax(1) + 1e-8
    return torch.einsum("bkn,bnd->bkd", A / A.sum(-1, keepdim=True), v)


def contenders(case: Case) -> dict[str, Callable[..., Tensor]]:
    eager = functools.partial(slot_attention, backend="reference", **case.options)
    return {
        "einsums": einsums,
        "eager": eager,
        "torch.compile": lambda *x: slot_attention(*x, backend="reference", **case.options),
        "ours": functools.partial(slot_attention, backend=OURS, **case.options),
    }


def make(case: Case, dtype: torch.dtype, device: str, seed: int, contender: str) -> Inputs:
    q, k, v = case.make(dtype, device, seed)[0]
    dU = torch.randn(*q.shape[:-1], case.Dv, device=device, dtype=dtype)
    return Inputs((q, k, v), (q, k, v), (dU,))


def contenders_from_inputs(case: Case) -> dict[str, Callable[..., Tensor]]:
    """Against projecting x to keys and values, then eager attention."""

    def eager(x, q, wk, wv):
        return slot_attention(q, x @ wk.mT, x @ wv.mT, backend="reference", **case.options)

    def ours(x, q, wk, wv):
        return slot_attention_from_inputs(x, q, wk, None, wv, None, **case.options, backend=OURS)

    return {"eager": eager, "torch.compile": eager, "ours": ours}


def make_from_inputs(case: Case, dtype: torch.dtype, device: str, seed: int, contender: str) -> Inputs:
    """Dv stands for the width of x."""
    (q, _, x), _ = case.make(dtype, device, seed)
    wk, wv = (torch.randn(case.Dk, case.Dv, device=device, dtype=dtype) for _ in range(2))
    return Inputs((x, q, wk, wv), (x, q, wk, wv), (torch.randn_like(q),))


def bytes_of_x(case: Case, dtype: torch.dtype) -> int:
    return math.prod(case.batch) * case.N * case.Dv * dtype.itemsize


def floor_from_inputs(case: Case, machine: dict[str, float], dtype: torch.dtype, backward: bool) -> float:
    """Seconds for reading x, twice and writing its gradient in all; or for the products with it."""
    operations = 2 * math.prod(case.batch) * case.N * case.K * case.Dv * (7 if backward else 2)
    traffic = bytes_of_x(case, dtype) * (3 if backward else 1)
    return max(traffic / machine["bytes_per_second"], operations / machine["operations_per_second"])


RACES = (
    Race(
        "slot_attention", BENCHMARKS, contenders, make,
        label=lambda case: f"B{case.batch[0]} N{case.N} K{case.K} D{case.Dk}",
    ),
    Race(
        "slot_attention_from_inputs",
        {size: BENCHMARKS[f"{size}, from inputs"] for size in ("cpu", "cuda", "toy")},
        contenders_from_inputs, make_from_inputs,
        label=lambda case: f"B{case.batch[0]} N{case.N} K{case.K} D{case.Dk} x{case.Dv}",
        floor=floor_from_inputs, nbytes=bytes_of_x,
    ),
)  # fmt: skip

# The calls


def inputs(case: Case, device: str) -> tuple[tuple[Tensor, ...], Tensor]:
    random = torch.Generator(device).manual_seed(0)
    shapes = (case.K, case.Dk), (case.N, case.Dk), (case.N, case.Dv), (case.K, case.Dv)
    q, k, v, dU = (torch.randn((*case.batch, *shape), generator=random, device=device) for shape in shapes)
    return (q, k, v), dU


def function(case: Case) -> Callable[..., Tensor]:
    return functools.partial(slot_attention, **case.options)


def odd_calls(backend: str, device: str) -> Iterator[OddCall]:
    for dtype, joint in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        case = Case("odd", batch=(2, 2), K=5, N=83, Dk=24, Dv=40, slots="some", inputs="some",
                    options={"joint_heads": joint})  # fmt: skip
        tensors, options = case.make(dtype, device)
        label = f"slot_attention, {dtype}, {backend}, joint heads: {joint}"
        yield OddCall(label, functools.partial(slot_attention, **options, backend=backend), tensors)


# The launch settings

DTYPES = (torch.float32, torch.bfloat16)


def launch_settings() -> dict[str, dict[str, Any]]:
    """One field of one pass's tile, halved or doubled."""
    from iio_kernels.ops.slot_attention import triton

    fields = ("BLOCK_N", "num_warps", "num_stages", "WIDTH")
    return {
        f"{way} {field} x{factor:g}": {"tile": functools.partial(_changed, triton.tile, way, field, factor)}
        for way, field, factor in itertools.product(("forward", "backward"), fields, (0.5, 2))
    }


def _changed(tile: Callable[..., Any], changed: str, field: str, factor: float, how: str, way: str, *sizes: int) -> Any:
    chosen = tile(how, way, *sizes)
    if way != changed:
        return chosen
    return chosen._replace(**{field: max(1, int(getattr(chosen, field) * factor))})
