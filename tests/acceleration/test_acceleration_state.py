"""`accelerate` leaves everything as it was, to the bit, whatever forward does to the model and its surroundings."""

from __future__ import annotations

import collections
import copy
import functools
import random
import types
from collections.abc import Callable
from typing import Any

import changing
import numpy as np
import pytest
import torch
from changing import (
    SEEN,
    Around,
    Attention,
    Ema,
    attributes,
    buffers,
    codebook,
    containers,
    generators,
    gradients,
    nothing,
    own_weights,
    surroundings,
    teacher,
)
from torch import Tensor, nn

from iio_kernels import accelerate

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


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
    return found | {"around": (list(SEEN), changing.COUNT, Attention.shared)}


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
        Attention.shared, changing.COUNT = 0, 0
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


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_memory_that_cannot_be_written_to_is_not(tmp_path):
    (tmp_path / "codes").write_bytes(np.arange(8, dtype=np.float32).tobytes())
    codes = torch.from_numpy(np.memmap(tmp_path / "codes", np.float32, "r"))
    model = Around(lambda m, x: x + m.codes, codes=codes)
    assert accelerate(model, torch.randn(4, 64, 8)).accelerated == ["attention"]
    assert torch.equal(model.attention.codes, torch.arange(8.0))
