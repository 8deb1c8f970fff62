"""`accelerate` leaves everything as it was, to the bit, whatever forward does to the model and its surroundings."""

from __future__ import annotations

import collections
import copy
import functools
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from iio_kernels import accelerate

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

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


def parts(m: Attention) -> dict[str, Any]:
    """All that the changes change, in a form that can be compared, to the bit."""
    found: dict[str, Any] = {f"{name}.{i}": x for i, x in enumerate(m.modules()) for name, x in vars(x).items()}
    found |= {f"bytes of {name}": x.detach().clone() for name, x in m.state_dict().items() if not x.is_sparse}
    places = {name: x for name, x in m.state_dict().items() if name not in ("grown", "sparse")}  # grown: elsewhere now
    found |= {f"place of {name}": (x.data_ptr(), x.shape) for name, x in places.items()}
    found |= {f"version of {name}": (x._version, x.grad_fn, x.is_leaf) for name, x in m.named_buffers()}
    found |= {f"grad of {name}": (x.requires_grad, copy.deepcopy(x.grad)) for name, x in m.named_parameters()}
    if hasattr(m, "teacher"):
        found |= {f"teacher {name}": x.clone() for name, x in m.teacher[0].state_dict().items()}
    if hasattr(m, "counts"):
        held = "counts", "queue", "nested", "names", "ordered", "counter", "array"
        found |= {f"in {name}": copy.deepcopy(getattr(m, name)) for name in held}
        found |= {"steps": m.simple.steps, "order": list(m.ordered)}
    if hasattr(m, "ema"):
        found |= {"ema": m.ema.average.clone(), "ema's steps": m.ema.steps}
    if hasattr(m, "sparse"):
        found["sparse"] = m.sparse.to_dense()
    if hasattr(m, "numpy"):
        found |= {"torch's": m.torch.get_state(), "python's": m.python.getstate()}
        found |= {"numpy's": m.numpy.bit_generator.state, "old": m.old.get_state()[1].copy()}
    found |= {"global": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())}  # noqa: NPY002
    return found | {"around": (list(SEEN), COUNT, Attention.shared)}


def assert_same_bits(now: Any, before: Any, where: str) -> None:
    def same(x: Tensor, y: Tensor) -> None:
        x, y = (x.detach().to_dense() if x.is_sparse else x.detach() for x in (x, y))
        assert x.dtype == y.dtype and torch.equal(x, y), where  # noqa: PT018

    _assert_same(now, before, where, same)


def assert_alike(now: Any, before: Any, where: str) -> None:
    """Tensors up to rounding, objects that know no equality not at all, and all else to the bit."""
    _assert_same(
        now, before, where, functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5), identity=False
    )


def _assert_same(now: Any, before: Any, where: str, same: Callable, identity: bool = True) -> None:
    assert type(now) is type(before), where
    if isinstance(now, (dict, collections.OrderedDict)):
        assert list(now) == list(before), where
        for key in now:
            _assert_same(now[key], before[key], f"{where} {key}", same, identity)
    elif isinstance(now, (list, tuple, collections.deque)):
        assert len(now) == len(before), where
        for i, pair in enumerate(zip(now, before, strict=True)):
            _assert_same(*pair, f"{where} {i}", same, identity)
    elif isinstance(now, Tensor):
        same(now, before)
    elif isinstance(now, np.ndarray):
        assert np.array_equal(now, before), where
    elif identity or type(now).__eq__ is not object.__eq__:
        assert now is before or now == before, where


def repeated(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight[:1].detach().expand(8, 8))


def made(change: Callable) -> Around:
    """A model whose forward makes this change, with what is changed."""
    SEEN.clear()
    torch.manual_seed(0)
    held = {
        codebook: lambda: {"code": nn.Embedding(4, 8)},
        teacher: lambda: {"teacher": [nn.Linear(8, 8)]},
        own_weights: dict,
        containers: lambda: {
            "counts": [0], "queue": collections.deque([torch.zeros(1)], maxlen=3), "names": {0},
            "nested": {"of": (1, {"lists": [torch.ones(2)]})}, "ordered": collections.OrderedDict(a=1, b=2),
            "counter": collections.Counter("abca"), "array": np.zeros(3), "simple": types.SimpleNamespace(steps=0),
        },
        attributes: lambda: {"old": [1]},
        gradients: dict,
        buffers: lambda: {
            "mean": torch.zeros(8), "first": torch.arange(6.0)[2:], "grown": torch.arange(8.0),
            "moved": torch.zeros(2), "sparse": torch.eye(3).to_sparse(),
        },
        generators: lambda: {
            "torch": torch.Generator().manual_seed(1), "python": random.Random(1), "numpy": np.random.default_rng(1),
            "old": np.random.RandomState(1),
        },
        surroundings: lambda: {"ema": Ema()},
    }  # fmt: skip
    model = Around(change, **held[change]())
    attention = model.attention
    attention.to_v.weight = attention.to_k.weight  # one parameter, two layers
    attention.to_v.bias = nn.Parameter(attention.to_k.bias.data[:])  # two parameters, one memory
    attention.to_q.weight = repeated(attention.to_q.weight)
    if change is gradients:
        attention.to_k.bias.grad = torch.ones(8)
    if change is attributes:
        attention.register_buffer("lazy", None)
    return model


