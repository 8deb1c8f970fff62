"""Images of which a mask leaves nothing: NaN where the module makes NaN, and numbers where it makes numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from iio_kernels import accelerate
from iio_kernels.testing.families import FAMILIES

B, N, K, X, D = 3, 7, 4, 10, 8


class Masked(nn.Module):
    def __init__(self, attend: Callable) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.attend = nn.Linear(D, 6), nn.Linear(X, 6), nn.Linear(X, 4), attend

    def forward(self, x: Tensor, slots: Tensor, mask: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.attend(self.to_q(slots), self.to_k(x), self.to_v(x), mask)


def slots_out(q, k, v, mask):
    A = (q @ k.mT).masked_fill(~mask[..., None], -math.inf).softmax(1) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def slots_out_and_attention(q, k, v, mask):
    A = torch.where(mask[..., None], q @ k.mT, -math.inf).softmax(1)
    return A / (A.sum(-1, keepdim=True) + 1e-8) @ v, A


def slots_out_of_a_sum(q, k, v, mask):
    return (q @ k.mT).masked_fill(~mask[..., None], -math.inf).softmax(1) @ v


def slots_out_of_joint_heads(q, k, v, mask):
    q, k, v = (x.unflatten(-1, (2, -1)) for x in (q, k, v))
    logits = torch.einsum("bkhd,bnhd->bkhn", q, k).masked_fill(~mask[:, :, None, None], -math.inf)
    A = logits.flatten(1, 2).softmax(1).view(logits.shape) + 1e-8
    return torch.einsum("bnhd,bkhn->bkhd", v, A / A.sum(-1, keepdim=True)).flatten(2)


def inputs_out_before_epsilon(q, k, v, mask):
    A = (q @ k.mT).softmax(1).masked_fill(~mask[:, None], 0) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def inputs_out_by_a_product(q, k, v, mask):
    A = ((q @ k.mT).softmax(1) + 1e-8) * mask[:, None]
    return A / A.sum(-1, keepdim=True) @ v


def inputs_out_after_epsilon(q, k, v, mask):
    A = ((q @ k.mT).softmax(1) + 1e-8).masked_fill(~mask[:, None], 0)
    return A / A.sum(-1, keepdim=True) @ v


def inputs_out_of_the_denominator(q, k, v, mask):
    A = (q @ k.mT).softmax(1).masked_fill(~mask[:, None], 0)
    return A / (A.sum(-1, keepdim=True) + 1e-8) @ v


def inputs_out_without_epsilon(q, k, v, mask):
    A = (q @ k.mT).softmax(1).masked_fill(~mask[:, None], 0)
    return A / A.sum(-1, keepdim=True) @ v


OF_SLOTS = (slots_out, slots_out_and_attention, slots_out_of_a_sum, slots_out_of_joint_heads)
OF_INPUTS = (
    inputs_out_before_epsilon, inputs_out_by_a_product, inputs_out_after_epsilon, inputs_out_of_the_denominator,
    inputs_out_without_epsilon,
)  # fmt: skip


def results(model: nn.Module, x: Tensor, slots: Tensor, *masks: Tensor, **options: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(), slots.clone().requires_grad_()]
    outputs = model(*leaves, *masks, **options)
    outputs = tuple(outputs.values()) if isinstance(outputs, dict) else outputs
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    incoming = [torch.linspace(-1, 1, out.numel()).view(out.shape) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [*leaves, *model.parameters()], incoming, allow_unused=True)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("whole_in_example", [False, True])
@pytest.mark.parametrize("attend", [*OF_SLOTS, *OF_INPUTS], ids=lambda f: f.__name__)
def test_nothing_left(attend: Callable, whole_in_example: bool):
    """Results and gradients, whether the example had such an image or not."""
    torch.manual_seed(0)
    model, x, slots = Masked(attend), torch.randn(B, N, X), torch.randn(B, K, D)
    plain = copy.deepcopy(model)
    some = torch.ones(B, K if attend in OF_SLOTS else N, dtype=torch.bool)
    some[0, 1:], some[1, 2] = False, False
    whole = some.clone()
    whole[1] = False
    report = accelerate(model, x, slots, whole if whole_in_example else some)
    assert report.accelerated == [""], str(report)
    for mask in (some, whole, torch.zeros_like(some)):
        theirs = results(plain, x, slots, mask)
        assert_same(results(model, x, slots, mask), theirs)
    finite = attend in (inputs_out_before_epsilon, inputs_out_of_the_denominator)
    assert theirs[0].isfinite().all() if finite else theirs[0].isnan().all()


@pytest.mark.parametrize(
    ("name", "mask", "out"),
    [("oclf", "slots_mask", True), ("genera1z", "smask", False), ("videosaur", "mask", False)],
)
def test_nothing_left_for_modules_of_the_field(name: str, mask: str, out: bool):
    """Three iterations: NaN spreads through GRU and MLP as it would."""
    family = FAMILIES[name]
    args, options = family.arguments(family.small)
    model = family.make(family.small)
    plain = copy.deepcopy(model)
    assert accelerate(model, *args, **options).accelerated == [""]
    empty = options[mask].clone()
    empty[0] = out
    theirs, ours = (results(m, *args, **options | {mask: empty}) for m in (plain, model))
    assert theirs[0][1:].isfinite().all()
    assert theirs[0][0].isnan().all() == (name != "videosaur")
    assert_same(ours, theirs)


class Recurrent(nn.Module):
    """One iteration, and a GRU behind it, to which NaN comes back from the slots that it makes NaN."""

    def __init__(self, attend: Callable) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.attend = nn.Linear(D, 6), nn.Linear(X, 6), nn.Linear(X, 6), attend
        self.gru = nn.GRUCell(6, D)

    def forward(self, x: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
        updates = self.attend(self.to_q(slots), self.to_k(x), self.to_v(x), mask)
        return self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view(slots.shape)


@pytest.mark.parametrize("attend", [slots_out, slots_out_of_joint_heads], ids=lambda f: f.__name__)
def test_nothing_left_before_a_gru(attend: Callable):
    """The gradients to keys are those of the other images, as the module's are."""
    torch.manual_seed(0)
    model, x, slots = Recurrent(attend), torch.randn(B, N, X), torch.randn(B, K, D)
    plain = copy.deepcopy(model)
    mask = torch.ones(B, K, dtype=torch.bool)
    assert accelerate(model, x, slots, mask).accelerated == [""]
    mask[0] = False
    theirs = results(plain, x, slots, mask)
    assert_same(results(model, x, slots, mask), theirs)
    to_k = [name for name, _ in plain.named_parameters()].index("to_k.weight")
    assert theirs[3 + to_k].isfinite().all()
