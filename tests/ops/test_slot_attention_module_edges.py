"""The Slot Attention module where numbers are extreme or NaN, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison
from marks import NAMESPACES

from iio_kernels import slot_attention_module
from iio_kernels.testing.slot_attention_module import (
    NAMES,
    Case,
    results,
    run,
)

OPERATION = "slot_attention_module"
NAN = float("nan")
assert_all_close = comparison(NAMES, 1e-11)


def test_a_slot_without_attention_has_no_updates(backend, device):
    """Its normaliser is 0: the attention to it underflows, and eps is 0."""
    (x, slots, weights, _), _ = Case("none").make(device=device)
    options = {"eps": 0.0, "scale": 1e6}
    out, attention, *gradients = run((x[:, :1], slots, weights, 1), backend, **options)
    assert (attention.sum(2) == 0).any()
    assert all(y.isfinite().all() for y in (out, *gradients))
    expected = run((x[:, :1], slots, weights, 1), "reference", **options)
    assert_all_close((out, attention, *gradients), expected, relative=1e-9)


@pytest.mark.long("triton")
@pytest.mark.parametrize("place", ["x", "slots"])
def test_nan_goes_to_its_image_alone(place, backend, device):
    """Through every number of the image, and to none of the others, whichever comes first."""
    (x, slots, weights, T), _ = Case("nan", B=3, N=37, Dx=5, D=7, H=6).make(torch.float32, device)
    clean = run((x, slots, weights, T), backend)
    x, slots = x.clone(), slots.clone()
    (x if place == "x" else slots)[1, 2, 3] = NAN
    got = run((x, slots, weights, T), backend)
    for name, y, before in zip(NAMES[:4], got, clean, strict=False):
        assert y[1].isnan().all(), name
        if backend in NAMESPACES:
            assert torch.equal(y[::2], before[::2]), name
        else:  # whose products batch images
            torch.testing.assert_close(y[::2], before[::2])
    assert all(y.isnan().any() for y in got)


@pytest.mark.long("triton")
def test_bitwise_repeatable(backend, device):
    arguments, _ = Case("repeated", N=300, K=5).make(torch.float32, device)
    assert all(map(torch.equal, run(arguments, backend), run(arguments, backend)))


@pytest.mark.long("triton")
def test_inputs_are_never_written_to(backend, device):
    (x, slots, weights, T), _ = Case("read only").make(device=device)
    before = [y.clone() for y in (x, slots, *weights)]
    run((x, slots, weights, T), backend)
    assert all(map(torch.equal, (x, slots, *weights), before))


@pytest.mark.long("triton")
def test_autocast_leaves_the_arithmetic_alone(backend, device):
    arguments, _ = Case("autocast").make(torch.float32, device)
    expected = run(arguments, backend)

    def function(*arguments, **options):
        with torch.autocast(device, dtype=torch.bfloat16):
            return slot_attention_module(*arguments, **options)

    got = results(function, *arguments, return_attention=True, backend=backend)
    assert all(map(torch.equal, got, expected))
