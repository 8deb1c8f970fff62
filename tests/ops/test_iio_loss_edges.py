"""Edges of the inpainting functions: empty masks, NaN, repeats, autocast, storage types."""

from __future__ import annotations

import pytest
import torch
from marks import each_dtype

from iio_kernels import conditional_entropies, iio_loss, inpaint, interaction_information
from iio_kernels.testing.iio_loss import (
    Case,
    assert_all_close,
    literal_iio_loss,
    results,
    run,
)

OPERATION = "iio_loss"
NAN = float("nan")


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_an_empty_mask_has_no_terms_and_no_gradient_through_them(eps, backend, device):
    """Adding one without a pixel: its own entropies and those given it alone are 0, others do not change."""
    (image, masks), _ = Case("three", K=3).make(device=device)
    padded = torch.cat([masks, torch.zeros_like(masks[:, :1])], 1)
    H = conditional_entropies(image, padded, eps=eps, backend=backend)
    assert (H[:, 3] == 0).all()
    assert (H[:, :3, 3] == 0).all()  # position 3 is the set {3}
    torch.testing.assert_close(H[:, :3, :3], conditional_entropies(image, masks, eps=eps, backend=backend))
    torch.testing.assert_close(H[:, :3, 4:], H[:, :3, :3])

    incoming = torch.ones(2, dtype=image.dtype, device=device)
    loss, dimage, dmasks = run(image, padded, backend, incoming, eps=eps)
    base = run(image, masks, backend, incoming, eps=eps)
    torch.testing.assert_close(loss, 2 * base[0])
    torch.testing.assert_close(dimage, 2 * base[1])
    torch.testing.assert_close(dmasks[:, :3], 2 * base[2])
    assert dmasks[:, 3].isfinite().all()


@pytest.mark.parametrize("offset", [-40.0, -60.0, -80.0, -100.0, -120.0])
def test_a_slot_that_a_softmax_all_but_closed(offset, backend, device):
    """Its mask's sum lies anywhere down to float32's smallest numbers, and gradients divide by it."""
    image, logits = torch.rand(2, 3, 12, 14, device=device), torch.randn(2, 4, 12, 14, device=device)
    logits[0, 1] += offset
    logits[1, 2] += offset
    logits[1, 3] += offset
    logits.requires_grad_()
    loss = iio_loss(image, logits.softmax(1), backend=backend)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_a_slot_of_one_pixel_that_a_softmax_all_but_closed(backend, device):
    """Far from it the filtered mask is eps times nearly nothing, and its square would be 0 in float32."""
    image, logits = torch.rand(1, 3, 35, 35, device=device), torch.randn(1, 4, 35, 35, device=device)
    logits[:, 0] = -60
    logits[:, 0, 3, 3] = -31
    logits.requires_grad_()
    loss = iio_loss(image, logits.softmax(1), backend=backend)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_an_infinite_mask_is_no_empty_one(backend, device):
    (image, masks), _ = Case("infinite", K=3).make(device=device)
    masks[0, 1, 2, 3] = float("inf")
    H = conditional_entropies(image, masks, backend=backend)
    assert H[0, 1].isnan().all()
    assert H[1].isfinite().all()


def test_pixels_outside_a_mask_have_a_gradient(backend, device):
    """In float64 it is that of the literal formula: what tells a binary mask which pixels should join it."""
    (image, masks), _ = Case("one-hot", K=3, masks="one-hot").make(device=device)
    _, _, dmasks = run(image, masks, backend, torch.ones_like(image[:, 0, 0, 0]))
    step, (b, m, y, x) = 1e-6, (masks == 0).nonzero()[7]
    losses = []
    for sign in (1, -1):
        moved = masks.clone()
        moved[b, m, y, x] += sign * step
        losses.append(literal_iio_loss(image, moved).sum())
    measured = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close(dmasks[b, m, y, x], measured, rtol=1e-4, atol=1e-8)


def test_no_mask_has_a_pixel(backend, device):
    image, masks = torch.rand(2, 3, 12, 12, device=device), torch.zeros(2, 4, 12, 12, device=device)
    for x in run(image, masks, backend):
        assert (x == 0).all()


