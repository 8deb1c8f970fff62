"""`nn.SlotAttention` against the formula as printed, in every convention, and what it promises as a module."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import SERVING, assert_refused, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import iio_kernels.nn as operation
from iio_kernels.nn import SlotAttention
from iio_kernels.testing.slot_attention_layer import literal_slot_attention_layer

NAN = float("nan")
# torch.compile itself makes an instance of every Function that it traces.
compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
each_backend = pytest.mark.parametrize("serving", SERVING, indirect=True, ids="-".join)
#: Sizes of the tests, whose slots are as wide as the module's queries unless an option says otherwise.
B, N, K, DX, D, H, T = 2, 13, 3, 6, 8, 10, 3
#: What the literal formula needs to know of a module.
FORMULA = (
    "heads", "scale", "eps", "eps_in", "normalize", "softmax", "joint_heads", "update", "normalized_state",
    "mlp_last", "norm_eps", "gradient",
)  # fmt: skip

#: A row for each option, and for combinations that somebody publishes.
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "eps": {"eps": 0.1},
    "eps of 0": {"eps": 0.0},
    "eps in the denominator": {"eps": 0.1, "eps_in": "denominator"},
    "sum": {"normalize": "sum"},
    "scale": {"scale": 0.7},
    "norm_eps": {"norm_eps": 0.1},
    "scale, heads": {"scale": 0.7, "heads": 2},
    "norm_eps, heads": {"norm_eps": 0.1, "heads": 2},
    "bias": {"bias": True},
    "narrow": {"kvq_size": 6},
    "wide": {"kvq_size": 12},
    "heads": {"heads": 2},
    "joint heads": {"heads": 4, "joint_heads": True},
    "heads combined": {"heads": 3, "kvq_size": 12, "combine_heads": True, "bias": True},
    "one head combined": {"combine_heads": True},
    "residual": {"update": "residual"},
    "replace": {"update": "replace", "mlp_size": None},
    "replace of combined heads": {"update": "replace", "heads": 2, "kvq_size": 6, "combine_heads": True},
    "updates normalised": {"norm_updates": True},
    "sum of combined heads, normalised": {
        "normalize": "sum",
        "norm_updates": True,
        "heads": 3,
        "kvq_size": 12,
        "combine_heads": True,
    },
    "normalised state": {"normalized_state": True},
    "residual on normalised state": {"update": "residual", "normalized_state": True},
    "no MLP": {"mlp_size": None},
    "no MLP at last": {"mlp_last": False},
    "no MLP at last, heads": {"mlp_last": False, "heads": 2},
    "inputs as they are": {"norm_inputs": False},
    "inputs as they are, heads": {"norm_inputs": False, "heads": 2},
    "slots as they are": {"norm_slots": False},
    "no normalisation": {"norm_inputs": False, "norm_slots": False, "norm_mlp": False},
    "softmax over inputs": {"softmax": "inputs"},
    "softmax over inputs, heads, bias": {"softmax": "inputs", "heads": 2, "bias": True},
    "implicit": {"gradient": "implicit"},
    "implicit, heads": {"gradient": "implicit", "heads": 2, "joint_heads": True},
    "bilevel": {"gradient": "bilevel"},
    "bilevel, no MLP at last": {"gradient": "bilevel", "mlp_last": False},
    "bilevel in the denominator": {"gradient": "bilevel", "eps_in": "denominator", "eps": 0.1},
    "one iteration": {"iterations": 1},
    "one iteration, implicit": {"iterations": 1, "gradient": "implicit"},
    "one iteration, bilevel": {"iterations": 1, "gradient": "bilevel"},
    "one iteration, no MLP": {"iterations": 1, "mlp_last": False},
}
each_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make(dtype: torch.dtype = torch.float64, device: str = "cpu", **options: Any) -> SlotAttention:
    """A module whose parameters are all random, biases and normalisations too."""
    module = SlotAttention(DX, D, **({"num_slots": K, "iterations": T, "mlp_size": H} | options))
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            offset = 1 if name.startswith("norm") and name.endswith("weight") else 0
            parameter.copy_(offset + 0.5 * torch.randn(parameter.shape, generator=random))
    return module.to(device, dtype)


def example(
    dtype: torch.dtype = torch.float64, device: str = "cpu", *batch: int, n: int = N, k: int = K
) -> tuple[Tensor, Tensor]:
    """inputs and slots."""
    random = torch.Generator().manual_seed(4)
    batch = batch or (B,)
    shapes = (*batch, n, DX), (*batch, k, D)
    return tuple(torch.randn(shape, generator=random, dtype=torch.float64).to(device, dtype) for shape in shapes)


def masks(device: str = "cpu") -> dict[str, Tensor]:
    """One slot and some inputs of each image are out; (B, K) and (B, N)."""
    random = torch.Generator().manual_seed(5)
    return {
        "slot_mask": torch.tensor([[True, False, True], [True, True, False]], device=device),
        "input_mask": (torch.rand(B, N, generator=random) < 0.7).to(device),
    }


def random_like(*tensors: Tensor) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x) for x in tensors]


def results(function, module: SlotAttention, inputs: Tensor, slots: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """What `function(module, inputs, slots, **arguments)` returns, and all gradients."""
    leaves = [x.detach().requires_grad_() for x in (inputs, slots)]
    names, parameters = zip(*module.named_parameters(), strict=True)
    outputs = function(module, *leaves, **arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(
        outputs, [*leaves, *parameters], random_like(*outputs), allow_unused=True, materialize_grads=True
    )
    named = dict(zip(("inputs", "slots", *names), gradients, strict=True))
    return dict(zip(("out", "attention"), (x.detach() for x in outputs), strict=False)) | named


def ours(module: SlotAttention, inputs: Tensor, slots: Tensor, **arguments: Any) -> Any:
    return module(inputs, slots, **arguments)


def formula(module: SlotAttention, inputs: Tensor, slots: Tensor, **arguments: Any) -> Any:
    """The literal formula, in the module's options."""
    batch = inputs.shape[:-2]
    inputs, slots = (x.reshape(-1, *x.shape[-2:]) for x in (inputs, slots))
    options = {name: getattr(module, name) for name in FORMULA}
    out, A, W = literal_slot_attention_layer(
        dict(module.named_parameters()), inputs, slots, module.iterations, **options, **arguments
    )
    out = out.view(*batch, *out.shape[1:])
    if module.attention is None:
        return out
    shown = {"softmax": A, "weights": W}[module.attention]
    if module.attention_heads != "separate":
        shown = shown.sum(1) if module.attention_heads == "sum" else shown.mean(1)
    shown = shown if module.attention_layout == "KN" else shown.transpose(-2, -1)
    return out, shown.reshape(*batch, *shown.shape[1:])


