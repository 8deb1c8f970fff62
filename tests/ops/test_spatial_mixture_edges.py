"""Edges of the spatial mixture: closed slots, NaN, what is kept, autocast."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison
from marks import NAMESPACES

from iio_kernels import MixtureFunction, mixture_log_likelihood, spatial_mixture
from iio_kernels.testing.spatial_mixture import NAMES, Case, results
from iio_kernels.testing.tensors import random_like

OPERATION = "spatial_mixture"
assert_all_close = comparison(NAMES, 1e-12)
NAN = float("nan")


def test_a_slot_with_a_logit_of_minus_infinity_takes_no_part(backend, device):
    image, decoded = Case("closed", H=5, W=7).make(device=device)[0]
    decoded[:, 1, -1] = float("-inf")
    others = [0, 2, 3]
    got = spatial_mixture(image, decoded, backend=backend)
    expected = spatial_mixture(image, decoded[:, others], backend=backend)
    assert not got.masks[:, 1].any()
    assert not got.d_decoded[:, 1].any()
    torch.testing.assert_close(got.log_likelihood, expected.log_likelihood)
    torch.testing.assert_close(got.leave_one_out[:, 1], expected.log_likelihood)
    for name in ("masks", "leave_one_out", "d_decoded"):
        torch.testing.assert_close(getattr(got, name)[:, others], getattr(expected, name))
    leaf = decoded.requires_grad_()
    mixture_log_likelihood(image, leaf, backend=backend).sum().backward()
    torch.testing.assert_close(leaf.grad, -got.d_decoded)
    decoded = decoded.detach().clone()
    decoded[:, :3, -1] = float("-inf")  # no other slot than the last
    got = spatial_mixture(image, decoded, backend=backend)
    assert got.leave_one_out[:, 3].isnan().all()
    torch.testing.assert_close(got.leave_one_out[:, 0], got.log_likelihood)
    assert all(x.isfinite().all() for x in (got.log_likelihood, got.masks, got.posterior, got.d_decoded))


@pytest.mark.parametrize("place", ["image", "mean", "logit"])
def test_nan_goes_to_everything_that_depends_on_it(place, backend, device):
    image, decoded = Case("nan", B=3, H=5, W=7).make(device=device)[0]
    clean = results(spatial_mixture, image, decoded, backend=backend)
    x, at = {"image": (image, (1, 1)), "mean": (decoded, (1, 2, 1)), "logit": (decoded, (1, 2, 3))}[place]
    x[(*at, 3, 4)] = NAN
    got = dict(zip(NAMES, results(spatial_mixture, image, decoded, backend=backend), strict=True))
    pixel = {name: x[1, ..., 3, 4].clone() for name, x in got.items()}
    assert pixel["log_likelihood"].isnan()
    assert pixel["masks"].isnan().all() == (place == "logit")
    assert pixel["posterior"].isnan().all() == (place != "logit")
    assert pixel["leave_one_out"][[0, 1, 3]].isnan().all()
    assert pixel["d_decoded"][:, -1].isnan().all()
    assert pixel["ddecoded"][:, -1].isnan().all()
    assert pixel["dimage"].isnan().all() if place != "image" else pixel["dimage"][1].isnan()
    # Other pixels know nothing of it.
    for x, y in zip(got.values(), clean, strict=True):
        x[1, ..., 3, 4] = y[1, ..., 3, 4] = 0
        torch.testing.assert_close(x, y)


def test_inputs_are_kept_and_never_written_to(backend, device):
    tensors = [x.requires_grad_() for x in Case("kept", H=5, W=7, channels_last=True).make(device=device)[0]]
    before, kept = [x.detach().clone() for x in tensors], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        mixture = spatial_mixture(*tensors, backend=backend)
    outputs, d_decoded = mixture[:3], mixture.d_decoded.clone()
    incoming = random_like(*outputs)
    torch.autograd.backward(outputs, incoming)
    for x, y in zip((*tensors, *incoming), (*before, *random_like(*outputs)), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(mixture.d_decoded, d_decoded)
    if backend in NAMESPACES:
        results = [mixture.masks, mixture.posterior, mixture.d_decoded] if backend == "cpu" else []
        assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in (*tensors, *results)}


@pytest.mark.long("triton")
def test_autocast_leaves_the_arithmetic_alone(backend, device):
    tensors = Case("autocast", H=5, W=7).make(torch.float32, device)[0]
    expected = results(spatial_mixture, *tensors, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = results(spatial_mixture, *tensors, backend=backend)
    assert [x.dtype for x in got] == [torch.float32] * 7
    assert all(map(torch.equal, got, expected))


def test_function_by_itself(any_device):
    """`MixtureFunction` with the reference's kernels: the gradient as written out, against plain autograd."""
    tensors = Case("function", H=5, W=7).make(device=any_device)[0]
    got = results(lambda *x: MixtureFunction.apply(*x, 0.1, True, "reference"), *tensors)
    assert_all_close(got, results(spatial_mixture, *tensors, backend="reference"))
