"""The compiled CPU kernels on large shapes drawn at random."""

from __future__ import annotations

import torch
from cpu_operators import (
    F32,
    _one_thread,  # noqa: F401
    threads,
)
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from iio_kernels import (
    conditional_entropies,
    inpaint,
)
from iio_kernels.testing import iio_loss as iio_spec
from iio_kernels.testing import slot_attention as attention_spec


@settings(max_examples=examples(100), deadline=None, derandomize=True)
@given(
    batch=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    K=st.integers(1, 16),
    N=st.one_of(st.integers(0, 3000), st.sampled_from([0, 1, 32, 33, 1024, 1025, 2048, 2049])),
    Dk=st.integers(1, 70),
    Dv=st.integers(1, 70),
    options=st.sampled_from([{}, {"eps_in": "denominator"}, {"normalize": "sum"}, {"eps": 0.5}]),
    slots=st.sampled_from(["all", "some", "shared"]),
    inputs=st.sampled_from(["all", "some", "shared", "none"]),
    joint_heads=st.booleans(),
)
def test_any_large_shape(batch, K, N, Dk, Dv, options, slots, inputs, joint_heads):
    options = options | {"joint_heads": joint_heads and len(batch) > 0}
    case = attention_spec.Case("any", batch, K, N, Dk, Dv, options, slots, inputs)
    tensors, options = case.make(F32)
    got = attention_spec.run(tensors, "cpu", **options)
    eager = attention_spec.run(tensors, "reference", **options)
    truth = attention_spec.run([x.double() for x in tensors], "reference", **options)
    for name, x, plain, exact in zip(attention_spec.NAMES, got, eager, truth, strict=True):
        assert x.shape == exact.shape
        if exact.numel():
            allowed = attention_spec.allowed_error(exact, plain)
            if N < 4 and name in ("dq", "dk"):
                # U is close to a value, and what goes through it the rounding of terms that cancel.
                allowed += 100 * torch.finfo(F32).eps
            assert (x.double() - exact).abs().max() <= allowed, name


@settings(max_examples=examples(40), deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    C=st.integers(1, 7),
    K=st.integers(2, 6),
    H=st.integers(1, 40),
    W=st.one_of(st.integers(1, 40), st.sampled_from([8, 16, 32, 48])),
    half=st.integers(0, 7),
    repeats=st.integers(1, 3),
    number=st.integers(1, 3),
)
def test_any_large_image(B, C, K, H, W, half, repeats, number):
    kernel_size = 2 * min(half, (min(H, W) - 1) // 2) + 1
    options = {"sigma": 3.0, "kernel_size": kernel_size, "repeats": repeats}
    tensors, options = iio_spec.Case("any", B, C, K, H, W, options).make()
    for function in (conditional_entropies, inpaint):
        incoming = torch.randn_like(function(*tensors, backend="reference", **options))
        expected = iio_spec.results(function, *tensors, incoming, backend="reference", **options)
        with threads(number):
            got = iio_spec.results(function, *tensors, incoming, backend="cpu", **options)
        if kernel_size == 1 and function is conditional_entropies:  # residuals are rounding errors, and their signs
            got, expected = got[:1] * 3, expected[:1] * 3
        # Of images of a pixel the gradients cancel to the rounding of their terms.
        iio_spec.assert_all_close(got, expected, relative=1e-9, absolute=1e-13)
