"""Slot attention from inputs against projecting keys and values first."""

from __future__ import annotations

import pytest
import torch
from marks import DTYPES

from iio_kernels import slot_attention_from_inputs
from iio_kernels.testing.slot_attention import (
    CASES,
    Case,
    case_named,
    from_inputs,
    literal_slot_attention,
)

OPERATION = "slot_attention"
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def check_from_inputs(tensors, options, backend):
    """Outputs and all gradients against keys and values projected first."""

    def projected(x, q, wk, bk, wv, bv, **options):
        k, v = x @ wk.mT, x @ wv.mT
        k, v = k if bk is None else k + bk.unsqueeze(-2), v if bv is None else v + bv.unsqueeze(-2)
        k, v = (y.expand(*q.shape[:-2], *y.shape[-2:]) for y in (k, v))
        return literal_slot_attention(q, k, v, **options)

    got, expected = [], []
    for found, function in ((got, slot_attention_from_inputs), (expected, projected)):
        leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
        own = {"backend": backend, "return_attention": True} if found is got else {}
        U, A = function(*leaves, **options, **own)
        random = torch.Generator().manual_seed(5)
        incoming = [torch.randn(x.shape, generator=random).to(x) for x in (U, A)]
        given = [x for x in leaves if x is not None]
        pairs = [(x, g) for x, g in zip((U, A), incoming, strict=True) if x.requires_grad]
        gradients = [torch.zeros_like(x) for x in given]
        if pairs:
            gradients = torch.autograd.grad(
                [x for x, _ in pairs], given, [g for _, g in pairs], allow_unused=True, materialize_grads=True
            )
        found += [U.detach(), A.detach(), *gradients]
    for x, y in zip(got, expected, strict=True):
        scale = max(y.abs().max().item(), 1) if y.numel() else 1
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11 * scale)


@each_case
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_from_inputs_equals_projecting_first(case, biases, backend, device):
    check_from_inputs(*from_inputs(case, device, biases), backend)


def test_from_inputs_with_heads_of_one_input(backend, device):
    """x without a head dimension of its own, a weight for each head."""
    case = Case("heads", batch=(2, 3), N=13)
    for joint_heads in (False, True):
        (x, *others), options = from_inputs(case, device, joint_heads=True)
        check_from_inputs((x[:, :1], *others), {**options, "joint_heads": joint_heads}, backend)


def test_from_inputs_never_reads_what_is_masked(backend, device):
    tensors, options = from_inputs(case_named("both masks"), device)
    filled = [x.clone() for x in tensors]
    filled[0][~options["input_mask"]] = float("nan")
    filled[1][~options["slot_mask"]] = float("nan")
    results = []
    for inputs in (tensors, filled):
        leaves = [x.clone().requires_grad_() for x in inputs]
        U = slot_attention_from_inputs(*leaves, backend=backend, **options)
        results.append((U.detach(), *torch.autograd.grad(U.square().sum(), leaves)))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_from_inputs_scales_by_the_projected_width(backend, device):
    tensors, _ = from_inputs(Case("scale", Dk=9), device)
    torch.testing.assert_close(
        slot_attention_from_inputs(*tensors, backend=backend),
        slot_attention_from_inputs(*tensors, scale=1 / 3, backend=backend),
    )


def test_from_inputs_keeps_dtypes(backend, device):
    tensors, _ = from_inputs(Case("dtypes"), device)
    for dtype in DTYPES:
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        U, A = slot_attention_from_inputs(*leaves, return_attention=True, backend=backend)
        assert U.dtype == A.dtype == dtype
        assert [x.dtype for x in torch.autograd.grad(U.sum(), leaves)] == [dtype] * 6
        exact = slot_attention_from_inputs(*(x.detach().double() for x in leaves), backend="reference")
        assert (U.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()
