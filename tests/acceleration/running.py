"""What tests of `accelerate` share: models, and their results beside those in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from iio_kernels import restore
from iio_kernels.testing.families.slotformer import SlotFormer

#: What tests of `accelerate` do not mind.
WARNINGS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # torch.compile looks at what it is given, and hushes this up unless warnings are errors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def without_noise(model: nn.Module, num_slots: int) -> nn.Module:
    """Initial slots that are drawn are learnt, one by one: float64 would draw other numbers than float32."""
    for name, parameter in list(model.named_parameters(recurse=False)):
        if "sigma" in name:
            nn.init.constant_(parameter, -80.0 if "log" in name else 0.0)
            mu = next(other for other, _ in model.named_parameters(recurse=False) if other.endswith("mu"))
            shape = getattr(model, mu).shape
            setattr(model, mu, nn.Parameter(torch.randn(*shape[:-2], num_slots, shape[-1])))
    return model


def results(model: nn.Module, args: tuple, kwargs: dict) -> list[Tensor]:
    """Outputs and gradients to inputs and parameters."""
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        x = x.detach().clone()
        if x.is_floating_point():
            leaves.append(x.requires_grad_())
        return x

    args, kwargs = tree_map_only(Tensor, leaf, (args, kwargs))
    torch.manual_seed(1)
    outputs = [x for x in tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor)]
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    leaves += model.parameters()
    return outputs + list(torch.autograd.grad(outputs, leaves, weights, materialize_grads=True, allow_unused=True))


def assert_same(model: nn.Module, args: tuple, kwargs: dict, eps: float) -> None:
    """Accelerated, a model is at most twice as far from float64 as by itself.

    (Some gradients are exactly 0, sums of terms that cancel: what is rounded there are the terms.)
    """
    exact = copy.deepcopy(model)
    restore(exact)
    wide = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, (args, kwargs))
    with torch.autocast("cpu", enabled=False):
        truth = results(exact.double(), *wide)
    ours = results(model, args, kwargs)
    restore(model)
    plain = results(model, args, kwargs)
    largest = max(x.abs().max().item() for x in truth)
    for a, b, c in zip(ours, plain, truth, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        error, allowed = ((x.double() - c).abs().max().item() for x in (a, b))
        assert error <= 2 * allowed + eps * (4 * c.abs().max().item() + largest)


class Step(nn.Module):
    """One attention step of keys and values of its own, spelt by `attend`."""

    def __init__(self, attend: Callable[..., Tensor], heads: int = 1) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 6), nn.Linear(10, 6), nn.Linear(10, 4)
        self.attend = attend

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        return self.attend(self.to_q(slots), self.to_k(x), self.to_v(x))


class Model(nn.Module):
    """A model with slot attention in it, and a softmax of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.MultiheadAttention(10, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(10)
        self.slot_attention = SlotFormer(10, 2, 8, 12)
        self.slots = nn.Parameter(torch.randn(1, 3, 8))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm((x + torch.rand_like(x)).flatten(0, 1)).view_as(x)
        return (self.head(self.slot_attention(x, self.slots.repeat(len(x), 1, 1))).softmax(1) * x.mean()).sum(1)


def assert_equal_runs(model: nn.Module, other: nn.Module, x: Tensor) -> None:
    for a, b in zip(results(model, (x,), {}), results(other, (x,), {}), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