def assert_all_close(got: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-10) -> None:
    assert got.keys() == expected.keys()
    for name, x in got.items():
        y = expected[name]
        scale = max(y.abs().max().item(), 1) if y.numel() else 1
        torch.testing.assert_close(x, y, rtol=0, atol=relative * scale, msg=lambda text, name=name: f"{name}: {text}")


# --- the formula -----------------------------------------------------------------------------------------------------


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

    slots_after = operation.slot_attention_module
    monkeypatch.setattr(operation, "slot_attention_module", spy)
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


# --- initial slots ---------------------------------------------------------------------------------------------------


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


# --- the implicit gradient -------------------------------------------------------------------------------------------


def contraction(**options: Any) -> tuple[SlotAttention, Tensor, Tensor]:
    """A module whose iterations contract, inputs, and the slots that they leave where they are."""
    module, (inputs, slots) = make(**options, attention="softmax"), example()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.startswith("norm"):
                parameter.mul_(0.2)
        return module, inputs.requires_grad_(), module(inputs, slots, iterations=200)[0]


def saved_bytes(function) -> int:
    """Of what autograd keeps in a call of `function`: tensors that share memory count once."""
    storages = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return sum(storages.values())


@pytest.mark.parametrize("name", ["implicit", "implicit, heads"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_neumann_terms_approach_the_gradient_of_the_fixed_point(name, backend):
    """That of slots and attention at once, each term by the factor that the iterations contract by."""
    module, inputs, fixed = contraction(**OPTIONS[name], backend=backend)
    leaves = [inputs, *(p for name, p in module.named_parameters() if name not in ("mu", "log_sigma"))]
    incoming = random_like(*module(inputs, fixed))

    def gradients(outputs, incoming):
        return torch.cat([x.flatten() for x in torch.autograd.grad(outputs, leaves, incoming, retain_graph=True)])

    # s = f(s, w), with the loss <incoming, (f(s, w), A(s, w))>: v = dloss/ds, and v (I - J)^-1 goes on to w.
    module.gradient = "unrolled"
    start = fixed.clone().requires_grad_()
    f, attention = module(inputs, start, iterations=1)
    (v,) = torch.autograd.grad((f, attention), start, incoming, retain_graph=True)
    J = torch.autograd.functional.jacobian(lambda s: module(inputs, s, iterations=1)[0], fixed)
    J = J.reshape(v.numel(), v.numel())
    u = torch.linalg.solve(torch.eye(v.numel(), dtype=v.dtype) - J.mT, v.flatten()).view_as(v)
    exact = gradients((f, attention, f), [*incoming, u])
    factor = torch.linalg.eigvals(J).abs().max().item()
    assert 0.2 < factor < 0.8

    module.gradient, errors = "implicit", []
    for terms in range(12):
        module.neumann_terms = terms
        got = gradients(module(inputs, fixed, iterations=2), incoming)
        errors.append((got - exact).norm().item())
        assert errors[-1] <= 2 * factor**terms * errors[0], errors
        if terms in (0, 1, 3):
            powers = [torch.linalg.matrix_power(J.mT, i) for i in range(terms)]
            cut_off = sum((power @ v.flatten() for power in powers), torch.zeros_like(u.flatten())).view_as(v)
            torch.testing.assert_close(got, gradients((f, attention, f), [*incoming, cut_off]), rtol=1e-9, atol=1e-10)
    assert errors[0] > 1e-2 * exact.norm()


@pytest.mark.parametrize("name", ["defaults", "joint heads"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_implicit_gradient_keeps_as_much_for_any_number_of_iterations(name, backend):
    def kept(iterations, **gradient):
        options = {**OPTIONS[name], **gradient, "backend": backend}
        module, tensors = make(**options), example(n=50)
        return saved_bytes(lambda: module(*tensors, iterations=iterations))

    implicit, with_terms = {"gradient": "implicit"}, {"gradient": "implicit", "neumann_terms": 1}
    assert kept(3) < kept(11)
    assert kept(1) <= kept(3, **implicit) == kept(11, **implicit)
    assert kept(3, **with_terms) == kept(11, **with_terms | {"neumann_terms": 9}) <= 2 * kept(3, **implicit)


def test_neumann_terms_around_their_gradient():
    module, (inputs, slots) = make(gradient="implicit", neumann_terms=3, attention="softmax"), example()
    plain = make(attention="softmax")
    for got, expected in zip(module(inputs, slots), plain(inputs, slots), strict=True):
        torch.testing.assert_close(got, expected)
    with torch.no_grad():
        assert not module(inputs, slots)[0].requires_grad
    assert not copy.deepcopy(module).requires_grad_(False)(inputs, slots)[0].requires_grad
    assert_refused(module, {"inputs": inputs, "iterations": 1}, ValueError, ["iterations", "2", "neumann_terms", "1"])
    out = module(inputs.requires_grad_(), slots)[0].square().sum()
    first, second = (torch.autograd.grad(out, inputs, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match=r"neumann_terms: .* once"):
        torch.autograd.grad(out, inputs, create_graph=True)


@compiles
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_neumann_terms_compiled():
    """What is around their iteration is compiled; the whole is refused, with a reason."""
    torch._dynamo.reset()
    module = make(torch.float32, gradient="implicit", neumann_terms=2)
    inputs, slots = example(torch.float32)
    compiled = torch.compile(module, backend="eager")
    got = results(lambda _, *x: compiled(*x), module, inputs, slots)
    assert_all_close(got, results(ours, module, inputs, slots), 1e-5)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_iterate_implicitly"):
        torch.compile(module, backend="eager", fullgraph=True)(inputs, slots)


# --- layout and dtypes -----------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("name", ["defaults", "joint heads"])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 2)], ids=str)
def test_any_leading_dimensions(name, batch, backend, device):
    module = make(device=device, **OPTIONS[name], attention="softmax", backend=backend)
    inputs, slots = example(torch.float64, device, *(batch or (1,)))
    flat = module(inputs.flatten(0, -3), slots.flatten(0, -3))
    got = module(inputs.view(*batch, N, DX), slots.view(*batch, K, D))
    for x, y in zip(got, flat, strict=True):
        torch.testing.assert_close(x, y.view(*batch, *y.shape[1:]))


def test_slots_masks_and_noise_broadcast():
    module = make(attention="softmax")
    inputs, slots = example(torch.float64, "cpu", 2, 3)
    one = {"slot_mask": torch.tensor([True, False, True]), "input_mask": torch.arange(N) < 9}
    every = {name: mask.expand(2, 3, -1) for name, mask in one.items()}
    got, expected = module(inputs, slots[0, 0], **one), module(inputs, slots[:1, :1].expand(2, 3, -1, -1), **every)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        module(inputs, noise=slots[0, 0]), module(inputs, noise=slots[0, 0].expand(2, 3, -1, -1))
    )


@each_backend
@pytest.mark.parametrize("name", ["defaults", "inputs as they are", "heads", "inputs as they are, heads"])
@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded", "frames"])
def test_strides(name, how, backend, device, interpreted):
    if interpreted and name != "defaults":
        pytest.skip("Triton's interpreter is slow, and the operations' own tests have strides")
    module = make(device=device, **OPTIONS[name], attention="softmax", backend=backend)

    def strided(x: Tensor) -> Tensor:
        if how == "transposed":
            return x.mT.contiguous().mT
        if how == "sliced":
            wide = torch.full((*x.shape[:-2], 2 * x.shape[-2], 3 * x.shape[-1]), NAN).to(x)
            return wide[..., ::2, ::3].copy_(x)
        return x[:1].expand_as(x) if how == "expanded" else x.transpose(0, 1).contiguous().transpose(0, 1)

    views = [strided(x) for x in example(torch.float64, device, 2, 3)]
    assert not any(x.is_contiguous() for x in views)
    assert_all_close(results(ours, module, *views), results(ours, module, *(x.contiguous() for x in views)))
    out, attention = module(*views)
    incoming = [x.new_ones(()).expand_as(x) for x in (out, attention)]
    got = torch.autograd.grad((out, attention), list(module.parameters()), incoming, allow_unused=True)
    dense = torch.autograd.grad(
        module(*views), list(module.parameters()), [x.contiguous() for x in incoming], allow_unused=True
    )
    for x, y in zip(got, dense, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", ["defaults", "joint heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding(name, dtype):
    """A module wholly in a narrow dtype: results and gradients in it, the arithmetic in float32 between."""
    module = make(dtype, **OPTIONS[name], attention="softmax")
    tensors = example(dtype)
    got = results(ours, module, *tensors)
    exact = results(formula, copy.deepcopy(module).double(), *(x.double() for x in tensors))
    assert got["attention"].dtype == torch.float32
    for key, x in got.items():
        assert x.dtype == (torch.float32 if key == "attention" else dtype), key
        allowed = 128 * torch.finfo(torch.float32).eps + 16 * torch.finfo(dtype).eps
        assert (x.double() - exact[key]).abs().max() <= allowed * max(1, exact[key].abs().max()), key


@pytest.mark.parametrize("name", ["defaults", "joint heads"])
def test_autocast_changes_nothing(name):
    module, (inputs, slots) = make(torch.float32, **OPTIONS[name], attention="weights"), example(torch.float32)
    expected = module(inputs, slots)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(inputs, slots)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["defaults", "joint heads", "residual"])
def test_nan_stays_in_its_image(name):
    module, (inputs, slots) = make(torch.float32, **OPTIONS[name]), example(torch.float32)
    expected = module(inputs, slots)
    inputs[0, 3, 2] = NAN
    got = module(inputs, slots)
    assert got[0].isnan().all()
    torch.testing.assert_close(got[1], expected[1])


@pytest.mark.parametrize("name", ["defaults", "joint heads", "bias", "residual", "softmax over inputs"])
@pytest.mark.parametrize("empty", ["no images", "no inputs"])
def test_nothing(name, empty):
    module = make(**OPTIONS[name], attention="softmax")
    inputs, slots = example(n=0) if empty == "no inputs" else (x[:0] for x in example())
    out, attention = module(inputs, slots)
    assert (out.shape, attention.shape) == (slots.shape, (len(slots), K, inputs.shape[1]))
    assert out.isfinite().all()
    out.sum().backward()


@each_backend
@pytest.mark.parametrize("name", ["defaults", "joint heads", "bilevel"])
def test_bitwise_repeatable(name, backend, device, interpreted):
    module = make(torch.float32, device, **OPTIONS[name], backend=backend)
    tensors = example(torch.float32, device, n=N if interpreted else 300)
    first, second = (results(ours, module, *tensors) for _ in range(2))
    assert all(torch.equal(x, second[key]) for key, x in first.items())


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


# --- a module --------------------------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_options():
    def names(**options):
        return {name: tuple(x.shape) for name, x in SlotAttention(6, 8, num_slots=5, **options).named_parameters()}

    plain = names()
    assert list(plain) == [
        "mu", "log_sigma", "norm_inputs.weight", "norm_inputs.bias", "norm_slots.weight", "norm_slots.bias",
        "norm_mlp.weight", "norm_mlp.bias", "to_q.weight", "to_k.weight", "to_v.weight", "gru.weight_ih",
        "gru.weight_hh", "gru.bias_ih", "gru.bias_hh", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias",
    ]  # fmt: skip
    assert names(bias=True).keys() - plain.keys() == {"to_q.bias", "to_k.bias", "to_v.bias"}
    assert names(combine_heads=True).keys() - plain.keys() == {"combine.weight", "combine.bias"}
    assert plain.keys() - names(mlp_size=None, norm_inputs=False, update="residual").keys() == {
        name for name in plain if name.startswith(("mlp", "norm_mlp", "norm_inputs", "gru"))
    }
    assert plain.keys() - names(initial="given").keys() == {"mu", "log_sigma"}
    assert names(initial="queries")["mu"] == names(initial="gaussians")["log_sigma"] == (5, 8)
    wide = names(kvq_size=12, heads=3)
    assert (wide["to_k.weight"], wide["gru.weight_ih"]) == ((12, 6), (24, 12))


def test_copies_keep_options_and_weights():
    options = {"heads": 2, "gradient": "bilevel", "attention": "weights"}
    module, (inputs, slots) = make(torch.float32, **options), example(torch.float32)
    expected = module(inputs, slots)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    fresh = SlotAttention(DX, D, num_slots=K, mlp_size=H, **options)
    fresh.load_state_dict(module.state_dict())
    for other in (
        copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False), fresh,
    ):  # fmt: skip
        assert all(map(torch.equal, other(inputs, slots), expected))
        assert repr(other) == repr(module)
    state = {name: 2 * x for name, x in module.state_dict().items()}
    fresh.load_state_dict(state)
    got = torch.func.functional_call(module, state, (inputs, slots))
    assert all(map(torch.equal, got, fresh(inputs, slots)))


def test_meta_and_no_gradient():
    """Nothing looks at a value; frozen parameters have no gradient."""
    with torch.device("meta"):
        module = SlotAttention(6, 8, attention="softmax", backend="reference")
        out, attention = module(torch.empty(2, 5, 6))
    assert (out.shape, attention.shape) == ((2, 7, 8), (2, 7, 5))
    module, (inputs, slots) = make().requires_grad_(False), example()
    assert not module(inputs, slots).requires_grad
    assert module(inputs.requires_grad_(), slots).requires_grad
    with torch.no_grad():
        assert not make()(inputs, slots).requires_grad


@pytest.mark.parametrize("name", ["defaults", "joint heads", "bilevel"])
def test_data_parallel(name):
    """Every parameter has its gradient, twice over: DistributedDataParallel finds none that is unused."""
    module, (inputs, _) = make(torch.float32, **OPTIONS[name]), example(torch.float32)
    noise = torch.randn(B, K, D)
    expected = torch.autograd.grad(module(inputs, noise=noise).square().sum(), list(module.parameters()))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(module)
        for _ in range(2):
            module.zero_grad()
            parallel(inputs, noise=noise).square().sum().backward()
            for parameter, gradient in zip(module.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, gradient)
    finally:
        torch.distributed.destroy_process_group()


@compiles
@pytest.mark.parametrize(
    ("name", "compiler"),
    [("defaults", "inductor"), *((name, "aot_eager") for name in ("joint heads", "no MLP at last", "bilevel"))],
)
@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.long)])
def test_compiled_whole(name, compiler, backend):
    torch._dynamo.reset()
    module = make(torch.float32, **OPTIONS[name], attention="weights", backend=backend)
    tensors, given_masks = example(torch.float32), masks()
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    for arguments in ({}, given_masks):
        got = results(lambda _, *x, **options: compiled(*x, **options), module, *tensors, **arguments)
        assert_all_close(got, results(ours, module, *tensors, **arguments), 1e-5)


