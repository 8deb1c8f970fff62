"""The implicit gradient of `nn.SlotAttention`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparing import assert_refused
from conventions import OPTIONS, assert_all_close, compiles, example, make, ours, random_like, results
from torch import Tensor

from iio_kernels.nn import SlotAttention


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


@pytest.mark.long
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
