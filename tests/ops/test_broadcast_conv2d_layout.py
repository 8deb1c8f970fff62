"""The broadcast convolution of tensors and gradients in any strides, and the memory format of its result."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison
from marks import DTYPES

from iio_kernels import broadcast_conv2d
from iio_kernels.testing.broadcast_conv2d import (
    NAMES,
    STRIDED_CONV,
    Case,
    random_like,
    run,
)
from iio_kernels.testing.tensors import strided

OPERATION = "broadcast_conv2d"
each_kind = pytest.mark.parametrize("kind", [Case("conv"), STRIDED_CONV], ids=lambda case: case.name)
NAN = float("nan")
assert_all_close = comparison(NAMES, 1e-12)


STRIDES = ["transposed", "channels first", "channels last", "sliced", "expanded", "expanded over pixels"]
STRIDES += ["of one number"]
each_stride = pytest.mark.parametrize("how", STRIDES)


@pytest.mark.long("triton")
@each_stride
@each_kind
def test_strided_inputs(how, kind, backend, device):
    (z, weight, position_map), options = kind.make(device=device)
    views = (
        strided(z, "transposed" if how.startswith("channels") else how),
        *(strided(x, how) for x in (weight, position_map)),
    )
    expected = run([x.clone(memory_format=torch.contiguous_format) for x in views], backend, **options)
    leaves = [x.detach().requires_grad_() for x in views]
    out = broadcast_conv2d(*leaves, backend=backend, **options)
    assert_all_close((out, *torch.autograd.grad(out, leaves, random_like(out))), expected)


@pytest.mark.long("triton")
@each_stride
@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_strided_incoming_gradients(how, kind, dtype, backend, device):
    tensors, options = kind.make(dtype, device)
    incoming = strided(random_like(run(tensors, backend, **options)[0]), how)
    expected = run(tensors, backend, incoming.clone(memory_format=torch.contiguous_format), **options)
    for x, y in zip(run(tensors, backend, incoming, **options), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.long("triton")
def test_sum_sends_gradients_of_stride_zero(backend, device):
    tensors, options = Case("stride 0").make(device=device)
    expected = run(tensors, backend, torch.ones(2, 3, 8, 9, 7).to(tensors[0]), **options)
    leaves = [x.requires_grad_() for x in tensors]
    broadcast_conv2d(*leaves, backend=backend, **options).sum().backward()
    for leaf, gradient in zip(leaves, expected[1:], strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@each_kind
def test_the_result_is_channels_last(kind, dtype, backend, device):
    tensors, options = kind.make(dtype, device)
    out = broadcast_conv2d(*tensors, backend=backend, **options)
    assert out.shape == (2, 3, *kind.result)
    assert out.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_offsets_beyond_32_bits(backend, device):
    """A gradient in memory that is never touched, so that it costs nothing."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    tensors, options = Case("far", (2,), O=2, size=(3, 4), kernel=(3, 3), padding=(1, 1)).make(torch.bfloat16, device)
    incoming = random_like(broadcast_conv2d(*tensors, **options))
    try:
        memory = torch.empty(2**31 + incoming[0].numel(), dtype=incoming.dtype, device=device)
    except RuntimeError:
        pytest.skip("no 4 GiB of addresses")
    far = memory.as_strided(incoming.shape, (2**31, 1, 8, 2)).copy_(incoming)
    for x, y in zip(run(tensors, backend, far, **options), run(tensors, backend, incoming, **options), strict=True):
        assert torch.equal(x, y)