@compiles
@pytest.mark.parametrize("name", ["defaults", "joint heads"])
def test_compiled_once_for_all_numbers_of_inputs(name):
    torch._dynamo.reset()
    module = make(torch.float32, **OPTIONS[name], attention="softmax", backend="cpu")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for n in (13, 20, 57):
        tensors = example(torch.float32, n=n)
        got = results(lambda _, *x: compiled(*x), module, *tensors)
        assert_all_close(got, results(ours, module, *tensors), 1e-5)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert len(set(counts)) == 1


@compiles
@pytest.mark.parametrize("name", ["defaults", "joint heads", "bilevel"])
def test_exported(name):
    module, tensors = make(torch.float32, **OPTIONS[name], attention="softmax"), example(torch.float32)
    sizes = {1: torch.export.Dim("N", min=2)}
    program = torch.export.export(module, tensors, dynamic_shapes={"inputs": sizes, "slots": None})
    for n in (N, 29):
        inputs, slots = example(torch.float32, n=n)
        torch.testing.assert_close(program.module()(inputs, slots), module(inputs, slots))


def test_importing_takes_no_triton():
    """On a machine without a GPU, nor does a call: torch itself may have imported it."""
    program = (
        "import sys, torch; before = 'triton' in sys.modules\n"
        "import iio_kernels\n"
        "iio_kernels.nn.SlotAttention(4, 4)(torch.randn(1, 5, 4)).sum().backward()\n"
        "print(before, 'triton' in sys.modules)"
    )
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    before, after = out.stdout.split()
    assert before == after