CHANGES = (
    codebook, teacher, own_weights, containers, attributes, gradients, buffers, generators, surroundings,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_everything_is_as_before(change: Callable):
    torch._dynamo.reset()
    model, x = made(change), torch.randn(4, 64, 8)
    before, given = parts(model.attention), x.clone()
    accelerate(model, x)
    model.attention.__dict__.pop("forward", None)
    assert torch.equal(x, given)
    assert_same_bits(parts(model.attention), before, "")


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_the_first_call_happens_once(change: Callable):
    """Without an example: the call changes what it would have changed, and its results are the same."""
    torch._dynamo.reset()
    found = []
    for accelerated in (False, True):
        model, x = made(change), torch.linspace(-1, 1, 4 * 64 * 8).view(4, 64, 8)
        Attention.shared, globals()["COUNT"] = 0, 0
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
        if accelerated:
            accelerate(model)
        out = model(x).detach()
        model.attention.__dict__.pop("forward", None)
        now = {name: x for name, x in parts(model.attention).items() if not name.startswith(("place", "_", "version"))}
        found.append((out, {name: x for name, x in now.items() if not callable(x)}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert found[0][1].keys() == found[1][1].keys()
    assert_alike(found[1][1], found[0][1], "")


def grown_array(m: Attention, x: Tensor) -> None:
    m.array.resize(len(m.array) + 1, refcheck=False)
    m.array[-1] = 1


def other_array(m: Attention, x: Tensor) -> None:
    m.array += 1
    m.array.dtype = np.int32
    m.array.flags.writeable = False


@pytest.mark.parametrize("change", [grown_array, other_array])
def test_arrays_keep_their_shape_and_dtype(change: Callable):
    model, array = Around(change), np.arange(3, dtype=np.float32)
    model.attention.array = array
    accelerate(model, torch.randn(4, 64, 8))
    assert model.attention.array is array
    assert array.dtype == np.float32
    assert array.flags.writeable
    assert array.tolist() == [0, 1, 2]


def test_arrays_that_did_not_change_are_not_written_to():
    written = []

    class Counting(np.ndarray):
        def __array_function__(self, func: Callable, *args: Any) -> Any:
            written.append(func)
            return super().__array_function__(func, *args)

    model = Around(nothing)
    model.attention.array = np.zeros(3).view(Counting)
    accelerate(model, torch.randn(4, 64, 8))
    assert np.copyto not in written


def test_all_is_put_back_though_one_thing_cannot_be():
    """Whatever that is is raised."""

    class Stubborn(nn.Module):
        __slots__ = ("state",)

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "state" and value == 0:
                raise ValueError("not again")
            super().__setattr__(name, value)

    model = Around(stubbornly, counts=[0])
    model.attention.stubborn = Stubborn()
    nn.Module.__setattr__(model.attention.stubborn, "state", 0)
    with pytest.raises(ValueError, match="not again"):
        accelerate(model, torch.randn(4, 64, 8))
    assert model.attention.counts == [0]
    assert "forward" not in vars(model.attention)


def stubbornly(m: Attention, x: Tensor) -> None:
    m.stubborn.state = 1
    m.counts[0] += 1


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


# -- what surrounds the model


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


def nothing(m: Attention, x: Tensor) -> None:
    pass


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


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_memory_that_cannot_be_written_to_is_not(tmp_path):
    (tmp_path / "codes").write_bytes(np.arange(8, dtype=np.float32).tobytes())
    codes = torch.from_numpy(np.memmap(tmp_path / "codes", np.float32, "r"))
    model = Around(lambda m, x: x + m.codes, codes=codes)
    assert accelerate(model, torch.randn(4, 64, 8)).accelerated == ["attention"]
    assert torch.equal(model.attention.codes, torch.arange(8.0))
