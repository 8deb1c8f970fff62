"""Slot attention where numbers are extreme, absent or NaN, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison
from marks import each_dtype
from torch import Tensor

from iio_kernels import slot_attention
from iio_kernels.testing.slot_attention import (
    NAMES,
    Case,
    case_named,
    results,
    run,
)

OPERATION = "slot_attention"
assert_all_close = comparison(NAMES, 1e-11)


@pytest.mark.parametrize("name", ["no inputs", "no input", "no slot, zero eps", "slot mask, zero eps"])
def test_a_slot_without_anything_is_zero_with_zero_gradient(name, backend, device):
    case = case_named(name)
    tensors, options = case.make(device=device)
    U, _, dq, dk, dv = run(tensors, backend, **options)
    lonely = torch.ones(U.shape[:-1], dtype=torch.bool, device=device)
    if name == "slot mask, zero eps":
        lonely = ~options["slot_mask"]
        assert (U[~lonely] != 0).all()
    assert (U[lonely] == 0).all()
    assert (dq[lonely] == 0).all()
    assert all(x.isfinite().all() for x in (U, dq, dk, dv))


def test_a_slot_that_attention_underflows_for_is_zero(backend, device):
    """Without eps, and without a mask: the softmax itself is exactly 0 for the second slot."""
    q = torch.tensor([[[1.0], [-1.0]]], device=device)
    k, v = torch.full((1, 5, 1), 1e3, device=device), torch.randn(1, 5, 3, device=device)
    U, A, *gradients = run((q, k, v), backend, eps=0)
    assert (A[0, 1] == 0).all()
    assert (U[0, 1] == 0).all()
    torch.testing.assert_close(U[0, 0], v[0].mean(0))
    assert all(x.isfinite().all() for x in gradients)


@each_dtype
def test_large_logits_do_not_overflow(dtype, backend, device):
    (q, k, v), _ = Case("large").make(dtype, device)
    got = run((100 * q, 100 * k, v), backend)
    assert all(x.isfinite().all() for x in got[:2])
    assert all(not x.isnan().any() for x in got)
    torch.testing.assert_close(got[1].float().sum(1), torch.ones(2, 37, device=device), atol=1e-2, rtol=0)


def test_default_eps_survives_half_precision(backend, device):
    """1e-8 is 0 in float16. Here it alone decides: no input chooses the second slot, which takes the mean."""
    q = torch.tensor([[[1.0], [-1.0]]], dtype=torch.float16, device=device)
    k = torch.full((1, 5, 1), 1e3, dtype=torch.float16, device=device)
    v = torch.randn(1, 5, 3, device=device).half()
    U = slot_attention(q, k, v, backend=backend)
    torch.testing.assert_close(U[0, 1], v[0].float().mean(0).half())


@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_nan_goes_to_everything_that_depends_on_it(which, backend, device):
    tensors, _ = Case("nan", batch=(2,)).make(device=device)
    clean = run(tensors, backend)
    poisoned = [x.clone() for x in tensors]
    poisoned[which][1, 2, 0] = float("nan")
    U, A, dq, dk, dv = run(poisoned, backend)
    assert U[1].isnan().any(-1).all()  # each slot: through the softmax, or the mean of v
    if which < 2:
        assert A[1].isnan().any(-1).all()
    for gradient in (dq, dk):
        assert gradient[1].isnan().any()
    # The other image knows nothing of it.
    assert_all_close([x[0] for x in (U, A, dq, dk, dv)], [x[0] for x in clean])


@pytest.mark.long("triton")
def test_bitwise_repeatable(backend, device):
    tensors, options = case_named("both masks").make(torch.float32, device)
    first = run(tensors, backend, **options)
    for x, y in zip(run(tensors, backend, **options), first, strict=True):
        assert torch.equal(x, y)


@pytest.mark.long("triton")
def test_inputs_are_never_written_to(backend, device):
    for name in ("plain", "both masks", "joint heads, masks"):
        tensors, options = case_named(name).make(device=device)
        inputs = [x.requires_grad_() for x in tensors]
        masks = [x for x in options.values() if isinstance(x, Tensor)]
        before = [x.detach().clone() for x in (*inputs, *masks)]
        U, A = slot_attention(*inputs, return_attention=True, backend=backend, **options)
        incoming = torch.randn_like(U), torch.randn_like(A)
        gradients_before = [x.clone() for x in incoming]
        torch.autograd.backward((U, A), incoming)
        for x, y in zip((*inputs, *masks, *incoming), (*before, *gradients_before), strict=True):
            assert torch.equal(x, y)


@pytest.mark.long("triton")
def test_autocast_leaves_the_arithmetic_alone(backend, device):
    tensors, _ = Case("autocast").make(torch.float32, device)
    expected = run(tensors, backend)

    def attend(q, k, v):
        with torch.autocast(device, dtype=torch.bfloat16):
            return slot_attention(q, k, v, return_attention=True, backend=backend)

    got = results(attend, tensors)
    if backend != "reference":  # plain autograd's own steps obey an autocast around backward
        with torch.autocast(device, dtype=torch.bfloat16):
            assert all(map(torch.equal, run(tensors, backend), expected))
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y)
