"""`accelerate`: what is something else, or cannot be proved, is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from near_misses import OTHERS, keys_overwritten, partly_without_gradient
from running import WARNINGS, Step, results
from spellings import SPELLINGS, split_last
from torch import Tensor

from iio_kernels import accelerate
from iio_kernels.acceleration import Accelerated
from iio_kernels.acceleration.replacement import rewriting
from iio_kernels.runtime import backends
from iio_kernels.testing.families.family import SMALL, inputs_of, slots_of
from iio_kernels.testing.families.slotformer import SlotFormer

pytestmark = WARNINGS


@pytest.mark.parametrize(("attend", "reason"), OTHERS.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_near_misses_are_left_alone(attend: Callable[..., Tensor], reason: str):
    model, args = Step(attend), (torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    report = accelerate(model, *args)
    assert report.accelerated == []
    assert reason in report.entries[0].what
    assert "forward" not in vars(model)


def logits_set(q, k, v, some):
    logits = q @ k.mT
    logits[some] = -1e3
    A = logits.softmax(1)
    return A / A.sum(-1, keepdim=True) @ v


def weights_set(q, k, v, some):
    A = (q @ k.mT).softmax(1)
    W = A / A.sum(-1, keepdim=True)
    W[some] = 0
    return W @ v


def values_set(q, k, v, some):
    A = (q @ k.mT).softmax(1)
    W = A / A.sum(-1, keepdim=True)
    v[:, 2:] = 0
    return W @ v


def logits_set_by_a_view(q, k, v, some):
    logits = q @ k.mT
    logits.transpose(1, 2)[:, 2:].zero_()
    A = logits.softmax(1)
    return A / A.sum(-1, keepdim=True) @ v


def values_rectified(q, k, v, some):
    A = (q @ k.mT).softmax(1)
    F.leaky_relu(v, 0.3, True)
    return A / A.sum(-1, keepdim=True) @ v


def values_given_out(q, k, v, some):
    v = v.detach()
    A = (q @ k.mT).softmax(1).detach()
    torch.add(v, 1, out=v)
    return A / A.sum(-1, keepdim=True) @ v * q.mean()


def values_late(q, k, v, some):
    A = (q @ k.mT).softmax(1)
    v = v.square()
    with torch.no_grad():
        late = v * 2
    return A / A.sum(-1, keepdim=True) @ late.transpose(1, 2).mT, A


def masked_by_a_finite_number(q, k, v, some):
    A = (q @ k.mT).masked_fill(some.any(-1, keepdim=True), -1e9).softmax(1)
    return A / (A.sum(-1, keepdim=True) + 1e-8) @ v


@pytest.mark.parametrize(
    "attend",
    [logits_set, weights_set, values_set, logits_set_by_a_view, values_rectified, values_given_out, values_late,
     masked_by_a_finite_number],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_writes_and_moves_are_seen_without_an_example(attend: Callable):
    """Accelerated unseen, numbers are right: nothing but the graph tells what happens to the tensors."""

    class Sets(Step):
        def forward(self, x: Tensor, slots: Tensor, some: Tensor) -> Tensor:
            return attend(self.to_q(slots), self.to_k(x), self.to_v(x), some)

    model = Sets(None)
    args = torch.randn(2, 7, 10), torch.randn(2, 3, 8), torch.zeros(2, 3, 7, dtype=torch.bool)
    plain = copy.deepcopy(model)
    model.forward = Accelerated(model)
    for masked in (False, True):
        args[2][0] = masked
        for a, b in zip(results(model, args, {}), results(plain, args, {}), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attend", [*SPELLINGS, *OTHERS], ids=lambda f: f.__name__)
def test_numbers_without_an_example(attend: Callable):
    model, args = Step(attend), (torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    plain = copy.deepcopy(model)
    model.forward = Accelerated(model)
    for a, b in zip(results(model, args, {}), results(plain, args, {}), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_is_overwritten_is_not_read_afterwards():
    """Keys that hold something else by the end of the graph would be read too late."""
    model, args = Step(keys_overwritten), (torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    with torch.no_grad():
        expected = model(*args)
        accelerated = Accelerated(model)
        torch.testing.assert_close(accelerated(*args), expected)
    (calls, _), *_ = accelerated.log
    assert all("from_inputs" in call for call in calls)


def test_a_wrong_replacement_is_not_made(monkeypatch: pytest.MonkeyPatch):
    """The proof notices what recognition gets wrong: a scale, and an epsilon of 1e-8 that is in another place."""
    args = torch.randn(2, 7, 10), torch.randn(2, 3, 8)
    planned = rewriting.plan
    for wrong in ({"scale": 0.40001}, {"eps_in": "denominator"}, {"eps": 0.0}):

        def misread(update, wrong=wrong):
            call, sources = planned(update)
            call.options.update(wrong)
            return call, sources

        monkeypatch.setattr(rewriting, "plan", misread)
        report = accelerate(Step(split_last), *args)
        assert report.accelerated == []
        assert report.entries[0].what.startswith("in float64 what would replace it is")


def test_a_module_that_differs_is_not_replaced(monkeypatch: pytest.MonkeyPatch):
    """The second proof, on the example: whatever the first did not see."""
    args = torch.randn(2, 7, 10), torch.randn(2, 3, 8)
    monkeypatch.setattr(rewriting, "distance", lambda *_: 0.0)
    planned = rewriting.plan

    def misread(update):
        call, sources = planned(update)
        call.options["scale"] *= 1.001
        return call, sources

    monkeypatch.setattr(rewriting, "plan", misread)
    report = accelerate(Step(split_last), *args)
    assert report.accelerated == []
    assert "times rounding" in report.entries[0].what


def test_nothing_is_replaced_by_plain_pytorch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "choose", lambda *_: "reference")
    report = accelerate(SlotFormer(10, 2, 8, 12), inputs_of(SMALL), slots_of(SMALL))
    assert report.accelerated == []
    assert "no kernels serve cpu tensors here" in str(report)


def test_without_gradients_the_proof_has_them():
    model, args = Step(partly_without_gradient), (torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    whole = Step(split_last)
    with torch.inference_mode():
        assert accelerate(model, *args).accelerated == []
        assert accelerate(whole, *args).accelerated == [""]
