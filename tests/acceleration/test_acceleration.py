"""`accelerate`: every family of the field found and proved, whatever is something else left alone."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import gc
import importlib.metadata
import math
import pickle
import random
import re
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from asserting import Asserts, AssertsNot, AssertsWithout, Iterations, Raises
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from iio_kernels import accelerate, restore
from iio_kernels.acceleration import Accelerated, inductor
from iio_kernels.acceleration.recognition.axes import Unlike, atoms, fresh, identify, regroup
from iio_kernels.acceleration.replacement import rewriting
from iio_kernels.runtime import backends
from iio_kernels.testing.families import FAMILIES, OUTSIDE
from iio_kernels.testing.families.family import SMALL, inputs_of, slots_of
from iio_kernels.testing.families.genera1z import Genera1Z
from iio_kernels.testing.families.locatello import Locatello
from iio_kernels.testing.families.slotformer import SlotFormer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # torch.compile looks at what it is given, and hushes this up unless warnings are errors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.fixture(autouse=True)
def _own_traces():
    torch._dynamo.reset()


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


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_families_are_found_and_proved(name: str, precision: str):
    family = FAMILIES[name]
    args, kwargs = family.arguments(family.small)
    model = without_noise(family.make(family.small), kwargs.get("num_slots", family.small.K))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        report = accelerate(model, *args, **kwargs)
        (entry,) = report.entries
        assert entry.accelerated, entry.what
        assert ("from_inputs" in entry.what) == family.projection_free
        assert entry.difference < 1
        assert_same(model, args, kwargs, 2**-8 if precision == "autocast" else 2**-23)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_on_triton(name: str, monkeypatch: pytest.MonkeyPatch):
    """The kernels of a GPU in Triton's interpreter."""
    if backends.BACKENDS["triton"].refuses(torch.device("cpu")) is not None:
        pytest.skip("Triton's interpreter is off")
    served = []

    def choose(op: str, backend: str, device: torch.device) -> str:
        served.append(op)
        return "triton"

    monkeypatch.setattr(backends, "choose", choose)
    family = FAMILIES[name]
    args, kwargs = family.arguments(family.small)
    model = without_noise(family.make(family.small), kwargs.get("num_slots", family.small.K))
    model.forward = Accelerated(model)
    # The proofs in float64 run on Triton too.
    assert_same(model, args, kwargs, 2**-23)
    assert set(served) == {"slot_attention"}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_something_else_is_left_alone(name: str):
    family = OUTSIDE[name]
    model = family.make(family.small)
    args, kwargs = family.arguments(family.small)
    report = accelerate(model, *args, **kwargs)
    (entry,) = report.entries
    assert not entry.accelerated
    assert {"isa": "no slots compete", "sinkhorn": "by other means than a softmax"}[name] in entry.what
    assert "forward" not in vars(model)


# -- spellings


class Step(nn.Module):
    """One attention step of keys and values of its own, spelt by `attend`."""

    def __init__(self, attend: Callable[..., Tensor], heads: int = 1) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 6), nn.Linear(10, 6), nn.Linear(10, 4)
        self.attend = attend

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        return self.attend(self.to_q(slots), self.to_k(x), self.to_v(x))


def split_last(q, k, v):
    A = (q @ k.mT * 0.4).softmax(-2)
    return ((A + 1e-8) / (A + 1e-8).sum(-1, keepdim=True)) @ v


def divided_afterwards(q, k, v):
    A = torch.softmax(torch.einsum("bnd,bkd->bnk", k, q) / math.sqrt(6), dim=2) + 1e-6
    return torch.einsum("bnk,bnd->bkd", A, v) / A.sum(1)[..., None]


def sums_of_products(q, k, v):
    logits = (q.unsqueeze(2) * k.unsqueeze(1)).sum(-1) * 6**-0.5
    W = F.softmax(logits, 1).transpose(1, 2)
    W = W / (W.sum(dim=1, keepdim=True) + 1e-5)
    return (W[..., None] * v[:, :, None]).sum(1)


