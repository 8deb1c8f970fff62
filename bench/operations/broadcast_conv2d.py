"""A decoder's first layer with its ReLU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.races import OURS, Inputs, OddCall, Race, case_dtype
from iio_kernels import broadcast_conv2d
from iio_kernels.testing.broadcast_conv2d import BENCHMARKS, CASES, Case

# The races


def contenders(case: Case) -> dict[str, Callable[..., Tensor]]:
    """Eager convolves slots plus positions, as decoders do; the others split."""
    convolve = F.conv_transpose2d if case.transposed else F.conv2d
    more = (case.output_padding,) if case.transposed else ()

    def plain(z, weight, position, bias):
        grid = (z[:, :, None, None] + position).contiguous(memory_format=torch.channels_last)
        return F.relu(convolve(grid, weight, bias, case.stride, case.padding, *more))

    def split(z, weight, position, bias, backend):
        position_map = convolve(position[None], weight, bias, case.stride, case.padding, *more)[0]
        return broadcast_conv2d(z, weight, position_map, **case.options, backend=backend)

    return {
        "eager": plain,
        "split": functools.partial(split, backend="reference"),
        "torch.compile": plain,
        "ours": functools.partial(split, backend=OURS),
    }


def make(case: Case, dtype: torch.dtype, device: str, seed: int, contender: str) -> Inputs:
    (z, weight, position_map), _ = case.make(dtype, device, seed)
    position = torch.randn(*case.size, case.D, device=device, dtype=dtype).permute(2, 0, 1)
    tensors = z, weight, position, position_map[:, 0, 0].clone()
    d_out = torch.randn(*case.batch, *case.result, device=device, dtype=dtype)
    return Inputs(tensors, tensors, (d_out.contiguous(memory_format=torch.channels_last),))


RACES = (
    Race(
        "broadcast_conv2d", BENCHMARKS, contenders, make,
        label=lambda case: f"{case.batch[0]} slots D{case.D} to {case.O} x {case.result[1]}x{case.result[2]}",
        dtypes=case_dtype,
    ),
)  # fmt: skip

# The calls


def inputs(case: Case, device: str) -> tuple[tuple[Tensor, ...], Tensor]:
    tensors, _ = case.make(torch.float32, device)
    random = torch.Generator(device).manual_seed(0)
    return tensors, torch.randn((*case.batch, *case.result), generator=random, device=device)


def function(case: Case) -> Callable[..., Tensor]:
    return functools.partial(broadcast_conv2d, **case.options)


def odd_calls(backend: str, device: str) -> Iterator[OddCall]:
    for case in CASES[::6]:  # some of each kind
        tensors, options = case.make(torch.float32, device)
        label = f"broadcast, {backend}, {case.name}"
        yield OddCall(label, functools.partial(broadcast_conv2d, **options, backend=backend), tensors)


# The launch settings

DTYPES = (torch.float32,)


def launch_settings() -> dict[str, dict[str, Any]]:
    several = {"NUMBERS": 1024}, {"NUMBERS": 4096}, {"WARPS": 2}, {"WARPS": 8}, {"GROUP": 4}, {"GROUP": 16}
    return {f"{settings}": settings for settings in several}
