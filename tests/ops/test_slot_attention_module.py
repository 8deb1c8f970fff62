"""The Slot Attention module against the literal algorithm, and the properties it promises."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import each_dtype

from iio_kernels import SlotAttentionWeights, slot_attention_module
from iio_kernels.testing.slot_attention_module import (
    BENCHMARKS,
    CASES,
    NAMES,
    Case,
    allowed_error,
    cast,
    literally,
    random_like,
    run,
)

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
assert_all_close = comparison(NAMES, 1e-11)


# --- the formula --------------------------------------------------------------------------------------------


@each_case
def test_module_equals_the_literal_algorithm(case, backend, device):
    arguments, options = case.make(device=device)
    if case.N == 0:  # where the literal algorithm divides by nothing, there are no updates
        x, slots, weights, T = arguments
        nothing = x.new_zeros(case.B, 1, case.Dx), slots, weights._replace(wv=0 * weights.wv), T
        expected = list(literally(nothing, **options, incoming=random_like(slots, x.new_zeros(case.B, case.K, 1))))
        got = run(arguments, backend, incoming=random_like(slots, x.new_zeros(case.B, case.K, 0)), **options)
        kept = [name not in ("attention", "dx", "dwq", "dwk", "dwv", "dnorm_slots_weight", "dnorm_slots_bias",
                             "dweight_ih", "dslots") for name in NAMES]  # fmt: skip
        for name, x, y, compared in zip(NAMES, got, expected, kept, strict=True):
            assert x.isfinite().all(), name
            if compared:
                torch.testing.assert_close(x, y)
        return
    assert_all_close(run(arguments, backend, **options), literally(arguments, **options))


@each_case
@each_dtype
def test_rounding_is_within_budget(case, dtype, backend, device):
    if case.N == 0:
        pytest.skip("there is no literal result")
    arguments, options = case.make(dtype, device)
    got = run(arguments, backend, **options)
    eager, truth = (literally(cast(arguments, kind), **options) for kind in (torch.float32, torch.float64))
    for name, x, rounded, exact in zip(NAMES, got, eager, truth, strict=True):
        kind = dtype if name == "dx" else torch.float32
        assert x.dtype == kind
        assert x.shape == exact.shape
        if exact.numel():
            assert (x.double() - exact).abs().max() <= allowed_error(exact, rounded.to(kind)), name


@pytest.mark.parametrize(
    ("x_dtype", "slots_dtype", "weights_dtype"), [(0, 32, 32), (32, 0, 16), (16, 32, 64), (64, 0, 32), (0, 64, 0)]
)
def test_mixed_dtypes(x_dtype, slots_dtype, weights_dtype, backend, device):
    kinds = {0: torch.bfloat16, 16: torch.float16, 32: torch.float32, 64: torch.float64}
    (x, slots, weights, T), _ = Case("mixed").make(torch.float16, device)
    x, slots = x.bfloat16().to(kinds[x_dtype]), slots.bfloat16().to(kinds[slots_dtype])
    weights = SlotAttentionWeights(*(w.bfloat16().half().to(kinds[weights_dtype]) for w in weights))
    got = run((x, slots, weights, T), backend)
    wide = kinds[max(x_dtype, slots_dtype, weights_dtype, 32)]
    assert [y.dtype for y in got] == [slots.dtype, wide, x.dtype, slots.dtype, *(w.dtype for w in weights)]
    exact = literally(cast((x, slots, weights, T), torch.float64), incoming=[y.double() for y in random_like(*got[:2])])
    for name, y, truth in zip(NAMES, got, exact, strict=True):
        relative = 64 * torch.finfo(wide).eps + 2 * torch.finfo(y.dtype).eps
        # A bias that all slots share changes no softmax over them: its gradient is the rounding of terms near 1.
        scale = 1 if name == "dnorm_slots_bias" else max(truth.abs().max(), 0.1)
        assert (y.double() - truth).abs().max() <= relative * scale, name


def test_iterations_go_on_where_others_ended(backend, device):
    (x, slots, weights, _), _ = Case("on").make(device=device)
    once = slot_attention_module(x, slots, weights, 2, backend=backend)
    again, attention = slot_attention_module(x, once, weights, 1, return_attention=True, backend=backend)
    expected = slot_attention_module(x, slots, weights, 3, return_attention=True, backend=backend)
    torch.testing.assert_close((again, attention), expected)


@pytest.mark.long("triton")
def test_order_of_slots_and_inputs_does_not_matter(backend, device):
    (x, slots, weights, T), _ = Case("order", K=7).make(device=device)
    s, n = torch.randperm(7, device=device), torch.randperm(37, device=device)
    out, attention, dx, dslots, *dweights = run((x, slots, weights, T), backend)
    d_out, d_attention = random_like(out, attention)
    got = run((x[:, n], slots[:, s], weights, T), backend, [d_out[:, s], d_attention[:, s][:, :, n]])
    assert_all_close(got, (out[:, s], attention[:, s][:, :, n], dx[:, n], dslots[:, s], *dweights))


def test_attention_is_a_softmax_over_slots(backend, device):
    arguments, _ = Case("softmax").make(device=device)
    _, attention = slot_attention_module(*arguments, return_attention=True, backend=backend)
    torch.testing.assert_close(attention.sum(1), torch.ones_like(attention[:, 0]))


# --- any shape ----------------------------------------------------------------------------------------------


@settings(max_examples=examples(25), deadline=None, derandomize=True)
@given(
    B=st.integers(0, 3),
    N=st.integers(1, 100),
    K=st.integers(1, 16),
    Dx=st.integers(1, 40),
    D=st.integers(1, 40),
    H=st.integers(1, 40),
    T=st.integers(1, 4),
)
def check_any_shape(backend, device, B, N, K, Dx, D, H, T):
    arguments, _ = Case("any", B, N, K, Dx, D, H, 8, T).make(device=device)
    assert_all_close(run(arguments, backend), literally(arguments), relative=1e-10)


@pytest.mark.long("triton")
def test_any_shape(backend, device):
    check_any_shape(backend, device)


# --- what it is measured on ---------------------------------------------------------------------------------


def test_bytes_and_flops_of_tetrominoes():
    case = BENCHMARKS["cpu"][0]
    assert case.bytes_moved(torch.float32) == 64 * 1225 * 32 * 4
    assert case.bytes_moved(torch.bfloat16, backward=True) == 2 * 64 * 1225 * 32 * 2
    # A slot's maps: to what x is compared with, to three gates from M and three from s, and the two of the MLP.
    maps = 64 * 32 + 3 * 64 * 32 + 3 * 64 * 64 + 2 * 64 * 128
    assert case.flops() == 2 * 64 * 3 * 4 * (2 * 1225 * 32 + maps)
    assert case.flops(backward=True) == 2 * 64 * 3 * 4 * (5 * 1225 * 32 + 2 * maps)