def in_place(q, k, v):
    attention = torch.bmm(k, q.transpose(1, 2))
    attention *= 6**-0.5
    attention = attention.softmax(dim=-1) + 1e-9
    attention += 9e-9
    attention = attention / attention.sum(1, keepdim=True)
    return attention.permute(0, 2, 1).bmm(v)


def many_axes(q, k, v):
    q, k, v = (x.reshape(len(x), -1, 2, x.shape[-1] // 2).movedim(2, 0) for x in (q, k, v))
    A = torch.einsum("h b s d, h b n d -> s n h b", q, k).softmax(dim=0)
    W = A / A.sum(dim=1, keepdim=True).clamp(min=0.0)
    return torch.einsum("snhb,hbnd->bshd", W, v).flatten(2)


def heads_compete(q, k, v):
    q, k, v = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k, v))
    logits = torch.matmul(k, q.transpose(2, 3))
    A = logits.transpose(1, 2).reshape(*logits.shape[:1], logits.shape[2], -1).softmax(-1)
    A = A.view(len(A), -1, 2, A.shape[-1] // 2).transpose(1, 2) + 1e-8
    W = A / torch.sum(A, dim=-2, keepdim=True)
    return (W.mT @ v).transpose(1, 2).flatten(-2)


def summed_only(q, k, v):
    return F.softmax(q @ k.swapaxes(-1, -2), dim=-2) @ v


def by_norm(q, k, v):
    return F.normalize((q @ k.mT).softmax(1) + 1e-8, p=1, dim=-1) @ v


def masked_logits(q, k, v):
    keep = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    keep[0, 1] = False
    A = torch.where(keep[..., None], q @ k.mT, float("-inf")).softmax(1)
    return A / (A.sum(-1, keepdim=True) + 1e-8) @ v


def masked_inputs(q, k, v):
    padding = torch.zeros(k.shape[:2], dtype=torch.bool, device=q.device)
    padding[0, 3:] = True
    A = (q @ k.mT).softmax(1).masked_fill(padding[:, None], 0.0) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def epsilon_before_the_mask(q, k, v):
    keep = torch.ones(k.shape[:2], dtype=torch.bool, device=q.device)
    keep[0, 3:] = False
    A = ((q @ k.mT).softmax(1) + 1e-8) * keep[:, None]
    return A / A.sum(-1, keepdim=True) @ v


def at_least(q, k, v):
    """Some slots have more than 2.3 of the seven inputs, and some less."""
    A = (q @ k.mT).softmax(1)
    return A / A.sum(-1, keepdim=True).clamp(min=2.3) @ v


def at_least_afterwards(q, k, v):
    A = (q @ k.mT).softmax(1)
    total = A.sum(-1)
    total.clamp_min_(2.3)
    return torch.bmm(A, v) / (total + 0.1).unsqueeze(-1)


def the_larger(q, k, v):
    A = (q @ k.mT).softmax(1) + 1e-2
    total = A.sum(-1, keepdim=True)
    return A / torch.maximum(total, torch.full_like(total, 2.3)) @ v


def by_bounded_norm(q, k, v):
    return F.normalize((q @ k.mT).softmax(1), p=1, dim=-1, eps=2.3) @ v


def times_the_inverse(q, k, v):
    A = (q @ k.mT).softmax(1)
    return A * (1 / (torch.norm(A, p=1, dim=-1, keepdim=True) + 1e-8)) @ v


def two_epsilons(q, k, v):
    A = (q @ k.mT).softmax(1) + 1e-3
    return A / (torch.einsum("bsn->bs", A)[..., None] + 1e-3) @ v


def masked_inputs_at_least(q, k, v):
    keep = torch.ones(k.shape[:2], dtype=torch.bool, device=q.device)
    keep[0, 3:] = False
    A = (q @ k.mT).softmax(1) * keep.float().unsqueeze(1)
    return A / A.sum(-1, keepdim=True).clip(min=1e-2) @ v


def exponentials(q, k, v):
    weights = torch.exp(k @ q.mT)
    A = weights / weights.sum(-1, keepdim=True) + 1e-8
    return (A / A.sum(1, keepdim=True)).mT @ v


def exponentials_twice_less_the_largest(q, k, v):
    logits = q @ k.mT
    logits = logits - logits.max(dim=1, keepdim=True).values
    A = logits.exp() / torch.sum(logits.exp(), dim=1, keepdim=True)
    return A / (A.sum(-1, keepdim=True) + 1e-8) @ v


def exponentials_in_place(q, k, v):
    logits = q @ k.mT
    logits -= logits.detach().amax(1, keepdim=True)
    A = logits.exp_()
    A = A.div(A.sum(1).unsqueeze(1)) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def masked_exponentials(q, k, v):
    keep = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    keep[0, 1] = False
    weights = (q @ k.mT).exp() * keep.unsqueeze(-1)
    A = weights / weights.sum(1, keepdim=True)
    return A / (A.sum(-1, keepdim=True) + 1e-8) @ v


def exponential_of_log_softmax(q, k, v):
    A = F.log_softmax(q @ k.mT, dim=1).exp() + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def less_logsumexp(q, k, v):
    logits = q @ k.mT
    A = torch.exp(logits - torch.logsumexp(logits, 1, keepdim=True)) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def softmin(q, k, v):
    A = F.softmin(-(q @ k.mT), dim=1) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def kept(q):
    """A mask of 0 and 1 in which a slot is left out."""
    keep = torch.ones(q.shape[:2], device=q.device, dtype=q.dtype)
    keep[0, 1] = 0
    return keep


def mask_added(q, k, v):
    A = (q @ k.mT + (1 - kept(q)).unsqueeze(-1) * -1e9).softmax(1) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def infinite_mask_added(q, k, v):
    low = torch.zeros_like(q[..., 0]).masked_fill(kept(q) == 0, -torch.inf)
    A = (low[:, None] + k @ q.mT).mul(0.4).softmax(-1) + 1e-8
    return (A / A.sum(1, keepdim=True)).mT @ v


def logarithm_of_a_mask_added(q, k, v):
    A = torch.baddbmm(torch.log(kept(q) + 1e-6).unsqueeze(-1), q, k.mT, alpha=0.4).softmax(1) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def mask_subtracted(q, k, v):
    A = ((q @ k.mT - 1e9 * (1 - kept(q))[..., None]) / 1.7).softmax(1) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def finite_fill(q, k, v):
    logits = q @ k.mT
    A = logits.masked_fill(kept(q)[..., None] == 0, torch.finfo(logits.dtype).min).softmax(1) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def finite_where(q, k, v):
    logits = q @ k.mT
    A = torch.where(kept(q)[..., None] > 0, logits, -9e15 * torch.ones_like(logits)).softmax(1) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def finite_fill_by_index(q, k, v):
    logits = q @ k.mT * 0.4
    logits[kept(q) == 0] = -1e9
    A = logits.softmax(1) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def without_effect(q, k, v):
    A = F.dropout(F.dropout(q @ k.mT, 0.5, training=False).softmax(1), p=0.0) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def kept_to_show(q, k, v):
    A = (q @ k.mT).softmax(1)
    shown = A.detach().cpu(), -(A * A.log()).sum(1).mean().detach()
    A = A + 1e-8
    return A / A.sum(-1, keepdim=True) @ v + 0 * shown[0].mean() + 0 * shown[1]


def background(q, k, v):
    """A first query of another kind competes, and each kind is averaged by itself."""
    logits = torch.cat([0.3 * q[:, :1].square() @ k.mT, q @ k.mT], dim=1)
    A = logits.softmax(1) + 1e-8
    A0, A1 = A[:, :1], A[:, 1:]
    return torch.cat([A0 / A0.sum(-1, keepdim=True) @ v, A1 / A1.sum(-1, keepdim=True) @ v], 1)


def background_without_a_mean(q, k, v):
    logits = torch.cat((k @ q[:, :1].square().mT, k @ q.mT), dim=-1) * 0.4
    return logits.softmax(-1)[..., 1:].mT @ v


def background_of_weights(q, k, v):
    A = torch.cat([q[:, :2].square() @ k.mT, q @ k.mT], 1).softmax(dim=1)
    W = A / (A.sum(-1, keepdim=True) + 1e-5)
    W0, W1 = W.split([2, q.shape[1]], dim=1)
    return torch.cat([W1 @ v, W0 @ v, A.mean(-1, keepdim=True) * v[:, :1]], 1)


def numbers_of_numpy(q, k, v):
    A = (q @ k.mT / np.sqrt(q.shape[-1]) * np.float32(0.7)).softmax(1) + 1e-8
    return A.reshape(int(np.prod(A.shape[:2])), -1).view_as(A) / A.sum(-1, keepdim=True) @ v


SPELLINGS = (
    split_last, divided_afterwards, sums_of_products, in_place, many_axes, heads_compete, summed_only, by_norm,
    masked_logits, masked_inputs, epsilon_before_the_mask, at_least, at_least_afterwards, the_larger, by_bounded_norm,
    times_the_inverse, two_epsilons, masked_inputs_at_least, exponentials, exponentials_twice_less_the_largest,
    exponentials_in_place, masked_exponentials, exponential_of_log_softmax, less_logsumexp, softmin, mask_added,
    infinite_mask_added, logarithm_of_a_mask_added, mask_subtracted, finite_fill, finite_where, finite_fill_by_index,
    without_effect, kept_to_show, background, background_without_a_mean, background_of_weights, numbers_of_numpy,
)  # fmt: skip


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


@pytest.mark.parametrize(
    "hooked",
    [
        lambda model: model.to_k.register_forward_hook(lambda module, args, out: 2 * out),
        lambda model: model.to_q.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        lambda model: model.to_v.register_full_backward_hook(lambda module, grads, _: (3 * grads[0],)),
    ],
    ids=["forward", "pre", "backward"],
)
def test_hooks_that_come_later_count(hooked: Callable[[nn.Module], object]):
    plain, args = Step(split_last), (torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    model = copy.deepcopy(plain)
    assert accelerate(model, *args).accelerated == [""]
    before = results(model, args, {})
    handles = [hooked(module) for module in (model, plain)]
    for x, y in zip(results(model, args, {}), results(plain, args, {}), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    handles[0].remove()
    for x, y in zip(results(model, args, {}), before, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


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


def test_what_is_no_module_is_refused():
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
            function(3)


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


def ordinary(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def over_inputs(q, k, v):
    A = (q @ k.mT).softmax(-1) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v


def normalized_over_slots(q, k, v):
    A = (q @ k.mT).softmax(1) + 1e-8
    return A / A.sum(1, keepdim=True) @ v


def dropped_out(q, k, v):
    """A copy is kept to be shown, which is no reason."""
    A = (q @ k.mT).softmax(1)
    shown = A.detach().cpu()
    A = F.dropout(A, 0.5) + 1e-8
    return A / A.sum(-1, keepdim=True) @ v + 0 * shown.mean()


def biased(q, k, v):
    A = (q @ k.mT + k.sum(-1).unsqueeze(1) * torch.arange(3.0)[:, None]).softmax(1)
    return A / A.sum(-1, keepdim=True) @ v


def multiplied(q, k, v):
    A = (q @ k.mT).softmax(1) * k.sigmoid().mean(-1).unsqueeze(1)
    return A / A.sum(-1, keepdim=True) @ v


def keys_overwritten(q, k, v):
    A = (q @ k.mT).softmax(1)
    k.zero_()
    return A / A.sum(-1, keepdim=True) @ v + k.sum()


def masked_by_inputs(q, k, v):
    padding = torch.zeros(k.shape[:2], device=q.device)
    padding[0, 3:] = -1e9
    A = (q @ k.mT + padding[:, None]).softmax(1)
    return A / A.sum(-1, keepdim=True) @ v


def of_two_keys(q, k, v):
    A = torch.cat([q @ k.square().mT, q @ k.mT], 1).softmax(1) + 1e-8
    return (A / A.sum(-1, keepdim=True))[:, 3:] @ v


def other_divisor(q, k, v):
    weights = (q @ k.mT).exp()
    A = weights / (weights.sum(1, keepdim=True) + 1e-3)
    return A / A.sum(-1, keepdim=True) @ v


def without_gradient(q, k, v):
    A = (q @ k.mT).softmax(1).detach()
    return A / A.sum(-1, keepdim=True) @ v


def values_of_slots(q, k, v):
    A = (q @ k.mT).softmax(1)
    return torch.einsum("bkn,bknd->bkd", A / A.sum(-1, keepdim=True), v[:, None] * q[..., None, :4])


def twice(q, k, v):
    A = (q @ k.mT).softmax(1).softmax(1)
    return A / A.sum(-1, keepdim=True) @ v


def partly_without_gradient(q, k, v):
    with torch.no_grad():
        A = (q @ k.mT).softmax(1)
        A = A / A.sum(-1, keepdim=True)
    return A @ v


OTHERS = {
    ordinary: "it is ordinary attention",
    partly_without_gradient: "a part of it alone",
    over_inputs: "goes through 'sum'",
    normalized_over_slots: "goes through 'sum'",
    dropped_out: "its attention goes through 'dropout'",
    biased: "what is added to its logits differs from input to input",
    masked_by_inputs: "what is added to its logits differs from input to input",
    multiplied: "goes through 'mul'",
    without_gradient: "goes through 'detach'",
    values_of_slots: "",
    twice: "its logits go through 'softmax'",
    of_two_keys: "its logits go through 'cat'",
    other_divisor: "its exponentials are not divided by their sum",
}


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


def test_a_first_call_that_fails_is_not_the_first():
    model = SlotFormer(10, 2, 8, 12)
    report = accelerate(model)
    assert accelerate(model) is report
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 7, 9), slots_of(SMALL))
    assert report.pending
    regular = next(model.parameters()).square().sum()
    model(inputs_of(SMALL), slots_of(SMALL))
    assert report.accelerated == [""]
    regular.backward()


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


# -- the module around it


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


def test_a_model():
    """Only slot attention is replaced; random numbers, buffers, state and training go on as before."""
    model = Model()
    plain, x = copy.deepcopy(model), torch.randn(2, 7, 10)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = accelerate(model, x)
    assert report.accelerated == ["slot_attention"]
    assert "not a product" in next(entry.what for entry in report.entries if entry.path == "")
    assert torch.equal(random, torch.get_rng_state())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert_equal_runs(model, plain, x)
    lines = str(report).splitlines()
    assert len(lines) == 2
    assert lines[0].split()[:3] == ["slot_attention", "SlotFormer", "accelerated"]
    assert lines[1].startswith("(the model)     Model       other softmax  its logits are not a product")

    again = accelerate(model, x)
    assert again.accelerated == ["slot_attention"]
    assert "already" in str(again)

    restore(model)
    assert "forward" not in vars(model.slot_attention)
    assert_equal_runs(model, plain, x)


def test_without_an_example_the_first_call_serves():
    model = Model()
    plain, x = copy.deepcopy(model), torch.randn(2, 7, 10)
    report = accelerate(model)
    assert report.pending
    assert "first call" in str(report)
    assert_equal_runs(model, plain, x)
    assert not report.pending
    assert report.accelerated == ["slot_attention"]
    assert_equal_runs(model, plain, x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap of the module's own GRU
def test_transforms_take_the_modules_own_code():
    module = SlotFormer(10, 2, 8, 12)
    x, slots = torch.randn(3, 2, 7, 10), torch.randn(3, 2, 3, 8)
    expected = torch.stack([module(*one) for one in zip(x, slots, strict=True)])
    accelerate(module, x[0], slots[0])
    torch.testing.assert_close(torch.vmap(lambda x, slots: module(x, slots))(x, slots), expected)
    _, tangent = torch.func.jvp(lambda x: module(x, slots[0]), (x[0],), (x[1],))
    assert tangent.shape == slots[0].shape
    assert torch.func.grad(lambda x: module(x, slots[0]).sum())(x[0]).shape == x[0].shape


def test_nothing_is_replaced_by_plain_pytorch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "choose", lambda *_: "reference")
    report = accelerate(SlotFormer(10, 2, 8, 12), inputs_of(SMALL), slots_of(SMALL))
    assert report.accelerated == []
    assert "no kernels serve cpu tensors here" in str(report)


def test_a_forward_of_its_own_is_kept():
    """Somebody else's replacement of forward is accelerated, and restored."""
    module = SlotFormer(10, 2, 8, 12)
    theirs = module.forward = lambda x, slots: SlotFormer.forward(module, x, slots) * 2
    x, slots = inputs_of(SMALL), slots_of(SMALL)
    expected = module(x, slots)
    assert accelerate(module, x, slots).accelerated == [""]
    torch.testing.assert_close(module(x, slots), expected)
    restore(module)
    assert module.forward is theirs


def test_what_changes_is_traced_again():
    """Iterations, numbers of slots and inputs, masks, dtype, mode: guards see each."""
    module = Genera1Z(2, 8, 12, 10)
    plain = copy.deepcopy(module)
    x, slots = torch.randn(2, 7, 10), torch.randn(2, 3, 8)
    accelerate(module, x, slots)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    calls = [
        (module, (x, slots), {}), (module, (x, slots), {"num_iter": 5}), (module, (x, slots, mask), {}),
        (module, (torch.randn(4, 9, 10), torch.randn(4, 5, 8)), {}), (module, (x[:1], slots[:1]), {}),
    ]  # fmt: skip
    for _ in range(2):
        for call, args, kwargs in calls:
            for a, b in zip(results(call, args, kwargs), results(plain, args, kwargs), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        module.num_iter = plain.num_iter = 4  # in between, a setting
    with torch.no_grad():
        torch.testing.assert_close(module(x, slots)[0], plain(x, slots)[0])
    module.double(), plain.double()
    torch.testing.assert_close(module(x.double(), slots.double())[0], plain(x.double(), slots.double())[0])
    assert all(calls for calls, _ in module.forward.log)


def test_views_are_read_where_they_lie():
    """Frames sliced out of videos, inputs transposed and expanded."""
    module = SlotFormer(10, 2, 8, 12)
    plain = copy.deepcopy(module)
    accelerate(module, inputs_of(SMALL), slots_of(SMALL))
    video = torch.randn(2, 3, 13, 10)
    for x in (video[:, 1], torch.randn(2, 10, 13).mT, torch.randn(1, 13, 10).expand(2, -1, -1)):
        slots = slots_of(SMALL)
        for a, b in zip(results(module, (x, slots), {}), results(plain, (x, slots), {}), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_pending_model_is_copied_and_pickled():
    model = SlotFormer(10, 2, 8, 12)
    accelerate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(inputs_of(SMALL), slots_of(SMALL))
        assert isinstance(other.forward, Accelerated)
    assert "forward" not in vars(model)
    restore(model)
    model(inputs_of(SMALL), slots_of(SMALL))
    assert "forward" not in vars(model)


@pytest.mark.parametrize("inside", [False, True])
def test_checkpointing(inside: bool):
    """Around the module, or by a module around each of its steps."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = Step(split_last)

        def forward(self, x: Tensor, slots: Tensor) -> Tensor:
            return checkpoint(self.step, x, slots, use_reentrant=False) if inside else self.step(x, slots)

    model, args = Outer(), (torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    plain = copy.deepcopy(model)
    assert accelerate(model, *args).accelerated == ["step"]
    for n in (7, 9, 11):
        x, slots = torch.randn(2, n, 10), torch.randn(2, 3, 8, requires_grad=True)
        ours, theirs = (
            torch.autograd.grad(checkpoint(m, x, slots, use_reentrant=False).square().sum(), [slots, *m.parameters()])
            for m in (model, plain)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_modules_own_errors_are_raised():
    module = Genera1Z(2, 8, 12, 10)
    x, slots = torch.randn(2, 7, 10), torch.randn(2, 3, 8)
    accelerate(module, x, slots)
    with pytest.raises(RuntimeError, match="normalized_shape") as caught:
        module(x[..., :9], slots)
    assert type(caught.value) is RuntimeError
    module(x, slots)


def test_the_example_leaves_nothing_behind():
    """Attributes, what is in them, and every random number generator are as before."""

    class Remembers(Step):
        def __init__(self) -> None:
            super().__init__(split_last)
            self.calls, self.seen, self.last = 0, [], torch.zeros(2, 3, 4)
            self.generator = torch.Generator().manual_seed(3)
            self.register_buffer("mean", torch.zeros(1))

        def forward(self, x: Tensor, slots: Tensor) -> Tensor:
            self.calls, self.new = self.calls + 1, True
            self.seen.append(self.calls)
            self.mean = self.mean + 1
            noise = torch.from_numpy(np.random.randn(*slots.shape)).float()  # noqa: NPY002
            slots = slots + noise * random.random() + torch.rand(slots.shape, generator=self.generator)
            self.last = super().forward(x, slots + self.last.mean())
            return self.last

    model, args = Remembers(), (torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    plain = copy.deepcopy(model)
    plain.generator = torch.Generator().manual_seed(3)
    accelerate(model, *args)
    assert (model.calls, model.seen, model.mean.item()) == (0, [], 0)
    assert not hasattr(model, "new")
    for _ in range(3):
        outputs = []
        for m in (plain, model):
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            outputs.append(m(*args).detach())
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert model.seen == plain.seen


def test_an_accelerated_model_is_freed():
    model = SlotFormer(10, 2, 8, 12)
    accelerate(model, inputs_of(SMALL), slots_of(SMALL))
    model(inputs_of(SMALL), slots_of(SMALL)).sum().backward()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripted_modules_are_passed_over():
    model = Model()
    model.encoder = torch.jit.script(nn.Linear(10, 10))
    assert accelerate(model, torch.randn(2, 7, 10)).accelerated == ["slot_attention"]


def test_without_gradients_the_proof_has_them():
    model, args = Step(partly_without_gradient), (torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    whole = Step(split_last)
    with torch.inference_mode():
        assert accelerate(model, *args).accelerated == []
        assert accelerate(whole, *args).accelerated == [""]


def test_copies_pickles_and_functional_calls():
    module = SlotFormer(10, 2, 8, 12)
    x, slots = inputs_of(SMALL), slots_of(SMALL)
    expected = module(x, slots)
    accelerate(module, x, slots)
    module(x, slots)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(other.forward, Accelerated)
        assert other.forward.module is other
        torch.testing.assert_close(other(x, slots), expected)
        with torch.no_grad():
            other.to_q.weight.zero_() if hasattr(other, "to_q") else next(other.parameters()).zero_()
        assert not torch.allclose(other(x, slots), expected)
        torch.testing.assert_close(module(x, slots), expected)
    twice = {name: 2 * p.detach() for name, p in module.named_parameters()}
    ours = torch.func.functional_call(module, twice, (x, slots))
    restore(module)
    torch.testing.assert_close(ours, torch.func.functional_call(module, twice, (x, slots)))


def test_hooks_run():
    module = SlotFormer(10, 2, 8, 12)
    x, slots = inputs_of(SMALL), slots_of(SMALL)
    accelerate(module, x, slots)
    seen = []
    module.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    module(x, slots)
    assert seen == [slots.shape]


def test_the_backend_has_its_name():
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="iio_kernels")
    assert entry.load() is inductor


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", inductor, pytest.param("inductor", marks=pytest.mark.long)],
    ids=["aot_eager", "iio_kernels", "inductor"],
)
def test_compile(backend: str | Callable):
    """A model that holds an accelerated module, in one graph; a second number of inputs makes it dynamic, a third one
    nothing. Our backend replaces slot attention in it."""
    model = Model().eval()
    model.encoder = nn.Identity()
    plain = copy.deepcopy(model)
    accelerate(model, torch.randn(2, 7, 10))
    graphs = []
    if backend is inductor:
        rewrite = rewriting.rewrite

        def counted(graph):
            calls, reasons = rewrite(graph)
            graphs.append(len(calls))
            return calls, reasons

        rewriting.rewrite = counted
    try:
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        for n in (7, 9, 12):
            x = torch.randn(2, n, 10)
            torch.manual_seed(0)
            expected = plain(x)
            torch.manual_seed(0)
            with torch._dynamo.config.patch(error_on_recompile=n > 7):
                ours = compiled(x)
            assert ours.shape == expected.shape
            if backend == "aot_eager":
                torch.testing.assert_close(ours, expected)
            ours.sum().backward()
    finally:
        if backend is inductor:
            rewriting.rewrite = rewrite
            assert set(graphs) == {2}


def test_export():
    module = SlotFormer(10, 2, 8, 12)
    x, slots = inputs_of(SMALL), slots_of(SMALL)
    accelerate(module, x, slots)
    program = torch.export.export(module, (x, slots))
    torch.testing.assert_close(program.module()(x, slots), module(x, slots))


def test_distributed(tmp_path):
    """DistributedDataParallel around a model that holds an accelerated module."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = SlotFormer(10, 2, 8, 12)
        plain = copy.deepcopy(model)
        x, slots = inputs_of(SMALL), slots_of(SMALL)
        accelerate(model, x, slots)
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(x, slots).sum().backward()
        plain(x, slots).sum().backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    finally:
        dist.destroy_process_group()


def test_keys_and_values_of_a_parent():
    """A module that is given keys and values is replaced with the one around it, which makes them."""

    class Attend(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return split_last(q, k, v)

    class Around(Step):
        def __init__(self) -> None:
            super().__init__(None)
            self.attend = Attend()

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.around = Around()

        def forward(self, x: Tensor, slots: Tensor) -> Tensor:
            return self.around(x, slots)

    model = Root()
    report = accelerate(model, torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    assert report.accelerated == ["around"]
    assert "from_inputs" in report.entries[0].what


def test_weights_made_in_a_module_of_their_own():
    class Weigh(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            A = (q @ k.mT).softmax(1) + 1e-8
            return A / A.sum(-1, keepdim=True)

    class Around(Step):
        def __init__(self) -> None:
            super().__init__(None)
            self.weigh = Weigh()

        def forward(self, x: Tensor, slots: Tensor) -> Tensor:
            return self.weigh(self.to_q(slots), self.to_k(x)) @ self.to_v(x)

    report = accelerate(Around(), torch.randn(2, 7, 10), torch.randn(2, 3, 8))
    assert report.accelerated == [""]
    assert "from_inputs" in report.entries[0].what


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


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        accelerate(lambda x: x)
    assert str(accelerate(nn.Linear(2, 2), torch.zeros(1, 2))) == "accelerate: no module of the model takes a softmax"
    with pytest.raises(TypeError):
        accelerate(Locatello(2, 3, 10, 8, 12), torch.zeros(2, 7, 10), "an argument too many")


# -- axes


def test_axes():
    (b, n, d) = fresh((2, 5, 12))
    q, h, f = regroup((b, n, d), (10, 3, 4))
    assert atoms(q) == b + n
    assert [axis.size for axis in h + f] == [3, 4]
    (other,) = fresh((12,))
    identify(other, d)
    assert atoms(other) == h + f
    assert regroup((b, (), n), (2, 1, 5, 1)) == (b, (), n, ())
    with pytest.raises(Unlike):
        regroup((b, n), (5, 2))
    with pytest.raises(Unlike):
        identify(b, n)
