"""`accelerate`: every family of the field found and proved, whatever is something else left alone."""

from __future__ import annotations

import pytest
import torch
from running import WARNINGS, assert_same, without_noise

from iio_kernels import accelerate
from iio_kernels.acceleration import Accelerated
from iio_kernels.runtime import backends
from iio_kernels.testing.families import FAMILIES, OUTSIDE

pytestmark = WARNINGS


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_families_are_found_and_proved(name: str, precision: str):
    family = FAMILIES[name]
    args, kwargs = family.arguments(family.small)
    model = without_noise(family.make(family.small), kwargs.get("num_slots", family.small.K))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        report = accelerate(model, *args, **kwargs)
        (entry,) = report.entries
        assert entry.accelerated, entry.what
        assert ("from_inputs" in entry.what) == family.projection_free
        assert entry.difference < 1
        assert_same(model, args, kwargs, 2**-8 if precision == "autocast" else 2**-23)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_on_triton(name: str, monkeypatch: pytest.MonkeyPatch):
    """The kernels of a GPU in Triton's interpreter."""
    if backends.BACKENDS["triton"].refuses(torch.device("cpu")) is not None:
        pytest.skip("Triton's interpreter is off")
    served = []

    def choose(op: str, backend: str, device: torch.device) -> str:
        served.append(op)
        return "triton"

    monkeypatch.setattr(backends, "choose", choose)
    family = FAMILIES[name]
    args, kwargs = family.arguments(family.small)
    model = without_noise(family.make(family.small), kwargs.get("num_slots", family.small.K))
    model.forward = Accelerated(model)
    # The proofs in float64 run on Triton too.
    assert_same(model, args, kwargs, 2**-23)
    assert set(served) == {"slot_attention"}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_something_else_is_left_alone(name: str):
    family = OUTSIDE[name]
    model = family.make(family.small)
    args, kwargs = family.arguments(family.small)
    report = accelerate(model, *args, **kwargs)
    (entry,) = report.entries
    assert not entry.accelerated
    assert {"isa": "keys differ from slot to slot", "sinkhorn": "by other means than a softmax"}[name] in entry.what
    assert "forward" not in vars(model)
