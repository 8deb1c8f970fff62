"""Initial slots of `nn.SlotAttention`: drawn, learnt or given, of any number."""

from __future__ import annotations

import pytest
import torch
from conventions import B, D, K, example, make


@pytest.mark.parametrize("initial", ["gaussian", "gaussians", "queries"])
def test_initial_slots(initial):
    module, (inputs, _) = make(torch.float32, initial=initial), example(torch.float32)
    noise = torch.randn(B, K, D)
    drawn = module.mu.expand(B, K, D)
    if initial != "queries":
        drawn = drawn + module.log_sigma.exp() * noise
    expected = module(inputs, drawn)
    if initial != "queries":
        torch.testing.assert_close(module(inputs, noise=noise), expected, rtol=0, atol=0)
    torch.manual_seed(7)
    got = module(inputs)
    torch.manual_seed(7)
    again = module(inputs) if initial == "queries" else module(inputs, noise=torch.randn(B, K, D))
    assert torch.equal(got, again)
    torch.testing.assert_close(again, expected if initial == "queries" else again)
    assert len(module.mu) == (1 if initial == "gaussian" else K)
    assert hasattr(module, "log_sigma") == (initial != "queries")


@pytest.mark.parametrize("initial", ["gaussian", "gaussians", "queries"])
def test_gradients_reach_what_initial_slots_are_made_of(initial):
    module, (inputs, _) = make(initial=initial, gradient="bilevel"), example()
    torch.manual_seed(2)
    module(inputs).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    module = make(initial=initial, gradient="implicit")
    module(inputs).square().sum().backward()
    assert module.mu.grad is None or not module.mu.grad.any()


def test_numbers_of_slots_and_iterations_per_call():
    module, (inputs, slots) = make(), example()
    assert module(inputs, num_slots=7).shape == (B, 7, D)
    assert module(inputs, slots[:, :2]).shape == (B, 2, D)
    once = module(inputs, slots, iterations=1)
    torch.testing.assert_close(module(inputs, once, iterations=2), module(inputs, slots))
    assert make(initial="gaussians")(inputs, num_slots=2).shape == (B, 2, D)
    learnt = make(initial="queries")
    torch.testing.assert_close(learnt(inputs, num_slots=2), learnt(inputs, learnt.mu[:2]))


def test_bilevel_begins_the_last_iteration_at_the_very_slots():
    """(s + initial) - initial would be s to rounding; the value is that of the unrolled module to the bit."""
    (inputs, slots), parameters = example(torch.float32), make(torch.float32).state_dict()
    expected, got = (make(torch.float32, gradient=gradient) for gradient in ("implicit", "bilevel"))
    assert torch.equal(expected(inputs, 1e6 * slots), got(inputs, 1e6 * slots))
    assert parameters.keys() == got.state_dict().keys()
