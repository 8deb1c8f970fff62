"""Edges of slot composition: large numbers, NaN, repeats, what is kept, autocast."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison
from marks import each_dtype, kernels_alone
from torch import Tensor

from iio_kernels import CompositionFunction, compose, composition_error
from iio_kernels.testing.compose import NAMES, Case, composed, results, run
from iio_kernels.testing.tensors import random_like

OPERATION = "compose"
assert_all_close = comparison(NAMES, 1e-12)
NAN = float("nan")


@each_dtype
def test_large_alphas_do_not_overflow(dtype, backend, device):
    image, decoded = Case("large").make(dtype, device)[0]
    decoded[:, :, -1] *= 300
    error, masks, *gradients = run(image, decoded, backend)
    torch.testing.assert_close(masks, decoded[:, :, -1].float().softmax(1))
    assert all(x.isfinite().all() for x in (error, *gradients))


def test_a_slot_with_an_alpha_of_minus_infinity_takes_no_part(backend, device):
    image, decoded = Case("closed").make(device=device)[0]
    decoded[:, 1, -1] = float("-inf")
    others = [0, 2, 3]
    error, masks, dimage, ddecoded = run(image, decoded, backend)
    d_error, d_masks = random_like(error, masks)
    assert (masks[:, 1] == 0).all()
    assert (ddecoded[:, 1] == 0).all()
    expected = run(image, decoded[:, others], backend, (d_error, d_masks[:, others]))
    assert_all_close((error, masks[:, others], dimage, ddecoded[:, others]), expected)


@pytest.mark.parametrize("place", ["image", "rgb", "alpha"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_nan_goes_to_everything_that_depends_on_it(place, channels_last, backend, device):
    image, decoded = Case("nan", B=3, channels_last=channels_last).make(device=device)[0]
    clean_error, clean_reconstruction = run(image, decoded, backend), composed(image, decoded, backend)
    image, decoded = image.clone(), decoded.clone()
    if place == "image":
        image[1, 1, 5, 6] = NAN
    else:
        decoded[1, 2, 1 if place == "rgb" else -1, 5, 6] = NAN
    error, masks, dimage, ddecoded = run(image, decoded, backend)
    assert error.isnan().tolist() == [False, True, False]
    assert dimage[1, 1, 5, 6].isnan()
    assert masks[1, :, 5, 6].isnan().all() == (place == "alpha")
    assert ddecoded[1, :, -1, 5, 6].isnan().all()
    reconstruction = composed(image, decoded, backend)[0]
    if place != "image":
        assert reconstruction[1, 1, 5, 6].isnan()
    # Other pixels know nothing of it.
    for x, y in zip(
        (masks, dimage, ddecoded, reconstruction), (*clean_error[1:], clean_reconstruction[0]), strict=True
    ):
        x, y = x.clone(), y.clone()
        x[1, ..., 5, 6] = y[1, ..., 5, 6] = 0
        torch.testing.assert_close(x, y)


@pytest.mark.long("triton")
def test_bitwise_repeatable(backend, device):
    for case in (Case("repeated", K=5, H=35, W=35), Case("repeated", K=5, H=35, W=35, channels_last=True)):
        tensors = case.make(torch.float32, device)[0]
        for ours in (run, composed):
            assert all(map(torch.equal, ours(*tensors, backend), ours(*tensors, backend)))


@kernels_alone
def test_layout_changes_no_bit(backend, device):
    plain, last = (
        Case("layout", H=35, W=35, channels_last=how).make(torch.float32, device)[0] for how in (False, True)
    )
    for x, y in zip(run(*plain, backend), run(*last, backend), strict=True):
        assert torch.equal(x, y)


@pytest.mark.long("triton")
def test_inputs_are_never_written_to(backend, device):
    for channels_last in (False, True):
        image, decoded = Case("read only", channels_last=channels_last).make(device=device)[0]
        before = image.clone(), decoded.clone()
        leaves = image.requires_grad_(), decoded.requires_grad_()
        outputs = composition_error(*leaves, reduction="none", return_masks=True, backend=backend)
        outputs += compose(decoded, backend=backend)
        incoming = random_like(*outputs)
        torch.autograd.backward(outputs, incoming)
        for x, y in zip((*leaves, *incoming), (*before, *random_like(*outputs)), strict=True):
            assert torch.equal(x, y)


@kernels_alone
def test_nothing_but_inputs_is_kept_for_backward(backend, device):
    image, decoded = (x.requires_grad_() for x in Case("kept").make(device=device)[0])
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        composition_error(image, decoded, reduction="none", return_masks=True, backend=backend)
        compose(decoded, backend=backend)
    assert {x.data_ptr() for x in kept} == {image.data_ptr(), decoded.data_ptr()}


@pytest.mark.long("triton")
def test_autocast_leaves_the_arithmetic_alone(backend, device):
    tensors = Case("autocast").make(torch.float32, device)[0]
    expected = run(*tensors, backend)

    def error(image, decoded):
        with torch.autocast(device, dtype=torch.bfloat16):
            return composition_error(image, decoded, reduction="none", return_masks=True, backend=backend)

    for x, y in zip(results(error, *tensors), expected, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y)
    with torch.autocast(device, dtype=torch.bfloat16):
        reconstruction, _ = compose(tensors[1], backend=backend)
    assert torch.equal(reconstruction, compose(tensors[1], backend=backend)[0])


def test_function_by_itself(any_device):
    """`CompositionFunction` with the reference's kernels: the gradient as written out, against plain autograd."""
    tensors = Case("function").make(device=any_device)[0]

    def error(image, decoded):
        _, masks, errors = CompositionFunction.apply(decoded, image, False, True, "reference")
        return errors, masks

    assert_all_close(results(error, *tensors), run(*tensors, "reference"))
