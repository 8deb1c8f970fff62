"""The spatial mixture: all that IODINE refines from."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.races import OURS, Inputs, OddCall, Race, case_dtype
from iio_kernels import spatial_mixture
from iio_kernels.testing.spatial_mixture import BENCHMARKS, Case, literal_spatial_mixture

# The races


def plain_mixture(image: Tensor, decoded: Tensor, sigma: float = 0.1) -> tuple[Tensor, ...]:
    """What a careful user writes of a mixture: over all slots at once, and all pairs of slots for leaving one out; the
    gradients that IODINE refines from by autograd."""
    log_m = decoded[:, :, -1].log_softmax(1)
    exponent = -0.5 * ((image.unsqueeze(1) - decoded[:, :, :-1]) / sigma).square().sum(2)
    log_p_k = exponent - image.shape[1] * math.log(sigma * math.sqrt(2 * math.pi))
    joint = log_m + log_p_k
    log_p = joint.logsumexp(1)
    (d_decoded,) = torch.autograd.grad(-log_p.sum(), decoded, retain_graph=True)
    with torch.no_grad():
        same = torch.eye(decoded.shape[1], dtype=torch.bool, device=decoded.device)[:, :, None, None]
        others = [x.unsqueeze(1).masked_fill(same, -math.inf).logsumexp(2) for x in (joint, log_m)]
    return log_p, log_m.exp(), log_p_k.softmax(1), others[0] - others[1], d_decoded


def contenders(case: Case) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """Literal goes slot by slot, as the published program does; torch.compile has the gradients written out."""
    return {
        "literal": literal_spatial_mixture,
        "eager": plain_mixture,
        "torch.compile": lambda *x: tuple(spatial_mixture(*x, backend="reference")),
        "ours": functools.partial(spatial_mixture, backend=OURS),
    }


def make(case: Case, dtype: torch.dtype, device: str, seed: int, contender: str) -> Inputs:
    """The gradient goes through what is differentiable; decoded is stored as decoders leave it."""
    (image, decoded), _ = case.make(dtype, device, seed)
    image, decoded = image.float(), decoded.requires_grad_()
    incoming = [torch.rand_like(x) for x in spatial_mixture(image, decoded, backend="reference")[:3]]
    return Inputs((image, decoded), (decoded,), incoming)


RACES = (
    Race(
        "spatial_mixture", BENCHMARKS, contenders, make,
        label=lambda case: f"B{case.B} K{case.K} {case.H}x{case.W}", dtypes=case_dtype,
    ),
)  # fmt: skip

# The calls


def planes(image: Tensor, decoded: Tensor, **options: Any) -> Tensor:
    """All of the results in one tensor."""
    x = spatial_mixture(image, decoded, **options)
    return torch.cat(
        (x.log_likelihood.unsqueeze(1), x.masks, x.posterior, x.leave_one_out, x.d_decoded.flatten(1, 2)), 1
    )


def inputs(case: Case, device: str) -> tuple[tuple[Tensor, ...], None]:
    return case.make(torch.float32, device)[0], None


def function(case: Case) -> Callable[..., Tensor]:
    return functools.partial(planes, **case.options)


def odd_calls(backend: str, device: str) -> Iterator[OddCall]:
    for channels_last in (False, True):
        tensors, _ = Case("odd", K=5, H=35, W=37, channels_last=channels_last).make(torch.float32, device)
        label = f"mixture, {backend}, channels last: {channels_last}"
        yield OddCall(label, functools.partial(planes, backend=backend), tensors)


# The launch settings

DTYPES = (torch.float32,)


def launch_settings() -> dict[str, dict[str, Any]]:
    several = {"NUMBERS": 256}, {"NUMBERS": 1024}, {"NUMBERS": 1024, "WARPS": 2}
    return {f"{settings}": settings for settings in several}
