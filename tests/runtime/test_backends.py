"""Which backends there are, which one serves a call, and what is said when none does."""

from __future__ import annotations

import doctest
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch

import iio_kernels
from iio_kernels import (
    broadcast_conv2d,
    compose,
    composition_error,
    conditional_entropies,
    iio_loss,
    inpaint,
    mixture_log_likelihood,
    slot_attention,
    slot_attention_module,
    spatial_mixture,
)
from iio_kernels.ops.slot_attention import reference
from iio_kernels.runtime import backends
from iio_kernels.runtime.backends import BACKENDS, Backend
from iio_kernels.testing.slot_attention_module import Case

CPU = torch.device("cpu")


def usable(name: str) -> bool:
    return BACKENDS[name].missing() is None


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Backend]:
    """An empty registry for one test to fill."""
    registry: dict[str, Backend] = {}
    monkeypatch.setattr(backends, "BACKENDS", registry)
    return registry


def test_reference_is_always_there():
    assert iio_kernels.backends()["reference"] is None
    for device in ("cpu", "cuda", "meta", "mps"):
        assert backends.choose("iio_loss", "reference", torch.device(device)) == "reference"


def test_backends_names_them_all_with_the_reason_against(registry):
    registry["here"] = Backend(None, lambda: None)
    registry["away"] = Backend(("cuda",), lambda: "no compiler was found")
    assert iio_kernels.backends() == {"here": None, "away": "no compiler was found"}


def test_auto_takes_the_first_that_serves(registry):
    registry["broken"] = Backend(None, lambda: "it is broken")
    registry["gpu"] = Backend(("cuda",), lambda: None)
    registry["first"] = Backend(("cpu",), lambda: None)
    registry["second"] = Backend(None, lambda: None)
    assert backends.choose("iio_loss", "auto", CPU) == "first"
    assert backends.choose("iio_loss", "auto", torch.device("cuda", 1)) == "gpu"
    assert backends.choose("iio_loss", "auto", torch.device("meta")) == "second"
    assert backends.choose("iio_loss", "second", CPU) == "second"


def test_auto_serves_every_device():
    for device in ("cpu", "cuda", "meta"):
        assert backends.choose("iio_loss", "auto", torch.device(device)) in BACKENDS


def test_a_named_backend_never_falls_back(registry):
    registry["broken"] = Backend(None, lambda: "it is broken")
    registry["gpu"] = Backend(("cuda", "xpu"), lambda: None)
    registry["broken gpu"] = Backend(("cuda",), lambda: "it is broken")
    registry["good"] = Backend(None, lambda: None)
    with pytest.raises(RuntimeError, match="backend: 'broken' cannot be used: it is broken"):
        backends.choose("iio_loss", "broken", CPU)
    with pytest.raises(ValueError, match=r"backend: 'gpu' cannot be used: it serves cuda, xpu tensors.*cpu"):
        backends.choose("iio_loss", "gpu", CPU)
    # The device is the caller's mistake, whether or not the backend would work elsewhere.
    with pytest.raises(ValueError, match="it serves cuda tensors"):
        backends.choose("iio_loss", "broken gpu", CPU)
    with pytest.raises(RuntimeError, match="it is broken"):
        backends.choose("iio_loss", "broken gpu", torch.device("cuda"))


def test_a_backend_may_leave_an_operation_to_others(registry):
    registry["first"] = Backend(("cuda",), lambda: None, operations=("iio_loss",))
    registry["second"] = Backend(("cuda",), lambda: None)
    assert backends.choose("iio_loss", "auto", torch.device("cuda")) == "first"
    assert backends.choose("slot_attention", "auto", torch.device("cuda")) == "second"
    says = "backend: 'first' has no kernels of this function: expected one of 'auto', 'second'"
    with pytest.raises(ValueError, match=says):
        backends.choose("slot_attention", "first", torch.device("cuda"))


def test_cuda_leaves_slot_attention_to_triton():
    q, k = torch.rand(1, 2, 4), torch.rand(1, 5, 4)
    with pytest.raises(ValueError, match=r"'cuda' has no kernels of this function: expected one of .*'triton'"):
        slot_attention(q, k, k, backend="cuda")


def test_an_unknown_backend_lists_the_known(registry):
    registry["one"] = registry["two"] = Backend(None, lambda: None)
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'one', 'two', got 'three'"):
        backends.choose("iio_loss", "three", CPU)


