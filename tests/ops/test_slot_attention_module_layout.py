"""The Slot Attention module of tensors and gradients in any strides."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison
from torch import Tensor

from iio_kernels import SlotAttentionWeights
from iio_kernels.testing.slot_attention_module import (
    NAMES,
    Case,
    random_like,
    run,
)

OPERATION = "slot_attention_module"
NAN = float("nan")
assert_all_close = comparison(NAMES, 1e-11)


def _strided(x: Tensor, how: str) -> Tensor:
    """The same values under other strides."""
    if how == "transposed":
        return x.mT.contiguous().mT if x.dim() > 1 else x.repeat_interleave(2)[::2]
    if how == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), NAN).to(x)
        return wide[..., 1::2].copy_(x)
    if how == "rows sliced":
        wide = torch.full((*x.shape[:-2], 3 * x.shape[-2], x.shape[-1]), NAN).to(x) if x.dim() > 1 else None
        return x.repeat_interleave(3)[::3] if wide is None else wide[..., ::3, :].copy_(x)
    if how == "expanded":
        return x[:1].expand_as(x)
    if how == "of one number":
        return x.flatten()[0].expand_as(x)
    raise ValueError(how)


each_stride = pytest.mark.parametrize("how", ["transposed", "sliced", "rows sliced", "expanded", "of one number"])


@pytest.mark.long("triton")
@each_stride
@pytest.mark.parametrize("Dx", [8, 5])
def test_strided_inputs(how, Dx, backend, device):
    (x, slots, weights, T), _ = Case("strided", B=3, Dx=Dx).make(device=device)
    views = [_strided(y, how) for y in (x, slots, *weights)]
    assert not any(y.is_contiguous() for y in views)
    dense = [y.clone(memory_format=torch.contiguous_format) for y in views]
    got, expected = (run((y[0], y[1], SlotAttentionWeights(*y[2:]), T), backend) for y in (views, dense))
    assert_all_close(got, expected)


@pytest.mark.long("triton")
@each_stride
def test_strided_incoming_gradients(how, backend, device):
    arguments, _ = Case("strided", B=3).make(device=device)
    incoming = [_strided(y, how) for y in random_like(*run(arguments, backend)[:2])]
    assert not any(y.is_contiguous() for y in incoming)
    assert_all_close(run(arguments, backend, incoming), run(arguments, backend, [y.contiguous() for y in incoming]))


@pytest.mark.long("triton")
def test_sum_sends_gradients_of_stride_zero(backend, device):
    arguments, _ = Case("stride 0").make(device=device)
    out, attention = run(arguments, backend)[:2]
    incoming = [y.new_ones(()).expand_as(y) for y in (out, attention)]
    assert_all_close(run(arguments, backend, incoming), run(arguments, backend, [y.contiguous() for y in incoming]))


def test_offsets_beyond_32_bits(backend, device):
    """In memory that is never touched, so that it costs nothing."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    (x, slots, weights, T), _ = Case("far", B=1, N=2, Dx=3).make(torch.bfloat16, device)
    try:
        memory = torch.empty(2**31 + 3, dtype=x.dtype, device=device)
    except RuntimeError:
        pytest.skip("no 4 GiB of addresses")
    view = memory.as_strided(x.shape, (0, 2**31, 1)).copy_(x)
    assert_all_close(run((view, slots, weights, T), backend), run((x, slots, weights, T), backend))
