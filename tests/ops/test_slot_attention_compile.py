"""Slot attention under torch.compile."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison
from marks import compiles

from iio_kernels import slot_attention
from iio_kernels.testing.slot_attention import (
    NAMES,
    Case,
)

OPERATION = "slot_attention"
assert_all_close = comparison(NAMES, 1e-11)


def _compiled_sum(compiled, q, k, v, masks):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    U, A = compiled(*leaves, *masks)
    return U, A, *torch.autograd.grad((U * U).sum() + (A * A).sum(), leaves)


@pytest.mark.long("reference", "triton", "written_out")
@compiles
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_compiles_as_one_graph(dynamic, masked, backend, device):
    def function(q, k, v, slot_mask=None, input_mask=None):
        return slot_attention(
            q, k, v, slot_mask=slot_mask, input_mask=input_mask, return_attention=True, backend=backend
        )

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch, N in ((2, 37), (3, 50)) if dynamic else ((2, 37),):
        case = Case("compiled", (batch,), N=N, slots="some" if masked else "all", inputs="some" if masked else "all")
        tensors, masks = case.make(device=device)
        got = _compiled_sum(compiled, *tensors, masks.values())
        assert_all_close(got, _compiled_sum(function, *tensors, masks.values()))


@compiles
def test_compiles_with_one_tensor_for_keys_and_values(backend, device):
    (q, k, _), _ = Case("compiled").make(device=device)
    torch.compiler.reset()
    k.requires_grad_()
    compiled = torch.compile(lambda q, k: slot_attention(q, k, k, backend=backend), backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(compiled(q, k).square().sum(), k)
    (expected,) = torch.autograd.grad(slot_attention(q, k, k, backend=backend).square().sum(), k)
    torch.testing.assert_close(got, expected)


@compiles
def test_compiles_with_an_option_that_changes(backend, device):
    (q, k, v), _ = Case("compiled").make(device=device)
    torch.compiler.reset()

    def function(scale):
        return slot_attention(q, k, v, scale=scale, backend=backend)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for scale in (0.5, 0.6, 0.7):
        torch.testing.assert_close(compiled(scale), function(scale))
