"""`accelerate`: assertions stay in the trace, and loops are traced in pieces."""

from __future__ import annotations

import contextlib
import contextvars
import math
import random
import re
from collections.abc import Callable

import pytest
import torch
from asserting import Asserts, AssertsNot, AssertsWithout, Iterations, Raises
from running import WARNINGS, Step, assert_same
from spellings import split_last
from torch import Tensor, nn

from iio_kernels import accelerate

pytestmark = WARNINGS


def modes() -> tuple[object, ...]:
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return nesting, torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled(), torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("region", "called_in"),
    [
        (lambda: torch.autocast("cpu", torch.bfloat16), contextlib.nullcontext),
        (lambda: torch.autocast("cpu", enabled=False), lambda: torch.autocast("cpu", torch.bfloat16)),
        (torch.no_grad, contextlib.nullcontext),
        (torch.enable_grad, torch.no_grad),
    ],
    ids=["autocast", "no autocast", "no_grad", "enable_grad"],
)
def test_a_check_that_fails_in_a_region_leaves_it(region: Callable, called_in: Callable):
    """Or gradients would stay off, and parameters go on as they were cast then."""

    class Checked(Step):
        def forward(self, x: Tensor, slots: Tensor) -> Tensor:
            updates = super().forward(x, slots)
            with region():
                doubled = 2 * updates
                if torch.isnan(doubled).any():
                    raise ArithmeticError
            return updates + 0 * doubled

    model, (x, slots) = Checked(split_last), (torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    assert accelerate(model, x, slots).accelerated == [""]
    with called_in():
        model(x, slots)
        before = modes()
        with pytest.raises(ArithmeticError):
            model(x * math.nan, slots)
        assert modes() == before
    assert model(x, slots).requires_grad


@pytest.mark.parametrize("kind", [Asserts, AssertsNot, AssertsWithout, Raises])
def test_assertions_in_the_loop(kind: type[Iterations]):
    """They stay in, and the trace is one."""
    model, args = kind(), (torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    report = accelerate(model, *args)
    assert report.entries[0].what.startswith("3 x slot_attention_from_inputs"), str(report)
    assert_same(model, args, {}, 2**-23)
    accelerate(model, *args)
    with pytest.raises(AssertionError, match="NaN in iteration 0"):
        model(args[0], args[1] * float("nan"))


class Counts(Iterations):
    """What it does before an assertion fails, it does once: to a buffer, to statistics, to a random generator."""

    def __init__(self, does: str) -> None:
        super().__init__()
        self.does, self.norm, self.counted = does, nn.BatchNorm1d(8, affine=False), []
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        if self.does in ("a function apart", "an attribute before"):
            self.counted.append(1)
        if self.does == "an attribute before":
            torch._dynamo.graph_break()
        return self.iterations(x, slots)

    def iterations(self, x: Tensor, slots: Tensor) -> Tensor:
        if self.does == "buffer":
            self.n += 1
        elif self.does == "a part of it":
            self.n.view(1)[0] = self.n + 1
        elif self.does == "a list":
            torch._foreach_add_([self.n], 1)
        elif self.does == "statistics":
            self.norm.num_batches_tracked = None
            self.norm(torch.ones_like(slots).mT)
        elif self.does == "draw":
            slots = slots + torch.randn_like(slots)
        elif self.does == "dropout":
            slots = nn.functional.dropout(slots)
        elif self.does == "python's":
            slots = slots + random.random()
        try:
            assert_finite(slots)
        except AssertionError:
            slots = slots.nan_to_num()
        if self.does == "a function apart":
            torch._dynamo.graph_break()
        return slots + split_last(self.to_q(slots), self.to_k(x), self.to_v(x))


def assert_finite(x: Tensor) -> None:
    if torch.isnan(x).any():
        raise AssertionError("NaN")


@pytest.mark.parametrize(
    "does",
    [
        "buffer",
        "a part of it",
        "a list",
        "statistics",
        "draw",
        "dropout",
        "python's",
        "a function apart",
        "an attribute before",
    ],
)
def test_what_comes_before_a_failed_assertion_is_done_once(does: str):
    args, found = (torch.randn(2, 7, 10), torch.randn(2, 8, 8)), []
    for accelerated in (False, True):
        torch.manual_seed(0), random.seed(0)
        model = Counts(does)
        if accelerated:
            assert accelerate(model, *args).accelerated == [""]
        with torch.no_grad():
            model(args[0], args[1] * math.nan)
        state = model.n, model.norm.running_mean, torch.get_rng_state()
        found.append((*(x.tolist() for x in state), model.counted, random.getstate()))
    assert str(found[0]) == str(found[1])  # NaN is NaN


@pytest.mark.parametrize("decorated", [False, True])
def test_nothing_before_an_assertion_leaves_it_in_the_trace(decorated: bool):
    """Nor do writes to what the trace makes, an eval mode's dropout, an attribute, nor a decorator of torch's."""

    class Writes(Asserts):
        def forward(self, x: Tensor, slots: Tensor) -> Tensor:
            self.steps = 3
            slots = nn.functional.dropout(slots.clone().mul_(2), training=self.training)
            return super().forward(x, slots)

    if decorated:
        Writes.forward = torch.autocast("cpu", enabled=False)(Writes.forward)
    args = torch.randn(2, 7, 10), torch.randn(2, 3, 8)
    model = Writes().eval()
    assert accelerate(model, *args).entries[0].what.startswith("3 x slot_attention_from_inputs")
    accelerate(model, *args)
    with pytest.raises(AssertionError, match="NaN in iteration 0") as raised:
        model(args[0], args[1] * math.nan)
    assert raised.value.__context__ is None


def test_calls_leave_nothing_in_the_context():
    """What a thread's context keeps, it keeps for ever."""
    model, args = Asserts(), (torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    accelerate(model, *args)
    model(*args)
    before = len(contextvars.copy_context())
    for _ in range(100):
        model(*args)
    assert len(contextvars.copy_context()) == before


class PrintsANumber(Iterations):
    def between(self, i: int, slots: Tensor) -> None:
        self.last = slots.mean().item()


class EndsByATensor(Iterations):
    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        for _ in range(3):
            slots = slots + split_last(self.to_q(slots), self.to_k(x), self.to_v(x))
            if slots.norm() < 0:
                break
        return slots


@pytest.mark.parametrize("kind", [PrintsANumber, EndsByATensor])
def test_loops_that_are_traced_in_pieces(kind: type[Iterations]):
    model, args = kind(), (torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    report = accelerate(model, *args)
    assert report.accelerated == [""], str(report)
    assert sum(map(int, re.findall(r"(\d+) x slot_attention", report.entries[0].what))) == 3
    assert_same(model, args, {}, 2**-23)
