"""Slot attention whose forward changes something: of the module, or of its surroundings."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SEEN: list[int] = []


COUNT = 0


class Attention(nn.Module):
    """Slot attention, and before it `change`, which does something to the module."""

    shared = 0

    def __init__(self, change: Callable[[Attention, Tensor], Any], **held: Any) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.change = change
        for name, x in held.items():
            self.register_buffer(name, x) if isinstance(x, Tensor) else setattr(self, name, x)

    def forward(self, x: Tensor) -> Tensor:
        self.change(self, x)
        A = (self.to_q(x[:, :3]) @ self.to_k(x).mT).softmax(1) + 1e-8
        return A / A.sum(-1, keepdim=True) @ self.to_v(x)


class Around(nn.Module):
    """A model that holds it."""

    def __init__(self, *args: Any, **held: Any) -> None:
        super().__init__()
        self.attention = Attention(*args, **held)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x).square()


class Ema:
    """Not a module, though it holds what one does."""

    __slots__ = ("average", "steps")

    def __init__(self) -> None:
        self.average, self.steps = torch.zeros(8), 0

    def update(self, x: Tensor) -> None:
        with torch.no_grad():
            self.average.lerp_(x.mean((0, 1)), 0.1)
        self.steps += 1


def codebook(m: Attention, x: Tensor) -> None:
    with torch.no_grad():
        m.code.weight.data.mul_(0.5).add_(x.mean((0, 1)))


def teacher(m: Attention, x: Tensor) -> None:
    with torch.no_grad():
        for theirs, ours in zip(m.teacher[0].parameters(), m.to_q.parameters(), strict=True):
            theirs.mul_(0.9).add_(ours, alpha=0.1)


def own_weights(m: Attention, x: Tensor) -> None:
    m.to_k.weight.data.div_(m.to_k.weight.data.norm()).mul_(m.to_k.bias.data.add_(0.1).norm())


def containers(m: Attention, x: Tensor) -> None:
    m.counts[0] += 1
    m.queue.append(x.detach())
    m.nested["of"][-1]["lists"].append(len(m.nested["of"]))
    m.nested[len(m.nested)] = x.shape
    m.names.add(len(m.names))
    m.ordered.move_to_end("a")
    m.counter.update(["a", "b"])
    m.array += 1
    m.simple.steps += 1


def attributes(m: Attention, x: Tensor) -> None:
    m.steps = getattr(m, "steps", 0) + 1
    m.training = not m.training
    m.lazy = x.detach().mean((0, 1)) if m.lazy is None else m.lazy + 1
    m.new = nn.Linear(2, 2)
    del m.old
    m.old = [1]
    type(m).shared += 1


def gradients(m: Attention, x: Tensor) -> None:
    with torch.enable_grad():
        m.to_v(x.detach()).sum().backward()
    m.to_q.weight.requires_grad_(not m.to_q.weight.requires_grad)


def buffers(m: Attention, x: Tensor) -> None:
    m.mean.mul_(0.9).add_(m.to_k(x).mean((0, 1)))
    m.first[0] += 1
    m.grown.resize_(16)[8:] = 1
    m.moved.data = torch.ones(3, dtype=torch.float64)
    m.sparse._values().add_(1)


def generators(m: Attention, x: Tensor) -> None:
    torch.rand(1), torch.rand(1, generator=m.torch)
    random.random(), m.python.random()
    np.random.rand(), m.numpy.random(), m.old.rand()  # noqa: NPY002


def surroundings(m: Attention, x: Tensor) -> None:
    global COUNT
    COUNT += 1
    SEEN.append(COUNT)
    m.ema.update(x)


def nothing(m: Attention, x: Tensor) -> None:
    pass
