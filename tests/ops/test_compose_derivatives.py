"""Derivatives of slot composition."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison

from iio_kernels import compose, composition_error
from iio_kernels.testing.compose import (
    NAMES,
    Case,
)

OPERATION = "compose"
assert_all_close = comparison(NAMES, 1e-12)


@pytest.mark.long("reference", "triton")
@pytest.mark.parametrize("K", [1, 2, 4])
def test_gradcheck(K, backend, device, interpreted):
    leaves = [x.requires_grad_() for x in Case("small", K=K, C=2, H=2, W=3).make(device=device)[0]]

    def error(image, decoded):
        return composition_error(image, decoded, reduction="none", return_masks=True, backend=backend)

    assert torch.autograd.gradcheck(error, leaves, fast_mode=interpreted)
    assert torch.autograd.gradcheck(lambda x: compose(x, backend=backend), leaves[1:], fast_mode=interpreted)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(error, leaves)


@pytest.mark.parametrize("output", ["error", "masks", "reconstruction", "sum"])
def test_second_derivatives_are_the_references_alone(output, backend, device):
    """Also where the incoming gradient is a constant, as that of a sum: nothing passes silently for 0."""
    image, decoded = (x.requires_grad_() for x in Case("twice").make(device=device)[0])
    error, masks = composition_error(image, decoded, return_masks=True, backend=backend)
    reconstruction, _ = compose(decoded, backend=backend)
    loss = {
        "error": error,
        "masks": masks.square().sum(),
        "reconstruction": reconstruction.square().sum(),
        "sum": reconstruction.sum(),
    }[output]
    penalty = torch.autograd.grad(loss, decoded, create_graph=True)[0].square().sum()
    pairs = [(penalty, decoded), (loss + penalty, decoded)]
    if output == "error":  # of an input that the gradient in question is not to
        pairs.append((penalty, image))
    for y, x in pairs:
        if backend == "reference":
            assert torch.autograd.grad(y, x, retain_graph=True)[0].abs().max() > 0
        else:
            with pytest.raises(RuntimeError, match=r"differentiates once.*reference"):
                torch.autograd.grad(y, x, retain_graph=True)


@pytest.mark.long("triton")
def test_functional_gradient(backend, device):
    image, decoded = Case("functional").make(device=device)[0]

    def loss(image, decoded):
        error, masks = composition_error(image, decoded, return_masks=True, backend=backend)
        return error + masks.square().sum() + compose(decoded, backend=backend)[0].square().sum()

    leaves = [x.clone().requires_grad_() for x in (image, decoded)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for x, y in zip(torch.func.grad(loss, argnums=(0, 1))(image, decoded), expected, strict=True):
        torch.testing.assert_close(x, y)
