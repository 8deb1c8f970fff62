"""Slot attention of masked slots and inputs, which are never read."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison

from iio_kernels import slot_attention
from iio_kernels.testing.slot_attention import (
    CASES,
    NAMES,
    Case,
    case_named,
    run,
)

OPERATION = "slot_attention"
MASKED = [case for case in CASES if case.slots != "all" or case.inputs != "all"]
assert_all_close = comparison(NAMES, 1e-11)


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
@pytest.mark.parametrize("filling", [float("nan"), float("inf")])
def test_what_is_masked_is_never_read(case, filling, backend, device):
    tensors, options = case.make(device=device)
    q, k, v = (x.clone() for x in tensors)
    if "slot_mask" in options:
        q[~options["slot_mask"].expand(q.shape[:-1])] = filling
    if "input_mask" in options:
        off = ~options["input_mask"].expand(k.shape[:-1])
        k[off] = v[off] = filling
    expected = run(tensors, backend, **options)
    got = run((q, k, v), backend, **options)
    assert all(x.isfinite().all() for x in got)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_gradients_at_masked_attention_are_never_read(case, backend, device):
    """As log(A) sends them: 0 / 0 where A is 0."""
    tensors, options = case.make(device=device)
    dU, dA = torch.randn(*tensors[0].shape[:-1], case.Dv), torch.randn(*tensors[0].shape[:-1], case.N)
    dU, dA = dU.to(tensors[0]), dA.to(tensors[0])
    off = torch.zeros_like(dA, dtype=torch.bool)
    if "slot_mask" in options:
        off |= ~options["slot_mask"].unsqueeze(-1)
    if "input_mask" in options:
        off |= ~options["input_mask"].unsqueeze(-2)
    expected = run(tensors, backend, (dU, dA.masked_fill(off, 0)), **options)
    got = run(tensors, backend, (dU, dA.masked_fill(off, float("nan"))), **options)
    assert_all_close(got, expected)


@pytest.mark.parametrize("name", ["both masks", "joint heads, masks"])
def test_a_gradient_of_nan_stays_out_of_what_is_masked(name, backend, device):
    tensors, options = case_named(name).make(device=device)
    slots, inputs = options["slot_mask"], options["input_mask"]
    U, A = slot_attention(*tensors, return_attention=True, backend=backend, **options)
    incoming = torch.full_like(U, float("nan")), torch.full_like(A, float("nan"))
    _, _, dq, dk, dv = run(tensors, backend, incoming, **options)
    assert (dq[~slots] == 0).all()
    assert (dk[~inputs] == 0).all()
    assert (dv[~inputs] == 0).all()
    assert dv[inputs].isnan().all()


def test_masked_slots_and_inputs_have_no_attention_and_no_gradient(backend, device):
    tensors, options = case_named("both masks").make(device=device)
    U, A, dq, dk, dv = run(tensors, backend, **options)
    slots, inputs = options["slot_mask"], options["input_mask"]
    assert (A[~slots] == 0).all()
    assert (A.mT[~inputs] == 0).all()
    assert (dq[~slots] == 0).all()
    assert (dk[~inputs] == 0).all()
    assert (dv[~inputs] == 0).all()
    torch.testing.assert_close(A.sum(1)[1], inputs[1].to(A))
    # eps still applies to a masked slot: it takes the plain mean of the inputs.
    mean = tensors[2][1][inputs[1]].mean(0)
    torch.testing.assert_close(U[1][~slots[1]], mean.expand(int((~slots[1]).sum()), -1))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 4), (3, 1), (2, 1, 4), (2, 1, 1), (2, 3, 4)], ids=str)
def test_masks_broadcast(shape, backend, device):
    (q, k, v), _ = Case("broadcast", batch=(2, 3), K=4, N=4).make(device=device)
    mask = torch.rand(shape, device=device) < 0.6
    whole = mask.expand(2, 3, 4).contiguous()
    for name in ("slot_mask", "input_mask"):
        assert_all_close(run((q, k, v), backend, **{name: mask}), run((q, k, v), backend, **{name: whole}))


def test_a_mask_of_ones_changes_nothing(backend, device):
    tensors, _ = Case("ones").make(device=device)
    masks = {
        name: torch.ones(2, n, dtype=torch.bool, device=device) for name, n in (("slot_mask", 4), ("input_mask", 37))
    }
    assert_all_close(run(tensors, backend, **masks), run(tensors, backend))


def test_padding_equals_leaving_out(backend, device):
    (q, k, v), _ = Case("padded").make(device=device)
    mask = (torch.arange(37) < 30).to(device)
    U, A, dq, dk, dv = run((q, k, v), backend, (q, torch.zeros(2, 4, 37).to(q)), input_mask=mask)
    short = run((q, k[:, :30], v[:, :30]), backend, (q, torch.zeros(2, 4, 30).to(q)))
    assert_all_close((U, A[..., :30], dq, dk[:, :30], dv[:, :30]), short)
