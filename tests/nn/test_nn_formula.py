"""`nn.SlotAttention` against the formula as printed, in every convention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conventions import (
    NAN,
    OPTIONS,
    B,
    D,
    K,
    N,
    T,
    assert_all_close,
    each_backend,
    each_options,
    example,
    formula,
    make,
    masks,
    ours,
    results,
)
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iio_kernels.nn import SlotAttention, iterations


@each_backend
@each_options
def test_every_option_is_that_of_the_formula(options, backend, device):
    module = make(device=device, **options, backend=backend, attention="softmax", attention_heads="separate")
    tensors = example(torch.float64, device)
    assert_all_close(results(ours, module, *tensors), results(formula, module, *tensors))


@each_backend
@pytest.mark.parametrize(
    "name", ["defaults", "eps", "eps in the denominator", "sum", "softmax over inputs", "joint heads", "bilevel"]
)
@pytest.mark.parametrize("masked", [["slot_mask"], ["input_mask"], ["slot_mask", "input_mask"]], ids=" ".join)
def test_masks(name, masked, backend, device):
    module = make(device=device, **OPTIONS[name], backend=backend, attention="weights")
    given_masks = {mask: masks(device)[mask] for mask in masked}
    tensors = example(torch.float64, device)
    assert_all_close(results(ours, module, *tensors, **given_masks), results(formula, module, *tensors, **given_masks))


@each_backend
@pytest.mark.parametrize("options", [{}, {"norm_inputs": False}, {"norm_inputs": False, "softmax": "inputs"}], ids=str)
def test_what_is_masked_may_hold_anything(options, backend, device):
    module = make(device=device, **options, backend=backend)
    (inputs, slots), mask = example(torch.float64, device), masks(device)["input_mask"]
    expected = results(ours, module, inputs, slots, input_mask=mask)
    inputs = inputs.masked_fill(~mask.unsqueeze(-1), NAN)
    got = results(ours, module, inputs, slots, input_mask=mask)
    assert_all_close(got, expected, 0)


@each_backend
@pytest.mark.parametrize("attention", ["softmax", "weights"])
@pytest.mark.parametrize("layout", ["KN", "NK"])
@pytest.mark.parametrize("over", ["sum", "mean", "separate"])
@pytest.mark.parametrize("heads", [1, 2])
def test_attention_as_it_is_asked_for(attention, layout, over, heads, backend, device):
    module = make(
        device=device, heads=heads, eps=0.1, attention=attention, attention_layout=layout, attention_heads=over,
        backend=backend,
    )  # fmt: skip
    tensors = example(torch.float64, device)
    got = results(ours, module, *tensors)
    assert_all_close(got, results(formula, module, *tensors))
    plane = (K, N) if layout == "KN" else (N, K)
    assert got["attention"].shape == (B, *((heads,) if over == "separate" else ()), *plane)
    assert isinstance(make(heads=heads)(*example()), Tensor)


@each_options
def test_one_operator_or_an_iteration_at_a_time(options, monkeypatch):
    """The same results either way, as far as there are two ways."""
    module, tensors = make(**options, attention="softmax", attention_layout="NK"), example()
    expected = results(ours, module, *tensors)
    monkeypatch.setattr(SlotAttention, "_in_one_operator", lambda self: False)
    assert_all_close(results(ours, module, *tensors), expected)


#: Options that `slot_attention_module` has, and the iterations of each call of it.
IN_ONE = {
    **{name: [3] for name in ("defaults", "eps", "eps of 0", "scale", "norm_eps", "inputs as they are")},
    **{"no MLP at last": [2], "implicit": [2, 1], "bilevel": [2, 1], "bilevel, no MLP at last": [2]},
    "one iteration": [1],
    "one iteration, implicit": [1],
    "one iteration, bilevel": [1],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_which_options_are_one_operator(name, monkeypatch):
    calls = []

    def spy(x, slots, weights, iterations, **options):
        calls.append(iterations)
        return slots_after(x, slots, weights, iterations, **options)

    slots_after = iterations.slot_attention_module
    monkeypatch.setattr(iterations, "slot_attention_module", spy)
    make(**OPTIONS[name])(*example())
    assert calls == IN_ONE.get(name, [])


@each_backend
def test_more_slots_than_one_operator_may_have(backend, device):
    """Triton's kernel of all iterations takes 16: asked for by name, it goes an iteration at a time."""
    module, tensors = make(device=device, iterations=1, backend=backend), example(torch.float64, device, k=17)
    assert_all_close(results(ours, module, *tensors), results(formula, module, *tensors))


@settings(max_examples=examples(15), deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(1, 5), st.integers(1, 3)),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 2), st.integers(1, 3)),
    name=st.sampled_from(["defaults", "bias", "residual", "no MLP at last", "bilevel"]),
    joint=st.booleans(),
)
def check_any_sizes(backend, device, sizes, widths, name, joint):
    (b, n, k, t), (dx, d, heads, mlp) = sizes, widths
    options = {**OPTIONS[name], "heads": heads, "joint_heads": joint, "iterations": t, "mlp_size": mlp}
    module = SlotAttention(dx, d * heads, num_slots=k, **options, backend=backend).to(device, torch.float64)
    tensors = [torch.randn(b, *size, dtype=torch.float64, device=device) for size in ((n, dx), (k, d * heads))]
    got = results(ours, module, *tensors)
    assert got["out"].shape == tensors[1].shape
    if b:
        assert_all_close(got, results(formula, module, *tensors), 1e-8)


@each_backend
def test_any_sizes(backend, device, interpreted):
    if interpreted:
        pytest.skip("Triton's interpreter is slow, and the operations' own tests have sizes")
    check_any_sizes(backend, device)


#: Soft k-means, and what else goes without projections.
UNPROJECTED: dict[str, dict[str, Any]] = {
    "a GRU": {},
    "means": {"update": "replace", "mlp_size": None, "norm_inputs": False, "norm_slots": False},
    "joint heads": {"heads": 2, "joint_heads": True},
    "softmax over inputs": {"softmax": "inputs"},
    "implicit": {"gradient": "implicit"},
}


@each_backend
@pytest.mark.parametrize("name", UNPROJECTED)
def test_without_projections_slots_are_queries_and_inputs_keys_and_values(name, backend, device):
    torch.manual_seed(0)
    module = SlotAttention(D, D, num_slots=K, iterations=T, project=False, attention="softmax", backend=backend,
                           attention_heads="separate", **UNPROJECTED[name]).to(device, torch.float64)  # fmt: skip
    assert not [key for key in (*dict(module.named_parameters()), *module.state_dict()) if key.startswith("to_")]
    inputs, slots = (torch.randn(B, n, D, dtype=torch.float64, device=device) for n in (N, K))
    assert_all_close(results(ours, module, inputs, slots), results(formula, module, inputs, slots))


def test_soft_k_means_is_a_softmax_and_a_mean():
    module = SlotAttention(D, D, project=False, eps=0.0, **UNPROJECTED["means"])
    assert [name for name, _ in module.named_parameters()] == ["mu", "log_sigma"]
    x, slots = torch.randn(B, N, D), torch.randn(B, K, D)
    A = (slots @ x.mT / D**0.5).softmax(1)
    torch.testing.assert_close(module(x, slots, iterations=1), A @ x / A.sum(-1, keepdim=True))