def test_public_functions_call_the_backend_they_were_told(monkeypatch):
    """One entry in the registry and one module in each operation's folder are all it takes."""
    calls = []

    def forward(*arguments):
        calls.append("forward")
        return reference.forward(*arguments)

    def backward(*arguments):
        calls.append("backward")
        return reference.backward(*arguments)

    monkeypatch.setitem(backends.BACKENDS, "spy", Backend(("cpu",), lambda: None))
    module = SimpleNamespace(forward=forward, backward=backward)
    monkeypatch.setitem(sys.modules, "iio_kernels.ops.slot_attention.spy", module)
    q, k, v = (torch.rand(2, n, 3, requires_grad=True) for n in (4, 5, 5))
    slot_attention(q, k, v, backend="spy").sum().backward()
    assert calls == ["forward", "backward"]
    slot_attention(q, k, v, backend="reference")
    assert len(calls) == 2


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "name", [name for name in BACKENDS if name not in ("reference", "written_out") and usable(name)]
)
def test_a_compiled_transform_is_right_or_raises(name):
    """torch.compile looks past Functions inside a torch.func transform: no gradient may come out as 0."""
    q, k = torch.rand(1, 2, 4), torch.rand(1, 5, 4)
    image, masks, decoded = torch.rand(1, 2, 11, 11), torch.rand(1, 2, 11, 11), torch.rand(1, 2, 3, 11, 11)
    weight, position_map = torch.rand(2, 4, 3, 3), torch.rand(2, 5, 6)
    (x, slots, weights, T), _ = Case("transformed").make(torch.float32)
    for function, leaf in (
        (lambda q: slot_attention(q, k, k, backend=name).square().sum(), q),
        (lambda masks: iio_loss(image, masks, backend=name), masks),
        (lambda masks: conditional_entropies(image, masks, backend=name).sum(), masks),
        (lambda masks: inpaint(image, masks, backend=name).square().sum(), masks),
        (lambda decoded: composition_error(image, decoded, backend=name), decoded),
        (lambda decoded: spatial_mixture(image, decoded, backend=name).log_likelihood.sum(), decoded),
        (lambda q: broadcast_conv2d(q, weight, position_map, (5, 6), padding=1, backend=name).square().sum(), q),
        (lambda slots: slot_attention_module(x, slots, weights, T, backend=name).square().sum(), slots),
    ):
        expected = torch.func.grad(function)(leaf)
        assert expected.abs().max() > 0
        torch.compiler.reset()
        try:
            got = torch.compile(torch.func.grad(function), backend="aot_eager")(leaf)
        except RuntimeError:  # torch wraps ours, at times without its words
            continue
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", [name for name in iio_kernels.__all__ if name.endswith("Function")])
def test_functions_keep_their_signature(name):
    """Without it a call takes a tenth of a millisecond longer."""
    forward = getattr(iio_kernels, name).forward
    assert inspect.signature(forward) is forward.__signature__


def test_a_backends_own_limit_on_masks_is_named(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "small", Backend(None, lambda: None))
    monkeypatch.setitem(sys.modules, "iio_kernels.ops.iio_loss.small", SimpleNamespace(MAX_MASKS=3))
    with pytest.raises(ValueError, match="masks: expected at most 3 masks for backend 'small', got 4"):
        iio_loss(torch.rand(1, 3, 12, 12), torch.rand(1, 4, 12, 12), backend="small")


def test_documented_examples_run():
    names = {name: getattr(iio_kernels, name) for name in iio_kernels.__all__}
    functions = slot_attention, iio_loss, compose, composition_error, broadcast_conv2d, slot_attention_module
    tests = [
        test
        for function in (*functions, spatial_mixture, mixture_log_likelihood)
        for test in doctest.DocTestFinder().find(function, globs={**names, "torch": torch})
    ]
    results = [doctest.DocTestRunner().run(test) for test in tests]
    assert sum(result.attempted for result in results) >= 15
    assert sum(result.failed for result in results) == 0


def test_documentation_has_no_unfilled_place():
    for name in iio_kernels.__all__:
        assert "{image}" not in getattr(iio_kernels, name).__doc__
        assert "{decoded}" not in getattr(iio_kernels, name).__doc__
        assert "{raises}" not in getattr(iio_kernels, name).__doc__
