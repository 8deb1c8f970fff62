"""Slot composition of tensors of any strides."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison
from marks import DTYPES, NAMESPACES, kernels_alone
from torch import Tensor

from iio_kernels import compose, composition_error
from iio_kernels.testing.compose import NAMES, Case, composed, run
from iio_kernels.testing.tensors import random_like, strided

OPERATION = "compose"
assert_all_close = comparison(NAMES, 1e-12)
NAN = float("nan")


STRIDES = ["transposed", "channels last", "channels last, sliced", "slots last", "sliced", "planes sliced"]
STRIDES += ["expanded", "expanded over pixels", "of one number"]
each_stride = pytest.mark.parametrize("how", STRIDES)


@pytest.mark.long("triton")
@each_stride
@pytest.mark.parametrize("C", [3, 2])
def test_strided_inputs(how, C, backend, device):
    tensors = Case("strided", B=3, C=C).make(device=device)[0]
    views = [strided(x, how) for x in tensors]
    assert not any(x.is_contiguous() for x in views)
    expected = run(*(x.clone(memory_format=torch.contiguous_format) for x in views), backend)
    leaves = [x.detach().requires_grad_() for x in views]
    outputs = composition_error(*leaves, reduction="none", return_masks=True, backend=backend)
    assert_all_close((*outputs, *torch.autograd.grad(outputs, leaves, random_like(*outputs))), expected)


@pytest.mark.long("triton")
@each_stride
@pytest.mark.parametrize("channels_last", [False, True])
def test_strided_incoming_gradients(how, channels_last, backend, device):
    image, decoded = Case("strided", B=3, channels_last=channels_last).make(device=device)[0]
    for ours in (run, composed):
        outputs = ours(image, decoded, backend)[:2]
        incoming = [strided(x, how) if x.dim() == 4 else x[:1].expand(3) for x in random_like(*outputs)]
        assert not any(x.is_contiguous() for x in incoming)
        got = ours(image, decoded, backend, incoming)
        assert_all_close(got, ours(image, decoded, backend, [x.contiguous() for x in incoming]))


@pytest.mark.long("triton")
def test_sum_sends_gradients_of_stride_zero(backend, device):
    image, decoded = Case("stride 0").make(device=device)[0]
    expected = composed(image, decoded, backend, [torch.ones_like(x) for x in compose(decoded)])
    leaf = decoded.clone().requires_grad_()
    reconstruction, masks = compose(leaf, backend=backend)
    (reconstruction.sum() + masks.sum()).backward()
    torch.testing.assert_close(leaf.grad, expected[3])


@kernels_alone
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_gradient_has_decodeds_layout(dtype, C, channels_last, backend, device):
    image, decoded = Case("layout", C=C, channels_last=channels_last).make(dtype, device)[0]
    gradient = run(image, decoded, backend)[3]
    assert gradient.dtype == dtype
    assert gradient.stride() == decoded.stride()


def test_channels_last_images_of_all_slots(backend, device):
    """As a decoder makes them: (B * K, C + 1, H, W) in channels-last memory, then seen as (B, K, C + 1, H, W)."""
    image, decoded = Case("decoder").make(torch.float32, device)[0]
    flat = decoded.flatten(0, 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    error = composition_error(image, flat.unflatten(0, (2, 4)), backend=backend)
    (gradient,) = torch.autograd.grad(error, flat)
    leaf = decoded.requires_grad_()
    (expected,) = torch.autograd.grad(composition_error(image, leaf, backend=backend), leaf)
    torch.testing.assert_close(gradient, expected.flatten(0, 1))
    if backend in NAMESPACES:
        assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("far", ["slots", "channels"])
def test_offsets_beyond_32_bits(far, backend, device):
    """In memory that is never touched, so that it costs nothing."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    image, decoded = Case("far", B=1, K=2, C=2, H=3, W=5).make(torch.bfloat16, device)[0]
    x = decoded if far == "slots" else image
    try:
        memory = torch.empty(2**31 + x[0, 0].numel(), dtype=x.dtype, device=device)
    except RuntimeError:
        pytest.skip("no 4 GiB of addresses")
    view = memory.as_strided(x.shape, (0, 2**31, *x.stride()[2:])).copy_(x)
    inputs = (image, view) if far == "slots" else (view, decoded)
    assert_all_close(run_in_place(*inputs, backend), run(image, decoded, backend))


def run_in_place(image, decoded, backend: str) -> tuple[Tensor, ...]:
    """`run` without a copy of its inputs."""
    leaves = [x.detach().requires_grad_() for x in (image, decoded)]
    outputs = composition_error(*leaves, reduction="none", return_masks=True, backend=backend)
    return *outputs, *torch.autograd.grad(outputs, leaves, random_like(*outputs))