# --- what is refused -------------------------------------------------------------------------------------------------


def options_of(**changes: Any) -> dict[str, Any]:
    return {"input_size": 6, "slot_size": 8} | changes


# A row: the arguments, the type of the error, and what its message must hold in this order.
CONSTRUCTED = [
    (options_of(input_size=0), ValueError, ["input_size", "int >= 1", "0"]),
    (options_of(slot_size=8.0), TypeError, ["slot_size", "int", "float"]),
    (options_of(num_slots=0), ValueError, ["num_slots", "int >= 1", "0"]),
    (options_of(iterations=True), TypeError, ["iterations", "int", "bool"]),
    (options_of(kvq_size=0), ValueError, ["kvq_size", "int >= 1", "0"]),
    (options_of(heads=3), ValueError, ["kvq_size", "multiple of heads = 3", "8"]),
    (options_of(joint_heads=1), TypeError, ["joint_heads", "bool", "1"]),
    (options_of(combine_heads="yes"), TypeError, ["combine_heads", "bool", "'yes'"]),
    (options_of(project=None), TypeError, ["project", "bool", "None"]),
    (options_of(project=False), ValueError, ["project", "input_size = 6, slot_size = 8, kvq_size = 8"]),
    (options_of(input_size=8, project=False, kvq_size=4), ValueError, ["project", "kvq_size = 4"]),
    (options_of(input_size=8, project=False, bias=True), ValueError, ["bias", "without projections", "True"]),
    (options_of(norm_updates=1), TypeError, ["norm_updates", "bool", "1"]),
    (options_of(bias=None), TypeError, ["bias", "bool", "None"]),
    (options_of(scale=NAN), ValueError, ["scale", "finite", "nan"]),
    (options_of(eps=-1e-8), ValueError, ["eps", ">= 0", "-1e-08"]),
    (options_of(eps_in="numerator"), ValueError, ["eps_in", "'weights'", "'denominator'", "'numerator'"]),
    (options_of(normalize="max"), ValueError, ["normalize", "'mean'", "'sum'", "'max'"]),
    (options_of(softmax="both"), ValueError, ["softmax", "'slots'", "'inputs'", "'both'"]),
    (options_of(softmax="inputs", joint_heads=True), ValueError, ["joint_heads", "False", '"inputs"', "True"]),
    (options_of(norm_slots=None), TypeError, ["norm_slots", "bool", "None"]),
    (options_of(neumann_terms=-1), ValueError, ["neumann_terms", "int >= 0", "-1"]),
    (options_of(neumann_terms=2), ValueError, ["neumann_terms", "0", '"implicit"', "2"]),
    (options_of(update="lstm"), ValueError, ["update", "'gru'", "'replace'", "'lstm'"]),
    (options_of(update="residual", kvq_size=4), ValueError, ["kvq_size", "slot_size = 8", "4"]),
    (options_of(mlp_size=0), ValueError, ["mlp_size", "int >= 1", "0"]),
    (options_of(mlp_last=2), TypeError, ["mlp_last", "bool", "2"]),
    (options_of(norm_eps=0.0), ValueError, ["norm_eps", "> 0", "0"]),
    (options_of(initial="random"), ValueError, ["initial", "'gaussian'", "'given'", "'random'"]),
    (options_of(gradient="detached"), ValueError, ["gradient", "'unrolled'", "'bilevel'", "'detached'"]),
    (options_of(attention=True), ValueError, ["attention", "None", "'softmax'", "True"]),
    (options_of(attention_layout="kn"), ValueError, ["attention_layout", "'KN'", "'kn'"]),
    (options_of(attention_heads="max"), ValueError, ["attention_heads", "'sum'", "'max'"]),
]


