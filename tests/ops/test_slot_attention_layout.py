"""Slot attention of operands and gradients in any strides."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison

from iio_kernels import slot_attention
from iio_kernels.testing.slot_attention import NAMES, Case, run
from iio_kernels.testing.tensors import strided

OPERATION = "slot_attention"
assert_all_close = comparison(NAMES, 1e-11)


@pytest.mark.long("triton")
@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded", "heads"])
@pytest.mark.parametrize("joint_heads", [False, True])
def test_strided_inputs(how, joint_heads, backend, device):
    tensors, _ = Case("strided", batch=(3,), Dv=6).make(device=device)
    operands = [strided(x, how) for x in tensors]
    assert not any(x.is_contiguous() for x in operands)
    leaves = [x.clone(memory_format=torch.contiguous_format) for x in operands]
    expected = run(leaves, backend, joint_heads=joint_heads)
    views = [x.detach().requires_grad_() for x in operands]
    U, A = slot_attention(*views, joint_heads=joint_heads, return_attention=True, backend=backend)
    random = torch.Generator().manual_seed(1)
    incoming = [torch.randn(x.shape, generator=random).to(x) for x in (U, A)]
    assert_all_close((U, A, *torch.autograd.grad((U, A), views, incoming)), expected)


@pytest.mark.long("triton")
@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
def test_strided_incoming_gradients(how, backend, device):
    tensors, _ = Case("strided", batch=(3,), Dv=6).make(device=device)
    dense = [torch.randn(3, 4, 6, device=device), torch.randn(3, 4, 37, device=device)]
    incoming = [strided(x.double(), how) for x in dense]
    assert not any(x.is_contiguous() for x in incoming)
    got = run(tensors, backend, incoming)
    assert_all_close(got, run(tensors, backend, [x.contiguous() for x in incoming]))


@pytest.mark.long("triton")
def test_sum_sends_gradients_of_stride_zero(backend, device):
    tensors, _ = Case("stride 0", Dv=6).make(device=device)
    expected = run(
        tensors, backend, [torch.ones(2, 4, 6).double().to(device), torch.ones(2, 4, 37).double().to(device)]
    )
    leaves = [x.clone().requires_grad_() for x in tensors]
    U, A = slot_attention(*leaves, return_attention=True, backend=backend)
    (U.sum() + A.sum()).backward()
    assert_all_close((U, A, *(x.grad for x in leaves)), expected)


def test_one_tensor_for_keys_and_values(backend, device):
    (q, k, _), _ = Case("shared").make(device=device)
    expected = run((q, k, k), backend)
    shared = k.clone().requires_grad_()
    U, A = slot_attention(q, shared, shared, return_attention=True, backend=backend)
    random = torch.Generator().manual_seed(1)
    torch.autograd.backward((U, A), [torch.randn(x.shape, generator=random).to(x) for x in (U, A)])
    torch.testing.assert_close(shared.grad, expected[3] + expected[4])
