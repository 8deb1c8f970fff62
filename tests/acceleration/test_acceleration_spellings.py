"""`accelerate`: slot attention is found however it is spelt, masked, biased or scaled."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from running import WARNINGS, Step, assert_same, results
from spellings import (
    SPELLINGS,
    at_least,
    background,
    background_of_weights,
    background_without_a_mean,
    finite_fill,
    infinite_mask_added,
    mask_added,
    masked_inputs_at_least,
    split_last,
)
from torch import Tensor, nn

from iio_kernels import accelerate
from iio_kernels.acceleration import Accelerated
from iio_kernels.runtime import backends

pytestmark = WARNINGS


@pytest.mark.parametrize("attend", SPELLINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_spellings(attend: Callable[..., Tensor], precision: str):
    model, args = Step(attend), (torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        report = accelerate(model, *args)
        assert report.accelerated == [""], str(report)
        assert report.entries[0].what.startswith("1 x slot_attention_from_inputs")
        assert_same(model, args, {}, 2**-8 if precision == "autocast" else 2**-23)


@pytest.mark.parametrize(
    "attend",
    [at_least, masked_inputs_at_least, mask_added, infinite_mask_added, finite_fill, background, background_of_weights],
    ids=lambda f: f.__name__,
)
def test_spellings_on_triton(attend: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch):
    """The kernels of a GPU in Triton's interpreter."""
    if backends.BACKENDS["triton"].refuses(torch.device("cpu")) is not None:
        pytest.skip("Triton's interpreter is off")
    monkeypatch.setattr(backends, "choose", lambda *_: "triton")
    model, args = Step(attend), (torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    model.forward = Accelerated(model)
    assert_same(model, args, {}, 2**-23)


@pytest.mark.parametrize("attend", [background, background_without_a_mean], ids=lambda f: f.__name__)
def test_keys_without_a_bias_are_the_same_in_every_view(attend: Callable[..., Tensor]):
    model, args = Step(attend), (torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    for layer in (model.to_q, model.to_k, model.to_v):
        layer.bias = None
    report = accelerate(model, *args)
    assert report.accelerated == [""], str(report)
    assert_same(model, args, {}, 2**-23)


@pytest.mark.parametrize(
    ("way", "low"),
    [("added", -1e9), ("added", torch.finfo(torch.float32).min), ("added", -math.inf), ("filled", -1e9),
     ("filled", torch.finfo(torch.float32).min), ("filled", -math.inf)],
)  # fmt: skip
def test_an_image_without_slots(low: float, way: str):
    """What the module does where all slots of an image are masked: the values' mean, or NaN."""

    class Masked(Step):
        def forward(self, x: Tensor, slots: Tensor, out: Tensor) -> Tensor:
            logits = self.to_q(slots) @ self.to_k(x).mT
            if way == "added":
                logits = logits + torch.zeros(out.shape).masked_fill(out, low).unsqueeze(-1)
            else:
                logits = logits.masked_fill(out.unsqueeze(-1), low)
            A = logits.softmax(1)
            return A / (A.sum(-1, keepdim=True) + 1e-8) @ self.to_v(x)

    model, out = Masked(None), torch.tensor([[False, True, False], [False, False, True]])
    plain, args = copy.deepcopy(model), (torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    assert accelerate(model, *args, out).accelerated == [""]
    out[1] = True
    for a, b in zip(results(model, (*args, out), {}), results(plain, (*args, out), {}), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pieces", [lambda kv: kv.chunk(2, -1), lambda kv: torch.split(kv, [6, 6], dim=2)])
def test_keys_and_values_of_one_layer(pieces: Callable, bias: bool):
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_kv = nn.Linear(8, 6), nn.Linear(10, 12, bias=bias)

        def forward(self, x: Tensor, slots: Tensor) -> Tensor:
            return split_last(self.to_q(slots), *pieces(self.to_kv(x)))

    model, args = Packed(), (torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    report = accelerate(model, *args)
    assert report.accelerated == [""], str(report)
    assert "slot_attention_from_inputs" in report.entries[0].what
    assert_same(model, args, {}, 2**-23)


def test_two_products_of_one_attention():
    """The first takes the attention's place, and the second its own of what is left."""

    def attend(q, k, v):
        A = (q @ k.mT).softmax(1) + 1e-8
        W = A / A.sum(-1, keepdim=True)
        return W @ v, W @ v.square(), A

    model, args = Step(attend), (torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    report = accelerate(model, *args)
    assert len(report.entries) == 1
    assert_same(model, args, {}, 2**-23)


def test_a_learnt_temperature_is_no_softmax():
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_temperature = nn.Parameter(torch.randn(()))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            A = (q @ k.mT * self.log_temperature.exp()).softmax(-2) + 1e-8
            return A / A.sum(-1, keepdim=True) @ v

    args = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    (entry,) = accelerate(Tempered(), *args).entries
    assert entry.what.startswith("1 x slot_attention"), entry.what


class Tempered(Step):
    """Logits by a temperature that is learnt, or that a schedule sets."""

    def __init__(self, temperature: object) -> None:
        super().__init__(None)
        self.temperature = temperature

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        A = (self.to_q(slots) @ self.to_k(x).mT / self.temperature).softmax(1) + 1e-8
        return A / A.sum(-1, keepdim=True) @ self.to_v(x)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_a_learnt_temperature(shape: tuple[int, ...]):
    model = Tempered(nn.Parameter(torch.full(shape, 1.7)))
    args = torch.randn(2, 7, 10), torch.randn(2, 3, 8)
    assert accelerate(model, *args).accelerated == [""]
    assert_same(model, args, {}, 2**-23)


def test_a_scheduled_temperature():
    """A number that is another at each call is traced again once, not each time."""
    model, args = Tempered(1.7), (torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    plain = copy.deepcopy(model)
    accelerate(model, *args)
    for n in range(12):
        model.temperature = plain.temperature = 1.0 + 0.1 * n
        torch.testing.assert_close(model(*args), plain(*args), rtol=1e-4, atol=1e-5)
    log = model.forward.log
    assert len(log) <= 3
    assert all(len(calls) == 1 for calls, _ in log)


@pytest.mark.parametrize("view", [lambda x, like: x.view_as(like), lambda x, like: x.reshape_as(like)])
def test_slots_are_queries(view: Callable):
    class Means(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRUCell(8, 8)

        def forward(self, x: Tensor, slots: Tensor) -> Tensor:
            for _ in range(3):
                updates = split_last(slots, x, x)
                slots = view(self.gru(updates.flatten(0, 1), slots.flatten(0, 1)), slots)
            return slots

    model, args = Means(), (torch.randn(2, 7, 8), torch.randn(2, 3, 8))
    report = accelerate(model, *args)
    assert report.entries[0].what.startswith("3 x slot_attention ("), str(report)
    assert_same(model, args, {}, 2**-23)
