"""`accelerate`: the module around slot attention, and the model around that, are as they were."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from running import WARNINGS, Model, Step, assert_equal_runs, results
from spellings import split_last
from torch import Tensor, nn

from iio_kernels import accelerate, restore
from iio_kernels.acceleration import Accelerated
from iio_kernels.testing.families.family import SMALL, inputs_of, slots_of
from iio_kernels.testing.families.genera1z import Genera1Z
from iio_kernels.testing.families.locatello import Locatello
from iio_kernels.testing.families.slotformer import SlotFormer

pytestmark = WARNINGS


def test_what_is_no_module_is_refused():
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
            function(3)


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


@pytest.mark.long
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


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        accelerate(lambda x: x)
    assert str(accelerate(nn.Linear(2, 2), torch.zeros(1, 2))) == "accelerate: no module of the model takes a softmax"
    with pytest.raises(TypeError):
        accelerate(Locatello(2, 3, 10, 8, 12), torch.zeros(2, 7, 10), "an argument too many")
