"""The spatial mixture against the literal formula."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from iio_kernels import mixture_log_likelihood, spatial_mixture
from iio_kernels.testing.spatial_mixture import BENCHMARKS, CASES, NAMES, Case, allowed_error, literally, results

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
assert_all_close = comparison(NAMES, 1e-12)


# --- the formula ------------------------------------------------------------------------------------------


@each_case
def test_equals_the_literal_formula(case, backend, device):
    tensors, options = case.make(device=device)
    assert_all_close(results(spatial_mixture, *tensors, backend=backend, **options), literally(*tensors, **options))


@pytest.mark.parametrize("case", CASES[:6], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_within_budget(case, dtype, backend, device):
    (image, decoded), options = case.make(dtype, device)
    got = results(spatial_mixture, image, decoded, backend=backend, **options)
    eager, truth = (literally(image.to(x), decoded.to(x), **options) for x in (torch.float32, torch.float64))
    kinds = (*[torch.float32] * 5, dtype, dtype)
    for name, x, plain, exact, kind in zip(NAMES, got, eager, truth, kinds, strict=True):
        assert (x.dtype, x.shape) == (kind, exact.shape)
        assert (x.double() - exact).abs().max() <= allowed_error(exact, plain.to(kind)), name


@pytest.mark.parametrize(("image_dtype", "decoded_dtype"), [(32, 16), (64, 32), (64, 0), (0, 64), (16, 0)])
def test_mixed_dtypes(image_dtype, decoded_dtype, backend, device):
    kinds = {0: torch.bfloat16, 16: torch.float16, 32: torch.float32, 64: torch.float64}
    image, decoded = Case("mixed", H=5, W=7).make(torch.float16, device)[0]
    image, decoded = image.to(kinds[image_dtype]), decoded.to(kinds[decoded_dtype])
    got = results(spatial_mixture, image, decoded, backend=backend)
    wide = kinds[max(image_dtype, decoded_dtype, 32)]
    assert [x.dtype for x in got] == [*[wide] * 5, image.dtype, decoded.dtype]
    for x, y in zip(got, literally(image.double(), decoded.double()), strict=True):
        assert (x.double() - y).abs().max() <= 100 * torch.finfo(x.dtype).eps * y.abs().max()


def test_log_likelihood_alone_is_that_of_the_mixture(backend, device):
    tensors = [x.requires_grad_() for x in Case("alone", H=5, W=7).make(torch.float32, device)[0]]
    alone, whole = (
        mixture_log_likelihood(*tensors, backend=backend),
        spatial_mixture(*tensors, backend=backend).log_likelihood,
    )
    assert torch.equal(alone, whole)
    for x, y in zip(*(torch.autograd.grad(z.sum(), tensors) for z in (alone, whole)), strict=True):
        torch.testing.assert_close(x, y)


def test_one_slot_is_a_gaussian(backend, device):
    image, decoded = Case("gaussian", K=1, H=5, W=7).make(device=device)[0]
    expected = Normal(decoded[:, 0, :-1], 0.3).log_prob(image).sum(1)
    torch.testing.assert_close(mixture_log_likelihood(image, decoded, sigma=0.3, backend=backend), expected)


def test_leave_one_out_is_the_mixture_of_the_others(backend, device):
    image, decoded = Case("others", H=5, W=7).make(device=device)[0]
    got = spatial_mixture(image, decoded, backend=backend).leave_one_out
    for k in range(4):
        others = decoded[:, [j for j in range(4) if j != k]]
        torch.testing.assert_close(got[:, k], mixture_log_likelihood(image, others, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_that_are_all_but_one_leave_accurate_likelihoods(dtype, backend, device):
    """1 - m_k is 0 in float32 then, and so are the probabilities of far means."""
    image, decoded = Case("certain", H=5, W=7).make(dtype, device)[0]
    decoded[:, :, -1] *= 100
    decoded[:, :, :-1] *= 4
    got = results(spatial_mixture, image, decoded, backend=backend)
    truth = results(spatial_mixture, image.double(), decoded.double(), backend="reference")
    assert (truth[1] > 1 - 1e-9).any()
    for name, x, y in zip(NAMES, got, truth, strict=True):
        error = (x.double() - y).abs().max()  # log p_k in the hundreds are off by some 1e-5
        assert error <= max(torch.finfo(x.dtype).eps, 3e-5) * max(y.abs().max(), 1), name


# --- any shape --------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    B=st.integers(0, 3),
    K=st.integers(2, 12),
    C=st.integers(1, 5),
    H=st.integers(1, 20),
    W=st.integers(1, 20),
    channels_last=st.booleans(),
)
def check_any_shape(backend, device, B, K, C, H, W, channels_last):
    tensors = Case("any", B, K, C, H, W, channels_last).make(device=device)[0]
    assert_all_close(results(spatial_mixture, *tensors, backend=backend), literally(*tensors))


@pytest.mark.long("triton")
def test_any_shape(backend, device):
    check_any_shape(backend, device)


# --- what it is measured on -------------------------------------------------------------------------------


def test_bytes_and_flops_of_tetrominoes():
    case = BENCHMARKS["cpu"][0]
    # 4 slots of 4 channels and an image of 3, 35 x 35 pixels of 32 images; forward 1 + 3 x 4 + 16 results.
    assert case.bytes_moved(torch.float32) == 32 * 35 * 35 * 4 * (16 + 3 + 29)
    assert case.bytes_moved(torch.bfloat16, backward=True) == 32 * 35 * 35 * (2 * 2 * 16 + 4 * 3 + 4 * 9)
    assert case.flops() == 32 * 35 * 35 * (48 + 48 + 20 + 1 + 32)
    assert case.flops(backward=True) == 32 * 35 * 35 * (48 + 48 + 32 + 24)
