"""The gradients of the Slot Attention module: of some outputs, to some inputs, once and twice."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison
from marks import kernels_alone
from torch import Tensor

import iio_kernels.ops.slot_attention_module.api as operation
from iio_kernels import IterationsFunction, SlotAttentionWeights, slot_attention_module
from iio_kernels.testing.slot_attention_module import (
    INPUTS,
    NAMES,
    SMALL,
    Case,
    literal_slot_attention_module,
    literally,
    random_like,
    results,
    run,
)

OPERATION = "slot_attention_module"
assert_all_close = comparison(NAMES, 1e-11)


@pytest.mark.parametrize("used", ["slots", "attention"])
def test_gradient_of_one_output_alone(used, backend, device):
    """The other's incoming gradient is absent, not zero."""
    arguments, _ = Case("one output").make(device=device)
    at = ("slots", "attention").index(used)

    def ours(*arguments):
        return slot_attention_module(*arguments, return_attention=True, backend=backend)[at : at + 1]

    def formula(*arguments):
        return literal_slot_attention_module(*arguments)[at : at + 1]

    for x, y in zip(results(ours, *arguments), results(formula, *arguments), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wanted", ["x", "slots", "wk", "weight_ih", "b2"])
def test_gradient_of_one_input_alone(wanted, backend, device):
    (x, slots, weights, T), _ = Case("one input").make(device=device)
    expected = dict(zip(NAMES, literally((x, slots, weights, T)), strict=True))[f"d{wanted}"]
    tensors = {"x": x, "slots": slots, **weights._asdict()}
    leaf = tensors[wanted].requires_grad_()
    out, attention = slot_attention_module(x, slots, weights, T, return_attention=True, backend=backend)
    torch.autograd.backward((out, attention), random_like(out, attention))
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-10, atol=1e-10)
    assert all(y.grad is None for name, y in tensors.items() if name != wanted)


def test_results_without_gradients(backend, device):
    arguments, _ = Case("inference").make(device=device)
    out = slot_attention_module(*arguments, backend=backend)
    assert not out.requires_grad
    with torch.no_grad():
        arguments[0].requires_grad_()
        assert torch.equal(slot_attention_module(*arguments, backend=backend), out)


@pytest.mark.long("reference", "triton")
def test_gradcheck(backend, device, interpreted):
    (x, slots, weights, T), _ = SMALL.make(device=device)
    leaves = [y.requires_grad_() for y in (x, slots, *weights)]

    def function(x, slots, *weights):
        weights = SlotAttentionWeights(*weights)
        return slot_attention_module(x, slots, weights, T, return_attention=True, backend=backend)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=interpreted)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("output", ["slots", "attention", "sum"])
@pytest.mark.parametrize("to", ["x", "slots", "wq", "bias_ih", "b2"])
def test_second_derivatives_are_the_references_alone(output, to, backend, device):
    """Also where the incoming gradient is a constant, as that of a sum: nothing passes silently for 0."""
    (x, slots, weights, T), _ = SMALL.make(device=device)
    leaves = dict(zip(INPUTS, (y.requires_grad_() for y in (x, slots, *weights)), strict=True))
    out, attention = slot_attention_module(x, slots, weights, T, return_attention=True, backend=backend)
    loss = {"slots": out.square().sum(), "attention": attention.square().sum(), "sum": out.sum()}[output]
    penalty = torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()
    if backend == "reference":
        (second,) = torch.autograd.grad(penalty, leaves[to], allow_unused=True, materialize_grads=True)
        assert (second.abs().max() > 0) == (to != "b2" or T > 1)
    else:
        with pytest.raises(RuntimeError, match=r"differentiates once.*reference"):
            torch.autograd.grad(penalty, leaves[to])


@pytest.mark.long("triton")
def test_functional_gradient(backend, device):
    (x, slots, weights, T), _ = Case("functional").make(device=device)

    def loss(x, slots, wv):
        weights_ = weights._replace(wv=wv)
        out, attention = slot_attention_module(x, slots, weights_, T, return_attention=True, backend=backend)
        return out.square().sum() + attention.square().sum()

    leaves = [y.clone().requires_grad_() for y in (x, slots, weights.wv)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.func.grad(loss, argnums=(0, 1, 2))(x, slots, weights.wv)
    torch.testing.assert_close(got, expected)


def test_function_by_itself(any_device):
    """`IterationsFunction` with the reference's kernels: the gradient as written out, against plain autograd."""
    (x, slots, weights, T), _ = Case("function").make(device=any_device)

    def function(x, slots, weights, T):
        maps = operation._maps(weights, len(weights.wq) ** -0.5)
        return IterationsFunction.apply(x, slots, T, 1e-8, 1e-5, True, "reference", *maps)[:2]

    assert_all_close(results(function, x, slots, weights, T), run((x, slots, weights, T), "reference"))


@pytest.mark.long("triton")
@kernels_alone
def test_nothing_of_the_inputs_size_is_kept_for_backward(backend, device):
    (x, slots, weights, T), _ = Case("kept", N=5000, T=1).make(device=device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        slot_attention_module(x.requires_grad_(), slots, weights, T, return_attention=True, backend=backend)
    assert [y.data_ptr() for y in kept if y.numel() >= 5000] == [x.data_ptr()]
