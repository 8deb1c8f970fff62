"""Which sizes the Slot Attention module takes in one launch on a GPU, and the others step by step."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison
from serving import SERVING

import iio_kernels.ops.slot_attention_module.api as operation
from iio_kernels import SlotAttentionWeights, slot_attention_module
from iio_kernels.ops.slot_attention_module.common import Options
from iio_kernels.runtime import backends
from iio_kernels.testing.slot_attention_module import (
    CASES,
    NAMES,
    Case,
    literal_slot_attention_module,
    literally,
    results,
)

OPERATION = "slot_attention_module"
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
assert_all_close = comparison(NAMES, 1e-11)


@each_case
def test_steps_one_by_one_equal_the_literal_algorithm(case):
    """What "auto" does on a GPU at sizes that do not suit one launch."""
    if case.N == 0:
        pytest.skip("there is no literal result")
    arguments, options = case.make()
    options = {"eps": 1e-8, "norm_eps": 1e-5, "scale": case.Dk**-0.5} | options

    def function(x, slots, weights, T):
        own = Options(T, options["eps"], options["norm_eps"])
        return operation._one_by_one(x, slots, weights, options["scale"], own)

    assert_all_close(results(function, *arguments), literally(arguments, **options))


def test_auto_takes_steps_one_by_one_where_one_launch_does_not_suit(monkeypatch):
    arguments, _ = Case("chosen").make()
    monkeypatch.setattr(
        backends, "choose", lambda op, backend, device: "triton" if op == "slot_attention_module" else "cpu"
    )
    monkeypatch.setattr(operation, "suits_one_launch", lambda *sizes: False)
    monkeypatch.setattr(operation, "_iterate", None)
    got = slot_attention_module(*arguments, return_attention=True)
    torch.testing.assert_close(got, literal_slot_attention_module(*arguments))


@pytest.mark.parametrize(
    ("case", "fits", "suits"),
    [
        (Case("", N=35**2, Dx=32, D=64, H=128), True, True),
        (Case("", N=35**2, K=16, Dx=32, D=64, H=128), True, True),
        (Case("", N=2048, K=7, Dx=32), True, True),
        (Case("", N=2049, K=7, Dx=32), True, False),
        (Case("", N=9, K=16, Dx=64, D=256, H=256), True, True),
        (Case("", N=9, Dx=65), False, False),
        (Case("", N=9, D=257), False, False),
        (Case("", N=9, K=17), False, False),
        (Case("", N=9, K=1, H=257), False, False),
    ],
    ids=lambda x: str(x) if isinstance(x, bool) else f"N{x.N} K{x.K} Dx{x.Dx} D{x.D} H{x.H}",
)
def test_sizes_of_one_launch(case, fits, suits):
    x, slots, weights, _ = case.make(torch.float32)[0]
    assert operation.fits_triton(x, slots, weights) == fits
    assert operation.suits_one_launch(x, slots, weights) == suits


@pytest.mark.skipif("triton" not in {backend for backend, _ in SERVING}, reason="Triton can run no kernels here")
def test_triton_by_name_refuses_sizes_beyond_its_kernels():
    arguments, _ = Case("too many", K=17).make()
    device = next(device for backend, device in reversed(SERVING) if backend == "triton")
    x, slots, weights, T = arguments
    on_device = x.to(device), slots.to(device), SlotAttentionWeights(*(w.to(device) for w in weights)), T
    with pytest.raises(ValueError, match=r"backend: 'triton' has no kernels for 17 slots .*one of 'auto'"):
        slot_attention_module(*on_device, backend="triton")
