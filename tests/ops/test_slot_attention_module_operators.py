"""The operators under the Slot Attention module, and torch.compile."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison
from marks import NAMESPACES, compiles, kernels_alone

import iio_kernels.ops.slot_attention_module.api as operation
from iio_kernels import slot_attention_module
from iio_kernels.ops.slot_attention_module.common import Operands, Options, made_by_maps, on_tape
from iio_kernels.runtime import backends
from iio_kernels.testing.slot_attention_module import (
    NAMES,
    SMALL,
    Case,
    random_like,
    results,
)

OPERATION = "slot_attention_module"
assert_all_close = comparison(NAMES, 1e-11)


@pytest.mark.long("triton")
@kernels_alone
@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(attention, dtype, backend, device):
    """What torch asks of operators, with and without the attention and its gradient."""
    backends.implementation("slot_attention_module", backend)  # which defines them
    operators = getattr(torch.ops, NAMESPACES[backend])
    (x, slots, weights, T), _ = SMALL.make(dtype, device)
    maps = operation._maps(weights, 0.7)
    weights, biases = list(maps[:5]), list(maps[5:])
    arguments = (x, slots, weights, biases, T, 1e-8, 1e-5, attention)
    torch.library.opcheck(operators.iterations_forward.default, arguments)
    out, A, tape = operators.iterations_forward(*arguments)
    d_out, dA = random_like(out, A)
    arguments = (d_out, dA if attention else None, x, tape, weights, 1e-8)
    torch.library.opcheck(operators.iterations_backward.default, arguments)


@pytest.mark.long("triton")
@kernels_alone
def test_operators_agree_with_the_reference_on_the_tape_and_what_maps_make(backend, device):
    """All of it, so that nothing there is left unwritten."""
    case = Case("tape", K=5, Dx=7, D=9, H=6)
    (x, slots, weights, T), _ = case.make(device=device)
    operands, options = Operands(x, slots, operation._maps(weights, 0.7)), Options(T, 1e-8, 1e-5)
    kernels, reference = (backends.implementation("slot_attention_module", name) for name in (backend, "reference"))
    out, A, tape = reference.forward(operands, options, True)
    assert tape.shape == (2, T, 5, sum(on_tape(9, 7, 6)))
    for got, expected in zip(kernels.forward(operands, options, True), (out, A, tape), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    backward = *random_like(out, A), operands, tape, options
    expected = reference.backward(*backward)
    assert expected[2].shape == (2, T, 5, sum(made_by_maps(9, 7, 6)))
    for got, exact in zip(kernels.backward(*backward), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.long("reference", "triton", "written_out")
@compiles
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic, backend, device):
    def function(*arguments):
        return slot_attention_module(*arguments, return_attention=True, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for B, N in ((2, 13), (3, 20)) if dynamic else ((2, 13),):
        arguments, _ = Case("compiled", B=B, N=N).make(device=device)
        assert_all_close(results(compiled, *arguments), results(function, *arguments))


@pytest.mark.long
@compiles
def test_compiles_where_nothing_has_a_gradient(backend, device):
    """Nothing at all, or only the first of two calls."""
    torch.compiler.reset()
    (x, slots, weights, T), _ = Case("compiled").make(device=device)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(x, slots):
        with torch.no_grad():
            slots = slot_attention_module(x, slots, weights, T - 1, backend=backend)
        return slot_attention_module(x, slots, weights, 1, backend=backend)

    expected = slot_attention_module(x, slots, weights, T, backend=backend)
    torch.testing.assert_close(function(x, slots), expected)
    torch.testing.assert_close(function(x.requires_grad_(), slots), expected)


@pytest.mark.long("cpu", "triton")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
@kernels_alone
def test_compiles_to_code(backend, device):
    """Once all the way through Inductor."""
    torch.compiler.reset()
    arguments, _ = Case("compiled", T=2).make(torch.float32, device)

    def function(*arguments):
        return slot_attention_module(*arguments, return_attention=True, backend=backend)

    compiled = torch.compile(function, fullgraph=True)
    assert_all_close(results(compiled, *arguments), results(function, *arguments), relative=1e-5)
