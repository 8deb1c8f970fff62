"""Slot composition against the literal formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparing import comparison
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import each_dtype

from iio_kernels import compose, composition_error
from iio_kernels.testing.compose import (
    BENCHMARKS,
    CASES,
    NAMES,
    Case,
    allowed_error,
    composed,
    literal_compose,
    literal_composition_error,
    results,
    run,
)
from iio_kernels.testing.tensors import random_like

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
assert_all_close = comparison(NAMES, 1e-12)


# --- the formula ------------------------------------------------------------------------------------------


@each_case
def test_error_equals_the_literal_formula(case, backend, device):
    tensors = case.make(device=device)[0]
    assert_all_close(run(*tensors, backend), results(literal_composition_error, *tensors))


@each_case
def test_reconstruction_equals_the_literal_formula(case, backend, device):
    tensors = case.make(device=device)[0]
    assert_all_close(composed(*tensors, backend), composed(*tensors))


@each_case
@each_dtype
def test_rounding_is_within_budget(case, dtype, backend, device):
    image, decoded = case.make(dtype, device)[0]
    for ours, formula in ((run, lambda *x: results(literal_composition_error, *x)), (composed, composed)):
        got = ours(image, decoded, backend)
        eager, truth = (formula(image.to(kind), decoded.to(kind)) for kind in (torch.float32, torch.float64))
        kinds = torch.float32, torch.float32, dtype, dtype
        for name, x, plain, exact, kind in zip(NAMES, got, eager, truth, kinds, strict=True):
            assert x.dtype == kind
            assert x.shape == exact.shape
            if exact.numel():
                assert (x.double() - exact).abs().max() <= allowed_error(exact, plain.to(kind)), name


@pytest.mark.parametrize(("image_dtype", "decoded_dtype"), [(32, 16), (16, 32), (64, 32), (64, 0), (0, 64), (0, 16)])
def test_mixed_dtypes(image_dtype, decoded_dtype, backend, device):
    kinds = {0: torch.bfloat16, 16: torch.float16, 32: torch.float32, 64: torch.float64}
    image, decoded = Case("mixed").make(torch.float16, device)[0]
    image, decoded = image.to(kinds[image_dtype]), decoded.to(kinds[decoded_dtype])
    got = run(image, decoded, backend)
    wide = kinds[max(image_dtype, decoded_dtype, 32)]
    assert [x.dtype for x in got] == [wide, wide, image.dtype, decoded.dtype]
    exact = results(literal_composition_error, image.double(), decoded.double())
    for x, y in zip(got, exact, strict=True):
        assert (x.double() - y).abs().max() <= 4 * torch.finfo(x.dtype).eps * y.abs().max()


def test_error_is_that_of_the_reconstruction(backend, device):
    image, decoded = Case("both").make(device=device)[0]
    reconstruction, masks = compose(decoded, backend=backend)
    error, same_masks = composition_error(image, decoded, return_masks=True, backend=backend)
    assert torch.equal(masks, same_masks)
    torch.testing.assert_close(error, F.mse_loss(reconstruction, image))
    assert torch.equal(composition_error(image, decoded, backend=backend), error)


def test_reductions(backend, device):
    image, decoded = Case("reduced", B=3).make(device=device)[0]
    errors = composition_error(image, decoded, reduction="none", backend=backend)
    assert errors.shape == (3,)
    for reduction in ("mean", "sum"):
        got = composition_error(image, decoded, reduction=reduction, backend=backend)
        torch.testing.assert_close(got, getattr(errors, reduction)())
    assert torch.equal(composition_error(image, decoded, backend=backend), errors.mean())


def test_no_images(backend, device):
    image, decoded = Case("none", B=0).make(device=device)[0]
    assert composition_error(image, decoded, backend=backend).isnan()
    assert composition_error(image, decoded, reduction="sum", backend=backend) == 0
    error, masks, dimage, ddecoded = run(image, decoded, backend)
    assert [x.shape for x in (error, masks, dimage, ddecoded)] == [(0,), (0, 4, 13, 12), image.shape, decoded.shape]


@pytest.mark.parametrize("used", ["error", "masks", "reconstruction", "masks beside it"])
def test_gradient_of_one_output_alone(used, backend, device):
    """The other's incoming gradient is absent, not zero."""
    image, decoded = Case("one output").make(device=device)[0]
    at = {"error": 0, "masks": 1, "reconstruction": 0, "masks beside it": 1}[used]
    options = {"backend": backend}
    gradients = []
    for ours in (True, False):
        leaf = decoded.clone().requires_grad_()
        if used in ("error", "masks"):
            function = composition_error if ours else literal_composition_error
            outputs = function(image, leaf, **(options | {"return_masks": True} if ours else {}))
        else:
            outputs = compose(leaf, **options) if ours else literal_compose(leaf)
        output = outputs[at].mean() if used == "error" else outputs[at].square().sum()
        gradients.append(torch.autograd.grad(output, leaf)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("wanted", ["image", "decoded"])
def test_gradient_of_one_input_alone(wanted, backend, device):
    tensors = dict(zip(("image", "decoded"), Case("one input").make(device=device)[0], strict=True))
    incoming = [torch.ones(2).to(tensors["image"]), torch.zeros(2, 4, 13, 12).to(tensors["image"])]
    everything = dict(zip(NAMES, run(*tensors.values(), backend, incoming), strict=True))
    leaf = tensors[wanted].requires_grad_()
    composition_error(**tensors, reduction="sum", backend=backend).backward()
    torch.testing.assert_close(leaf.grad, everything[f"d{wanted}"])
    assert all(x.grad is None for name, x in tensors.items() if name != wanted)


def test_results_without_gradients(backend, device):
    image, decoded = Case("inference").make(device=device)[0]
    plain = composition_error(image, decoded, backend=backend)
    assert not plain.requires_grad
    with torch.no_grad():
        assert torch.equal(composition_error(image, decoded.requires_grad_(), backend=backend), plain)


# --- symmetry ---------------------------------------------------------------------------------------------


def test_order_of_slots_and_channels_does_not_matter(backend, device):
    image, decoded = Case("order", K=7).make(device=device)[0]
    order = torch.randperm(7, device=device)
    error, masks, dimage, ddecoded = run(image, decoded, backend)
    d_error, d_masks = random_like(error, masks)
    got = run(image, decoded[:, order], backend, (d_error, d_masks[:, order]))
    assert_all_close(got, (error, masks[:, order], dimage, ddecoded[:, order]))
    channels = torch.tensor([1, 2, 0, 3], device=device)
    got = run(image[:, channels[:3]], decoded[:, :, channels], backend)
    assert_all_close(got, (error, masks, dimage[:, channels[:3]], ddecoded[:, :, channels]))


def test_only_differences_between_alphas_matter(backend, device):
    image, decoded = Case("shifted").make(device=device)[0]
    shifted = decoded.clone()
    shifted[:, :, -1] += torch.randn(2, 1, 13, 12).to(decoded)
    assert_all_close(run(image, shifted, backend), run(image, decoded, backend))


def test_one_slot_is_the_picture_itself(backend, device):
    image, decoded = Case("alone", K=1).make(device=device)[0]
    reconstruction, masks = compose(decoded.requires_grad_(), backend=backend)
    assert torch.equal(reconstruction, decoded[:, 0, :-1])
    assert (masks == 1).all()
    (gradient,) = torch.autograd.grad(F.mse_loss(reconstruction, image), decoded)
    assert (gradient[:, :, -1] == 0).all()


# --- any shape --------------------------------------------------------------------------------------------


@settings(max_examples=examples(40), deadline=None, derandomize=True)
@given(
    B=st.integers(0, 3),
    K=st.integers(1, 12),
    C=st.integers(1, 5),
    H=st.integers(1, 40),
    W=st.integers(1, 40),
    channels_last=st.booleans(),
)
def check_any_shape(backend, device, B, K, C, H, W, channels_last):
    tensors = Case("any", B, K, C, H, W, channels_last).make(device=device)[0]
    assert_all_close(run(*tensors, backend), results(literal_composition_error, *tensors))
    assert_all_close(composed(*tensors, backend), composed(*tensors))


@pytest.mark.long("triton")
def test_any_shape(backend, device):
    check_any_shape(backend, device)


# --- what it is measured on -------------------------------------------------------------------------------


def test_bytes_and_flops_of_tetrominoes():
    case = BENCHMARKS["cpu"][0]
    # 4 slots of 4 channels and an image of 3, 35 x 35 pixels of 64 images; backward a gradient besides.
    assert case.bytes_moved(torch.float32) == 64 * 35 * 35 * 4 * (16 + 3)
    assert case.bytes_moved(torch.bfloat16, backward=True) == 64 * 35 * 35 * (2 * 2 * 16 + 4 * 3)
    assert case.flops() == 64 * 35 * 35 * (4 * 3 + 2 * 12 + 3 * 3)
    assert case.flops(backward=True) == case.flops() + 64 * 35 * 35 * (3 * 12 + 4 * 4)