def inputs_of(**changes: Any) -> dict[str, Any]:
    return {"inputs": torch.rand(2, 5, DX, dtype=torch.float64)} | changes


CALLED = [
    (inputs_of(inputs=None), TypeError, ["inputs", "torch.Tensor (..., N, input_size)", "NoneType"]),
    (inputs_of(inputs=torch.rand(5)), ValueError, ["inputs", "(..., N, input_size)", "(5,)"]),
    (inputs_of(inputs=torch.rand(2, 5, 7)), ValueError, ["inputs", "(..., N, 6)", "(2, 5, 7)"]),
    (inputs_of(inputs=torch.rand(2, 5, 6, device="meta")), ValueError, ["inputs", "device of parameters, cpu", "meta"]),
    (inputs_of(slots=torch.rand(2, 3, 9)), ValueError, ["slots", "(3, 8)", "(2, 3, 9)"]),
    (inputs_of(slots=torch.rand(3, 3, 8)), ValueError, ["slots", "(3, 8)", "broadcast to (2,)", "(3, 3, 8)"]),
    (inputs_of(slots=torch.rand(2, 3, 8, device="meta")), ValueError, ["slots", "device of inputs, cpu", "meta"]),
    (inputs_of(slots=torch.rand(3, 8), num_slots=4), ValueError, ["num_slots", "3 of slots", "4"]),
    (inputs_of(slots=torch.rand(3, 8), noise=torch.rand(3, 8)), ValueError, ["noise", "None", "slots", "tensor"]),
    (inputs_of(noise=torch.ones(3, 8).int()), TypeError, ["noise", "float32", "torch.int32"]),
    (inputs_of(num_slots=0), ValueError, ["num_slots", "int >= 1", "0"]),
    (inputs_of(iterations=0), ValueError, ["iterations", "int >= 1", "0"]),
    (inputs_of(slot_mask=torch.ones(2, 3)), TypeError, ["slot_mask", "torch.bool", "float32"]),
    (inputs_of(input_mask=torch.ones(2, 6).bool()), ValueError, ["input_mask", "(2, 5)", "(2, 6)"]),
]


