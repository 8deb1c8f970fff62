"""Derivatives of the inpainting functions, and tensors of any strides."""

from __future__ import annotations

import pytest
import torch

from iio_kernels import IIOLossFunction, conditional_entropies, iio_loss, inpaint
from iio_kernels.ops.iio_loss.common import Inpainter
from iio_kernels.testing.iio_loss import Case, assert_all_close, results, run
from iio_kernels.testing.tensors import strided

OPERATION = "iio_loss"
DEFAULTS = Inpainter(sigma=5.0, kernel_size=11, repeats=2, eps=1e-8)
NAN = float("nan")


@pytest.mark.long("reference", "triton")
@pytest.mark.parametrize("K", [2, 3, 4])
def test_gradcheck(K, backend, device, interpreted):
    case = Case("small", B=2, C=2, K=K, H=4, W=5, options={"sigma": 1.0, "kernel_size": 3, "eps": 1e-3})
    tensors, options = case.make(device=device)
    leaves = [x.requires_grad_() for x in tensors]

    def function(image, masks):
        return iio_loss(image, masks, reduction="none", backend=backend, **options)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=interpreted)
    if backend == "reference" and K < 4:
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("wanted", ["image", "masks"])
def test_gradient_of_one_input_alone(wanted, backend, device):
    (image, masks), _ = Case("one").make(device=device)
    _, dimage, dmasks = run(image, masks, backend, torch.ones(2, dtype=image.dtype, device=device))
    leaf = (image if wanted == "image" else masks).requires_grad_()
    iio_loss(image, masks, reduction="sum", backend=backend).backward()
    torch.testing.assert_close(leaf.grad, dimage if wanted == "image" else dmasks)
    assert (masks if wanted == "image" else image).grad is None


def test_a_loss_without_gradients(backend, device):
    (image, masks), _ = Case("inference").make(device=device)
    plain = iio_loss(image, masks, backend=backend)
    assert not plain.requires_grad
    with torch.no_grad():
        assert torch.equal(iio_loss(image, masks.requires_grad_(), backend=backend), plain)


@pytest.mark.parametrize("function", [iio_loss, conditional_entropies, inpaint])
def test_second_derivatives_are_the_references_alone(function, backend, device):
    """However they are asked for: nothing passes silently for 0."""
    (image, masks), _ = Case("twice").make(device=device)
    masks.requires_grad_()

    def loss(masks):
        return function(image, masks, backend=backend).square().mean()

    def penalty():
        return torch.autograd.grad(loss(masks), masks, create_graph=True)[0].square().sum()

    ways = (
        lambda: penalty().backward(),
        lambda: penalty().backward(inputs=[masks]),
        lambda: torch.autograd.grad(loss(masks) + penalty(), masks),
        lambda: torch.autograd.functional.hvp(loss, masks, torch.ones_like(masks)),
    )
    if backend == "reference":
        penalty().backward()
        assert masks.grad.abs().max() > 0
    else:
        for way in ways:
            with pytest.raises(RuntimeError, match=r"differentiates once.*reference"):
                way()


@pytest.mark.long("triton")
@pytest.mark.parametrize("function", [iio_loss, conditional_entropies, inpaint])
def test_functional_gradient(function, backend, device):
    if backend == "written_out" and function is not iio_loss:
        pytest.skip("its gradient is autograd's, inside a Function")
    (image, masks), _ = Case("functional").make(device=device)

    def loss(image, masks):
        return function(image, masks, backend=backend).square().mean()

    expected = torch.autograd.grad(loss(image.requires_grad_(), masks.requires_grad_()), (image, masks))
    got = torch.func.grad(loss, argnums=(0, 1))(image.detach(), masks.detach())
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.long("triton")
@pytest.mark.parametrize("how", ["transposed", "channels last", "sliced", "expanded"])
def test_strided_inputs(how, backend, device):
    (image, masks), _ = Case("strided", B=3).make(device=device)
    views = [strided(x, how).detach() for x in (image, masks)]
    assert not any(x.is_contiguous() for x in views)
    expected = run(*(x.clone(memory_format=torch.contiguous_format) for x in views), backend)
    leaves = [x.requires_grad_() for x in views]
    losses = iio_loss(*leaves, reduction="none", backend=backend)
    gradients = torch.autograd.grad(losses, leaves, torch.linspace(-1, 2, 3).to(losses))
    assert_all_close((losses.detach(), *gradients), expected)


@pytest.mark.long("triton")
@pytest.mark.parametrize("how", ["sliced", "expanded", "stride 0 in one", "reversed"])
def test_strided_incoming_gradients(how, backend, device):
    (image, masks), _ = Case("strided", B=3).make(device=device)
    values = torch.tensor([0.5, NAN, -1.0, NAN, 2.0, NAN], dtype=image.dtype, device=device)
    incoming = {
        "sliced": values[::2],
        "expanded": values[0].expand(3),
        "stride 0 in one": values[:1].expand(3),
        "reversed": torch.stack([values, values], 1)[::2, 0].flip(0),
    }[how]
    assert_all_close(run(image, masks, backend, incoming), run(image, masks, backend, incoming.contiguous()))
    # And they are the gradients of one image each, scaled.
    loss, dimage, dmasks = run(image, masks, backend, torch.ones_like(incoming))
    scale = incoming.view(3, 1, 1, 1)
    assert_all_close(run(image, masks, backend, incoming), (loss, scale * dimage, scale * dmasks))


def test_function_by_itself(any_device):
    """`IIOLossFunction` with the reference's kernels: the gradient as written out, against plain autograd."""
    tensors, _ = Case("function", K=5).make(device=any_device)
    options = None, None, DEFAULTS, (True, True), "reference"
    got = results(lambda image, masks: IIOLossFunction.apply(image, masks, *options)[0], *tensors)
    assert_all_close(got, run(*tensors, "reference"))
