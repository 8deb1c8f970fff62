"""The gradients of slot attention: of some outputs, to some inputs, once and twice."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison
from torch import Tensor

from iio_kernels import SlotAttentionFunction, slot_attention
from iio_kernels.ops.slot_attention.common import Options
from iio_kernels.testing.slot_attention import (
    NAMES,
    SMALL,
    Case,
    literal_slot_attention,
    results,
    run,
)

OPERATION = "slot_attention"
assert_all_close = comparison(NAMES, 1e-11)


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output_alone(used, backend, device):
    """The other's incoming gradient is absent, not zero."""
    tensors, _ = Case("one output", Dv=7).make(device=device)
    gradients = []
    for function in (slot_attention, literal_slot_attention):
        leaves = [x.clone().requires_grad_() for x in tensors]
        options = {"backend": backend, "return_attention": True} if function is slot_attention else {}
        output = function(*leaves, **options)[used].square().sum()
        gradients.append(torch.autograd.grad(output, leaves, allow_unused=True, materialize_grads=True))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_gradients_of_some_inputs(wanted, backend, device):
    tensors, _ = Case("some").make(device=device)
    everything = run(tensors, backend)[2:]
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
    outputs = slot_attention(*leaves, return_attention=True, backend=backend)
    random = torch.Generator().manual_seed(1)
    incoming = [torch.randn(x.shape, generator=random).to(x) for x in outputs]
    # With v alone the attention is a constant of the reference.
    pairs = [(x, g) for x, g in zip(outputs, incoming, strict=True) if x.requires_grad]
    torch.autograd.backward(*zip(*pairs, strict=True))
    for i, leaf in enumerate(leaves):
        if i in wanted:
            torch.testing.assert_close(leaf.grad, everything[i])
        else:
            assert leaf.grad is None


@pytest.mark.long("reference", "triton")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_gradcheck(case, backend, device, interpreted):
    tensors, options = case.make(device=device, seed=3)
    tensors = [x.requires_grad_() for x in tensors]

    def function(*leaves):
        return slot_attention(*leaves, return_attention=True, backend=backend, **options)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=interpreted)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("output", ["update", "attention", "sum"])
def test_second_derivatives_are_the_references_alone(output, backend, device):
    """Also where the incoming gradient is a constant, as that of a sum: nothing passes silently for 0."""
    tensors, _ = Case("twice").make(device=device)
    q, k, v = (x.requires_grad_() for x in tensors)
    U, A = slot_attention(q, k, v, return_attention=True, backend=backend)
    loss = {"update": U.square().sum(), "attention": A.square().sum(), "sum": U.sum()}[output]
    penalty = torch.autograd.grad(loss, q, create_graph=True)[0].square().sum()
    if backend == "reference":
        penalty.backward()
        assert q.grad.abs().max() > 0
    else:
        for way in (lambda: penalty.backward(retain_graph=True), lambda: torch.autograd.grad(loss + penalty, k)):
            with pytest.raises(RuntimeError, match=r"differentiates once.*reference"):
                way()


@pytest.mark.long("triton")
def test_functional_gradient(backend, device):
    tensors, _ = Case("functional").make(device=device)

    def loss(q, k, v):
        U, A = slot_attention(q, k, v, return_attention=True, backend=backend)
        return U.square().sum() + A.square().sum()

    leaves = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for x, y in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*tensors), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_nothing_of_size_inputs_by_slots_is_kept_for_backward(backend, device):
    tensors, _ = Case("kept", batch=(2,), K=5, N=37, Dk=3, Dv=2).make(device=device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        slot_attention(*(x.requires_grad_() for x in tensors), backend=backend).sum()
    largest = max(x.numel() for x in kept)
    if backend == "reference":  # plain autograd keeps the attention
        assert largest == 2 * 5 * 37
    else:
        assert largest == 2 * 37 * 3


def test_function_is_what_the_public_call_runs(any_device):
    """`SlotAttentionFunction` by itself, with the reference's kernels."""
    tensors, _ = Case("function").make(device=any_device)
    options = Options(scale=0.25, eps=1e-8, eps_in="weights", normalize="mean", joint_heads=False)

    def function(q, k, v):
        U, _, A = SlotAttentionFunction.apply(q, k, v, None, None, None, options, True, "reference")
        return U, A

    got = results(function, tensors)
    assert_all_close(got, run(tensors, "reference"))