def words(x: Any) -> str:
    return ", ".join(x) if type(x) is list else ""


@pytest.mark.parametrize(("arguments", "error", "words"), CONSTRUCTED, ids=words)
def test_bad_options_are_named(arguments, error, words):
    assert_refused(SlotAttention, arguments, error, words)


@pytest.mark.parametrize(("arguments", "error", "words"), CALLED, ids=words)
def test_bad_arguments_are_named(arguments, error, words):
    assert_refused(make(), arguments, error, words)


def test_slots_that_are_not_there_are_named():
    (inputs, _) = example()
    assert_refused(make(initial="given"), {"inputs": inputs}, ValueError, ["slots", '"given"', "None"])
    assert_refused(make(initial="queries"), {"inputs": inputs, "num_slots": 4}, ValueError, ["num_slots", "3", "4"])
    noise = torch.rand(3, 8)
    assert_refused(make(initial="queries"), {"inputs": inputs, "noise": noise}, ValueError, ["noise", '"queries"'])
    noise = torch.rand(4, 8)
    assert_refused(make(initial="gaussians"), {"inputs": inputs, "noise": noise}, ValueError, ["num_slots", "3", "4"])
    assert_refused(make(backend="fastest"), {"inputs": inputs}, ValueError, ["backend", "'auto'", "'fastest'"])
