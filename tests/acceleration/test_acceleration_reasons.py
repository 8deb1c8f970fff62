"""`accelerate`: the report says why what is left alone is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from asserting import Iterations
from near_misses import dropped_out, ordinary
from running import WARNINGS, Step
from spellings import split_last
from torch import Tensor, nn

from iio_kernels import accelerate

pytestmark = WARNINGS


def test_other_modules_reasons_are_not_taken():
    """An attention inside, to a memory, which counts by NumPy."""

    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys = nn.Parameter(torch.randn(5, 8))

        def forward(self, slots: Tensor) -> Tensor:
            rows = slots.reshape(int(np.prod(slots.shape[:-1])), -1)
            return ((rows @ self.keys.T).softmax(-1) @ self.keys).view(slots.shape)

    class Outer(Iterations):
        def __init__(self, attend: Callable) -> None:
            super().__init__()
            self.attend, self.memory = attend, Memory()

        def forward(self, x: Tensor, slots: Tensor) -> Tensor:
            for _ in range(3):
                slots = self.memory(slots)
                slots = slots + self.attend(self.to_q(slots), self.to_k(x), self.to_v(x))
            return slots

    args = torch.randn(2, 7, 10), torch.randn(2, 3, 8)
    outer, memory = accelerate(Outer(split_last), *args).entries
    assert outer.accelerated
    assert outer.what.startswith("3 x slot_attention_from_inputs")
    assert "ordinary attention" in memory.what
    outer, memory = accelerate(Outer(dropped_out), *args).entries
    assert outer.what == "its attention goes through 'dropout', which is not known there"
    assert "ordinary attention" in memory.what


def test_what_is_left_of_a_module_is_told():
    """One of three iterations replaced, and why the others are not."""

    class Partly(Step):
        def forward(self, x: Tensor, slots: Tensor) -> Tensor:
            q, k, v = self.to_q(slots), self.to_k(x), self.to_v(x)
            return dropped_out(q, k, v) + split_last(q, k, v) + ordinary(q, k, v)

    report = accelerate(Partly(None), torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    what = report.entries[0].what
    assert what.startswith("1 of 3: 1 x slot_attention_from_inputs"), what
    assert "the others: its attention goes through 'dropout'" in what
    assert "ordinary attention" in what


def test_what_cannot_be_traced_says_where():
    class Shows(Step):
        def forward(self, x: Tensor, slots: Tensor) -> Tensor:
            A = (self.to_q(slots) @ self.to_k(x).mT).softmax(1)
            self.shown = A.detach().tolist()
            return A / A.sum(-1, keepdim=True) @ self.to_v(x)

    report = accelerate(Shows(None), torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    assert report.accelerated == []
    line = Shows.forward.__code__.co_firstlineno + 2
    assert f"torch.compile stops at {__file__}:{line}: " in report.entries[0].what


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripted_slot_attention_says_so():
    class Scripted(nn.Module):
        def forward(self, x: Tensor, slots: Tensor) -> Tensor:
            A = (slots @ x.mT).softmax(1) + 1e-8
            return A / A.sum(-1, keepdim=True) @ x

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.jit.script(Scripted())

        def forward(self, x: Tensor, slots: Tensor) -> Tensor:
            return self.inner(x, slots)

    for model, path in ((torch.jit.script(Scripted()), ""), (Holds(), "inner")):
        (entry,) = accelerate(model, torch.randn(2, 7, 8), torch.randn(2, 3, 8)).entries
        assert (entry.path, entry.kind, entry.accelerated) == (path, "Scripted", False)
        assert "ScriptModule" in entry.what
