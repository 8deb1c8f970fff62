"""Derivatives of the spatial mixture, and tensors of any strides."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison
from marks import NAMESPACES, kernels_alone

from iio_kernels import spatial_mixture
from iio_kernels.testing.spatial_mixture import NAMES, Case, literally, results
from iio_kernels.testing.tensors import random_like, strided

OPERATION = "spatial_mixture"
assert_all_close = comparison(NAMES, 1e-12)


# --- derivatives ------------------------------------------------------------------------------------------


def test_d_decoded_is_the_gradient_of_the_negative_log_likelihood(backend, device):
    """And so serves the decoder's own backward pass; it and its views are constants, as leave_one_out is."""
    (image, _), _ = Case("gradient", H=5, W=7).make(device=device)
    for channels_last in (False, True):
        z = Case("gradient", H=5, W=7, channels_last=channels_last).make(device=device)[0][1].requires_grad_()
        decoded = z * 2
        mixture = spatial_mixture(image, decoded, backend=backend)
        (expected,) = torch.autograd.grad(-mixture.log_likelihood.sum(), z, retain_graph=True)
        (got,) = torch.autograd.grad(decoded, z, mixture.d_decoded, retain_graph=True)
        torch.testing.assert_close(got, expected)
        assert torch.equal(mixture.d_means, mixture.d_decoded[:, :, :3])
        assert torch.equal(mixture.d_logits, mixture.d_decoded[:, :, 3])
        differentiable = [name for name, x in mixture._asdict().items() if x.requires_grad]
        assert differentiable == ["log_likelihood", "masks", "posterior"]
        if backend in NAMESPACES:
            assert mixture.d_decoded.stride() == z.stride()


def test_backward_runs_again_and_of_each_output_alone(backend, device):
    tensors = [x.requires_grad_() for x in Case("again", H=5, W=7).make(device=device)[0]]
    outputs = spatial_mixture(*tensors, backend=backend)[:3]
    incoming = random_like(*outputs)
    first, again = (torch.autograd.grad(outputs, tensors, incoming, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again))
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    alone = [torch.autograd.grad(x, tensors, d, **options) for x, d in zip(outputs, incoming, strict=True)]
    for total, parts in zip(first, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(sum(parts), total)
    for i, x in enumerate(tensors):
        torch.testing.assert_close(torch.autograd.grad(outputs, x, incoming, retain_graph=True)[0], first[i])


@pytest.mark.long("reference", "triton")
def test_gradcheck(backend, device, interpreted):
    leaves = [x.requires_grad_() for x in Case("small", K=3, C=2, H=1, W=3).make(device=device)[0]]

    def function(image, decoded):
        return spatial_mixture(image, decoded, sigma=0.5, backend=backend)[:3]

    assert torch.autograd.gradcheck(function, leaves, fast_mode=interpreted)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, leaves)


def test_second_derivatives_are_the_references_alone(backend, device):
    image, decoded = (x.requires_grad_() for x in Case("twice", H=2, W=3).make(device=device)[0])
    mixture = spatial_mixture(image, decoded, backend=backend)
    for loss in (mixture.log_likelihood.sum(), mixture.masks.square().sum(), mixture.posterior.square().sum()):
        penalty = torch.autograd.grad(loss, decoded, create_graph=True)[0].square().sum()
        for x in (image, decoded):
            if backend == "reference":
                torch.autograd.grad(penalty, x, retain_graph=True, allow_unused=True)
            else:
                with pytest.raises(RuntimeError, match=r"differentiates once.*reference"):
                    torch.autograd.grad(penalty, x, retain_graph=True)


@pytest.mark.long("triton")
def test_functional_gradient(backend, device):
    tensors = Case("functional", H=5, W=7).make(device=device)[0]

    def loss(image, decoded):
        log_likelihood, masks, posterior, *_ = spatial_mixture(image, decoded, backend=backend)
        return log_likelihood.sum() + masks.square().sum() + posterior.square().sum()

    leaves = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for x, y in zip(torch.func.grad(loss, argnums=(0, 1))(*tensors), expected, strict=True):
        torch.testing.assert_close(x, y)


# --- layout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["transposed", "channels last, sliced", "slots last", "planes sliced", "expanded"])
def test_strided_inputs_and_incoming_gradients(how, backend, device):
    image, decoded = (strided(x, how) for x in Case("strided", B=3, H=5, W=7).make(device=device)[0])
    plain = [x.clone(memory_format=torch.contiguous_format) for x in (image, decoded)]
    expected = results(spatial_mixture, *plain, backend=backend)
    assert_all_close(results(spatial_mixture, image, decoded, copy=False, backend=backend), expected)
    # (B, H, W) has no channels to be strided by: it is expanded over images or not.
    incoming = [x[:1].expand_as(x) if x.dim() == 3 else strided(x, how) for x in random_like(*expected[:3])]
    assert not any(x.is_contiguous() for x in incoming)
    contiguous = results(spatial_mixture, *plain, [x.contiguous() for x in incoming], backend=backend)
    assert_all_close(results(spatial_mixture, *plain, incoming, backend=backend), contiguous)


@pytest.mark.long("triton")
def test_sum_sends_gradients_of_stride_zero(backend, device):
    image, decoded = Case("stride 0", H=5, W=7).make(device=device)[0]
    ones = [torch.ones_like(x) for x in literally(image, decoded)[:3]]
    expected = literally(image, decoded, ones)
    leaf = decoded.requires_grad_()
    sum(x.sum() for x in spatial_mixture(image, leaf, backend=backend)[:3]).backward()
    torch.testing.assert_close(leaf.grad, expected[-1])


@pytest.mark.long("triton")
@kernels_alone
def test_repeats_and_layouts_change_no_bit(backend, device):
    plain, last = (Case("bits", K=5, H=9, W=35, channels_last=x).make(torch.float32, device)[0] for x in (False, True))
    first = results(spatial_mixture, *plain, backend=backend)
    for tensors in (plain, last):
        assert all(map(torch.equal, results(spatial_mixture, *tensors, backend=backend), first))