@pytest.mark.parametrize("place", ["image", "masks"])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_nan_goes_into_loss_and_gradients_of_its_image_alone(place, eps, backend, device):
    (image, masks), _ = Case("nan", B=3).make(device=device)
    clean = run(image, masks, backend, eps=eps)
    poisoned = {"image": image.clone(), "masks": masks.clone()}
    poisoned[place][1, 1, 5, 6] = NAN
    got = run(poisoned["image"], poisoned["masks"], backend, eps=eps)
    assert got[0][1].isnan()
    assert got[1][1].isnan().any()
    assert got[2][1].isnan().any()
    if eps:  # through each plane's sum it reaches every pixel
        assert got[1][1, 1 if place == "image" else slice(None)].isnan().all()
        assert got[2][1].isnan().all()
    for x, y in zip(got, clean, strict=True):
        assert_all_close([x[::2]] * 3, [y[::2]] * 3)
    assert iio_loss(**poisoned, backend=backend).isnan()
    H = conditional_entropies(**poisoned, backend=backend)[1]
    for m in range(4):  # every term with the mask in it, or with the image
        others = [i for i in range(4) if i != m]
        touched = [place == "image" or m == 1 or (j >> others.index(1) & 1) == 1 for j in range(1, 8)]
        assert H[m].isnan().tolist() == touched
    assert interaction_information(**poisoned, backend=backend)[1].isnan().all()


def test_an_image_of_nan_gives_gradients_of_nan(backend, device):
    """Every sign is unknown: none may pass for 0."""
    (image, masks), _ = Case("nan").make(device=device)
    for x in run(torch.full_like(image, NAN), masks, backend):
        # The first image's incoming gradient is -1, the second's 2.
        assert x.isnan().all()


@pytest.mark.long("triton")
def test_bitwise_repeatable(backend, device):
    tensors, _ = Case("repeated", K=5).make(torch.float32, device)
    for x, y in zip(run(*tensors, backend), run(*tensors, backend), strict=True):
        assert torch.equal(x, y)


@pytest.mark.long("triton")
def test_inputs_are_never_written_to(backend, device):
    (image, masks), _ = Case("read only").make(device=device)
    before = image.clone(), masks.clone()
    incoming = torch.tensor([1.0, -2.0], dtype=image.dtype, device=device)
    leaves = image.requires_grad_(), masks.requires_grad_()
    iio_loss(*leaves, reduction="none", backend=backend).backward(incoming)
    for function in (conditional_entropies, interaction_information, inpaint):
        function(*leaves, backend=backend).sum().backward()
    for x, y in zip((*leaves, incoming), (*before, incoming.new_tensor([1.0, -2.0])), strict=True):
        assert torch.equal(x, y)


def test_backward_twice_over_one_graph(backend, device):
    """The gradient that the forward pass computed is still there, unscaled."""
    (image, masks), _ = Case("again").make(device=device)
    masks.requires_grad_()
    loss = iio_loss(image, masks, backend=backend)
    first, second = (torch.autograd.grad(3 * loss, masks, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.long("triton")
def test_autocast_leaves_the_arithmetic_alone(backend, device):
    (image, masks), _ = Case("autocast").make(torch.float32, device)
    expected = run(image, masks, backend)

    def loss(image, masks):
        with torch.autocast(device, dtype=torch.bfloat16):
            return iio_loss(image, masks, reduction="none", backend=backend)

    for x, y in zip(results(loss, image, masks), expected, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y)
    for function in (conditional_entropies, interaction_information, inpaint):
        with torch.autocast(device, dtype=torch.bfloat16):
            got = function(image, masks, backend=backend)
        assert torch.equal(got, function(image, masks, backend=backend))


@pytest.mark.parametrize("function", [conditional_entropies, interaction_information, inpaint])
@each_dtype
def test_other_results_are_at_least_float32(function, dtype, backend, device):
    (image, masks), _ = Case("storage").make(dtype, device)
    got = function(image, masks, backend=backend)
    assert got.dtype == torch.float32
    exact = function(image.double(), masks.double(), backend=backend)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5)
