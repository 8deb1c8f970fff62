"""`accelerate` leaves alone what surrounds a model: hooks, globals, generators, graphs from before, lazy modules."""

from __future__ import annotations

import random

import pytest
import torch
from changing import SEEN, Around, Attention, buffers, nothing
from torch import Tensor, nn

from iio_kernels import accelerate

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


def makes_globals(m: Attention, x: Tensor) -> None:
    global MADE
    MADE = globals().get("MADE", 0) + 1


def test_globals_that_a_trial_makes_are_gone():
    accelerate(Around(makes_globals), torch.randn(4, 64, 8))
    assert "MADE" not in globals()
    model = Around(makes_globals)
    accelerate(model)
    model(torch.randn(4, 64, 8))
    assert globals().pop("MADE") == 1


class Draws(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.python.random())


def test_a_generator_of_its_own_draws_at_every_call():
    x, found = torch.ones(4, 64, 8), []
    for accelerated in (False, True):
        torch.manual_seed(0)
        model = Draws(nothing, python=random.Random(1))
        if accelerated:
            assert accelerate(model, x).accelerated == [""]
        found.append([model(x).sum().item() for _ in range(3)])
    assert len({round(value, 3) for value in found[0]}) == 3
    assert found[1] == pytest.approx(found[0], rel=1e-4)


class Recorder:
    """A hook with a memory, and one that is a method."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []
        self.last: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple, out: Tensor) -> None:
        self.shapes.append(out.shape)

    def keep(self, module: nn.Module, args: tuple, out: Tensor) -> None:
        self.last = out.detach()


@pytest.mark.parametrize("example", [True, False])
def test_hooks_remember_what_they_would_have(example: bool):
    model, x, recorder, mine = Around(nothing), torch.randn(4, 64, 8), Recorder(), []
    SEEN.clear()
    model.attention.to_v.register_forward_hook(recorder)
    model.register_forward_hook(recorder.keep)
    model.register_forward_hook(lambda *_: mine.append(len(mine)))
    model.attention.to_q.register_full_backward_hook(lambda *_: SEEN.append(1))
    model.attention.to_q.weight.register_hook(lambda grad: mine.append("gradient"))
    # Not to be done twice: what is called takes a tensor.
    model.register_forward_pre_hook(lambda module, args: (args[0]["x"],))
    report = accelerate(model, {"x": x}) if example else accelerate(model)
    if example:
        assert (recorder.shapes, recorder.last, mine, SEEN) == ([], None, [], [])
    out = model({"x": x})
    assert report.accelerated == ["attention"]
    assert (recorder.shapes, mine, SEEN) == ([(4, 64, 8)], [0], [])
    assert torch.equal(recorder.last, out)


def raises_later(m: Attention, x: Tensor) -> None:
    """The first run is the whole model's, others are trials."""
    m.counts[0] += 1
    with torch.no_grad():
        m.to_k.weight.add_(1)
        m.to_v.weight.data.mul_(2)
    if m.counts[0] > m.fine:
        raise RuntimeError("no more")


@pytest.mark.parametrize("fine", [0, 1, 2])
def test_a_run_that_raises_changes_nothing(fine: int):
    model, x = Around(raises_later, counts=[0], fine=fine), torch.randn(4, 64, 8)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    if fine == 0:
        with pytest.raises(RuntimeError, match="no more"):
            accelerate(model, x)
    else:
        (entry,) = accelerate(model, x).entries
        assert not entry.accelerated or fine > 1
    assert model.attention.counts == [0]
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_graph_from_before_still_has_its_gradients():
    """What forward writes to in place has the version that autograd knows."""
    model, x = Around(buffers, **{
        "mean": torch.zeros(8), "first": torch.arange(6.0)[2:], "grown": torch.arange(8.0), "moved": torch.zeros(2),
        "sparse": torch.eye(3).to_sparse(),
    }), torch.randn(4, 64, 8)  # fmt: skip
    regular = (model.attention.mean * model.attention.to_k.weight).sum()
    accelerate(model, x)
    regular.backward()


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.attention = nn.LazyLinear(8), Attention(nothing)
        self.attention.to_k = nn.LazyLinear(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.encoder(x))


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("example", [True, False])
def test_lazy_modules_are_made_by_the_first_call_proper(example: bool):
    torch._dynamo.reset()
    models, outputs, x = [], [], torch.linspace(-1, 1, 4 * 64 * 5).view(4, 64, 5)
    for accelerated in (False, True):
        torch.manual_seed(0)
        models.append(Lazy())
        if accelerated:
            report = accelerate(models[-1], *([x] if example else []))
            assert isinstance(models[-1].encoder, nn.LazyLinear)
            assert isinstance(models[-1].encoder.weight, nn.UninitializedParameter)
        outputs.append(models[-1](x))
    assert report.accelerated == ["attention"]
    assert type(models[1].attention.to_k) is nn.Linear
    torch.testing.assert_close(*outputs)
    theirs = models[0].state_dict()
    assert all(torch.equal(p, theirs[name]) for name, p in models[1].state_dict().items())
