"""Slot attention against the literal formula, and the properties it promises."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import each_dtype

from iio_kernels import slot_attention
from iio_kernels.testing.slot_attention import (
    BENCHMARKS,
    CASES,
    NAMES,
    Case,
    allowed_error,
    literal_slot_attention,
    results,
    run,
)

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
assert_all_close = comparison(NAMES, 1e-11)


# --- the formula --------------------------------------------------------------------------------------------


@each_case
def test_equals_the_literal_formula(case, backend, device):
    tensors, options = case.make(device=device)
    assert_all_close(run(tensors, backend, **options), results(literal_slot_attention, tensors, **options))


@each_case
@each_dtype
def test_error_is_within_budget(case, dtype, backend, device):
    tensors, options = case.make(dtype, device)
    random = torch.Generator().manual_seed(2)
    shapes = [(*x.shape[:-1], d) for x, d in ((tensors[0], case.Dv), (tensors[0], case.N))]
    incoming = [torch.randn(shape, generator=random).to(dtype).to(device) for shape in shapes]
    got = run(tensors, backend, incoming, **options)
    eager = results(literal_slot_attention, tensors, incoming, **options)
    doubles = [x.double() for x in tensors], [x.double() for x in incoming]
    truth = results(literal_slot_attention, *doubles, **options)
    for name, x, plain, exact in zip(NAMES, got, eager, truth, strict=True):
        assert x.dtype == dtype
        assert x.shape == exact.shape
        if exact.numel():
            allowed = allowed_error(exact, plain)
            if case.N == 1 and name in ("dq", "dk"):
                # The only input has weight 1 whatever q and k: through U their gradient is the rounding of
                # equal terms that cancel, which the literal formula never adds.
                allowed += 100 * torch.finfo(dtype).eps
            assert (x.double() - exact).abs().max() <= allowed, name


@pytest.mark.parametrize("dtypes", [(16, 32, 64), (32, 16, 16), (64, 32, 16), (16, 0, 32)])
def test_mixed_dtypes(dtypes, backend, device):
    kinds = {0: torch.bfloat16, 16: torch.float16, 32: torch.float32, 64: torch.float64}
    (q, k, v), _ = Case("mixed").make(device=device)
    tensors = [x.to(kinds[bits]) for x, bits in zip((q, k, v), dtypes, strict=True)]
    got = run(tensors, backend)
    assert [x.dtype for x in got] == [kinds[dtypes[i]] for i in (2, 2, 0, 1, 2)]
    exact = results(literal_slot_attention, [x.double() for x in tensors])
    for x, y in zip(got, exact, strict=True):
        # The incoming gradients were rounded to v's dtype as well.
        finest = torch.finfo(x.dtype).eps + torch.finfo(got[0].dtype).eps
        assert (x.double() - y).abs().max() <= 4 * finest * y.abs().max()


def test_scale_defaults_to_the_width_of_a_key(backend, device):
    (q, k, v), _ = Case("scale", Dk=9, Dv=4).make(device=device)
    torch.testing.assert_close(
        slot_attention(q, k, v, backend=backend), slot_attention(q, k, v, scale=1 / 3, backend=backend)
    )


def test_joint_heads_is_one_softmax_over_concatenated_slots(backend, device):
    (q, k, v), _ = Case("joint", batch=(2, 3), K=4, N=13).make(device=device)
    U, A = slot_attention(q, k, v, joint_heads=True, return_attention=True, backend=backend)
    logits = torch.cat([q[:, h] @ k[:, h].mT / 4 for h in range(3)], 1)
    expected = logits.softmax(1).unflatten(1, (3, 4))
    torch.testing.assert_close(A, expected)
    W = expected + 1e-8
    torch.testing.assert_close(U, (W / W.sum(-1, keepdim=True)) @ v)
    assert not torch.allclose(A, slot_attention(q, k, v, return_attention=True, backend=backend)[1])


def test_attention_is_that_before_eps(backend, device):
    (q, k, v), _ = Case("eps").make(device=device)
    _, small = slot_attention(q, k, v, return_attention=True, backend=backend)
    _, large = slot_attention(q, k, v, eps=10.0, return_attention=True, backend=backend)
    assert torch.equal(small, large)
    torch.testing.assert_close(small.sum(-2), torch.ones_like(small[:, 0]))


def test_attention_does_not_change_the_update(backend, device):
    (q, k, v), _ = Case("attention").make(device=device)
    U, _ = slot_attention(q, k, v, return_attention=True, backend=backend)
    assert torch.equal(slot_attention(q, k, v, backend=backend), U)


# --- symmetry -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"eps_in": "denominator", "eps": 1.0}, {"normalize": "sum"}], ids=str)
def test_permuting_slots_permutes_updates_and_permuting_inputs_changes_nothing(options, backend, device):
    """Proposition 1 of Slot Attention."""
    (q, k, v), _ = Case("permuted", K=7).make(device=device)
    slots, inputs = torch.randperm(7, device=device), torch.randperm(37, device=device)
    U, A = slot_attention(q, k, v, return_attention=True, backend=backend, **options)
    U_slots, A_slots = slot_attention(q[:, slots], k, v, return_attention=True, backend=backend, **options)
    torch.testing.assert_close(U_slots, U[:, slots])
    torch.testing.assert_close(A_slots, A[:, slots])
    permuted = q, k[:, inputs], v[:, inputs]
    U_inputs, A_inputs = slot_attention(*permuted, return_attention=True, backend=backend, **options)
    torch.testing.assert_close(U_inputs, U)
    torch.testing.assert_close(A_inputs, A[..., inputs])


# --- any shape ----------------------------------------------------------------------------------------------


@settings(max_examples=examples(40), deadline=None, derandomize=True)
@given(
    batch=st.lists(st.integers(0, 3), max_size=2).map(tuple),
    K=st.integers(1, 12),
    N=st.integers(0, 20),
    Dk=st.integers(1, 9),
    Dv=st.integers(0, 9),
    eps=st.sampled_from([0.0, 1e-8, 0.5]),
    eps_in=st.sampled_from(["weights", "denominator"]),
    normalize=st.sampled_from(["mean", "sum"]),
    slots=st.sampled_from(["all", "some", "shared", "none"]),
    inputs=st.sampled_from(["all", "some", "shared", "none"]),
    joint_heads=st.booleans(),
)
def check_any_shape(backend, device, batch, K, N, Dk, Dv, eps, eps_in, normalize, slots, inputs, joint_heads):
    options = {
        "eps": eps,
        "eps_in": eps_in,
        "normalize": normalize,
        "joint_heads": joint_heads and len(batch) > 0 and batch[-1] > 0,
    }
    tensors, options = Case("any", batch, K, N, Dk, Dv, options, slots, inputs).make(device=device)
    assert_all_close(run(tensors, backend, **options), results(literal_slot_attention, tensors, **options))


@pytest.mark.long("triton")
def test_any_shape(backend, device):
    check_any_shape(backend, device)


# --- what it is measured on ---------------------------------------------------------------------------------


def test_bytes_and_flops_of_tetrominoes():
    case = BENCHMARKS["cpu"][0]
    # 64 images: 4 queries, 1225 keys and 1225 values of 64 numbers in, 4 updates out.
    assert case.bytes_moved(torch.float32) == 64 * 4 * 64 * (4 + 1225 + 1225 + 4)
    assert case.bytes_moved(torch.bfloat16, backward=True) == 64 * 2 * 64 * (2 * (4 + 1225 + 1225) + 4)
    assert case.flops() == 2 * 64 * 1225 * 4 * (64 + 64)
    assert case.flops(backward=True) == 2 * 64 * 1225 * 4 * 5 * 64
