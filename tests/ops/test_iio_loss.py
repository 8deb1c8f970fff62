"""The IIO loss against the literal formula."""

from __future__ import annotations

import pytest
import torch
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import each_dtype

from iio_kernels import conditional_entropies, iio_loss
from iio_kernels.testing.iio_loss import (
    BENCHMARKS,
    CASES,
    Case,
    allowed_error,
    assert_all_close,
    literal_conditional_entropy,
    literal_iio_loss,
    literal_inpaint,
    results,
    run,
)

# The literal formula takes K 2^(K-1) pairs of blurs: up to six masks it is quick.
LITERAL = [case for case in CASES if case.K <= 6]
SMOOTH = [case for case in LITERAL if case.smooth]
named = {"ids": lambda case: case.name}


# --- the formula ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LITERAL, **named)
def test_loss_equals_the_literal_formula(case, backend, device):
    (image, masks), options = case.make(device=device)
    got = iio_loss(image, masks, reduction="none", backend=backend, **options)
    torch.testing.assert_close(got, literal_iio_loss(image, masks, **options), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("case", SMOOTH, **named)
def test_gradients_equal_those_of_the_literal_formula(case, backend, device):
    tensors, options = case.make(device=device)
    assert_all_close(run(*tensors, backend, **options), results(literal_iio_loss, *tensors, **options))


@pytest.mark.parametrize("case", [case for case in SMOOTH if case.K < 6], **named)
@each_dtype
def test_error_is_within_budget(case, dtype, backend, device):
    (image, masks), options = case.make(dtype, device)
    got = run(image, masks, backend, **options)
    eager = results(literal_iio_loss, image.float(), masks.float(), **options)
    truth = results(literal_iio_loss, image.double(), masks.double(), **options)
    for name, x, plain, exact in zip(("loss", "dimage", "dmasks"), got, eager, truth, strict=True):
        assert x.dtype == (torch.float32 if name == "loss" else dtype)
        assert x.shape == exact.shape
        if exact.numel():
            assert (x.double() - exact).abs().max() <= allowed_error(exact, plain.to(x.dtype)), name


@pytest.mark.long
@pytest.mark.parametrize("K", [7, 11])
def test_many_masks(K, backend, device, interpreted):
    """Beyond the literal formula's reach: some of its terms, and that they sum up."""
    if interpreted and K > 7:
        pytest.skip("minutes in the interpreter: test_triton_iio_loss.py has a smaller image")
    (image, masks), _ = Case("many", B=1, C=2, K=K, H=11, W=11).make(device=device)
    H = conditional_entropies(image, masks, backend=backend)
    for m, members in ((0, (1,)), (3, (0, K - 1)), (K - 1, range(K - 1)), (1, (0, 3, 4))):
        others = [i for i in range(K) if i != m]
        position = sum(1 << others.index(i) for i in members) - 1
        given = masks[:, list(members)].sum(1)
        expected = literal_conditional_entropy(image, masks[:, m], given)
        torch.testing.assert_close(H[:, m, position], expected, rtol=1e-10, atol=0)
    expected = results(lambda x, y: -conditional_entropies(x, y).sum((1, 2)), image, masks)
    assert_all_close(run(image, masks, backend), expected)
    assert_all_close([x.double() for x in run(image.float(), masks.float(), backend)], expected, relative=1e-5)


@pytest.mark.parametrize(("image_dtype", "masks_dtype"), [(32, 16), (16, 32), (64, 32), (0, 16)])
def test_mixed_dtypes(image_dtype, masks_dtype, backend, device):
    kinds = {0: torch.bfloat16, 16: torch.float16, 32: torch.float32, 64: torch.float64}
    (image, masks), _ = Case("mixed").make(torch.float16, device)
    image, masks = image.to(kinds[image_dtype]), masks.to(kinds[masks_dtype])
    got = run(image, masks, backend)
    assert [x.dtype for x in got] == [kinds[max(image_dtype, 32)], image.dtype, masks.dtype]
    exact = results(literal_iio_loss, image.double(), masks.double())
    for x, y in zip(got, exact, strict=True):
        torch.testing.assert_close(
            x.double(), y, rtol=0, atol=max(4 * torch.finfo(x.dtype).eps, 1e-5) * y.abs().max().item()
        )


def test_two_masks_is_minus_inpainting_error_maximization(backend, device):
    """Each region predicted from the other one, normalised by its own size."""
    (image, masks), _ = Case("pair", K=2).make(device=device)
    first, second = masks.unbind(1)
    error = [(image - literal_inpaint(image, given)).abs().mean(1) for given in (second, first)]
    objective = sum(
        (centre * e).sum((1, 2)) / centre.sum((1, 2)) for centre, e in zip((first, second), error, strict=True)
    )
    torch.testing.assert_close(iio_loss(image, masks, backend=backend), -objective.mean(), rtol=1e-10, atol=0)


@pytest.mark.long("triton")
@pytest.mark.parametrize("K", [2, 3, 5])
def test_terms_and_reductions(K, backend, device):
    (image, masks), _ = Case("reduced", B=3, K=K).make(device=device)
    losses = iio_loss(image, masks, reduction="none", backend=backend)
    assert losses.shape == (3,)
    for terms, divisor in (("sum", 1), ("mean", 2 ** (K - 1) - 1)):
        options = {"terms": terms, "backend": backend}
        torch.testing.assert_close(iio_loss(image, masks, reduction="none", **options), losses / divisor)
        torch.testing.assert_close(iio_loss(image, masks, reduction="sum", **options), losses.sum() / divisor)
        torch.testing.assert_close(iio_loss(image, masks, reduction="mean", **options), losses.mean() / divisor)
        torch.testing.assert_close(iio_loss(image, masks, **options), losses.mean() / divisor)


def test_no_images(backend, device):
    (image, masks), _ = Case("none", B=0).make(device=device)
    assert iio_loss(image, masks, backend=backend).isnan()
    assert iio_loss(image, masks, reduction="sum", backend=backend) == 0
    loss, dimage, dmasks = run(image, masks, backend)
    assert loss.shape == (0,)
    assert dimage.shape == image.shape
    assert dmasks.shape == masks.shape


# --- symmetry ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [2, 4, 6])
def test_order_of_masks_and_channels_does_not_matter(K, backend, device):
    (image, masks), _ = Case("order", K=K).make(device=device)
    order = torch.randperm(K, device=device)
    loss, dimage, dmasks = run(image, masks, backend)
    assert_all_close(run(image, masks[:, order], backend), (loss, dimage, dmasks[:, order]))
    assert_all_close(run(image.flip(1), masks, backend), (loss, dimage.flip(1), dmasks))


@pytest.mark.parametrize(
    "turn", [lambda x: x.flip(2), lambda x: x.flip(3), lambda x: x.mT], ids=["down", "across", "T"]
)
def test_turning_the_picture_turns_the_gradients(turn, backend, device):
    (image, masks), _ = Case("turned").make(device=device)
    loss, dimage, dmasks = run(image, masks, backend)
    assert_all_close(run(turn(image), turn(masks), backend), (loss, turn(dimage), turn(dmasks)))


# --- any shape --------------------------------------------------------------------------------------------


@settings(max_examples=examples(30), deadline=None, derandomize=True)
@given(
    B=st.integers(0, 3),
    C=st.integers(1, 4),
    K=st.integers(2, 4),
    H=st.integers(1, 16),
    W=st.integers(1, 16),
    sigma=st.sampled_from([0.5, 1.0, 5.0, 30.0]),
    half=st.integers(0, 7),
    repeats=st.integers(1, 3),
    eps=st.sampled_from([0.0, 1e-8, 1e-2]),
)
def check_any_shape(backend, device, B, C, K, H, W, sigma, half, repeats, eps):
    kernel_size = 2 * min(half, (min(H, W) - 1) // 2) + 1
    options = {"sigma": sigma, "kernel_size": kernel_size, "repeats": repeats, "eps": eps}
    tensors, options = Case("any", B, C, K, H, W, options).make(device=device)
    expected = results(literal_iio_loss, *tensors, **options)
    if kernel_size == 1:
        got = iio_loss(*tensors, reduction="none", backend=backend, **options)
        torch.testing.assert_close(got, expected[0], rtol=0, atol=1e-12)
    else:
        assert_all_close(run(*tensors, backend, **options), expected, relative=1e-9)


@pytest.mark.long("triton")
def test_any_shape(backend, device):
    check_any_shape(backend, device)


# --- what it is measured on -------------------------------------------------------------------------------


def test_bytes_and_flops_of_tetrominoes():
    case = BENCHMARKS["cpu"][0]
    assert case.bytes_moved(torch.float32) == 64 * 4 * ((3 + 4) * 35 * 35 + 1)
    assert case.bytes_moved(torch.bfloat16, backward=True) == 64 * (2 * 2 * (3 + 4) * 35 * 35 + 4)
    # 16 planes by 2 axes, 2 passes and 11 taps; 14 subsets.
    blur, subsets = 16 * 2 * 2 * 11 * 2, 14
    assert case.flops() == 64 * 35 * 35 * (blur + subsets * (4 + 3 + 2 + 3))
    assert case.flops(backward=True) == 64 * 35 * 35 * (2 * blur + subsets * (12 + 4 + 4 + 2))
