"""`accelerate` beside torch's other ways to run a model: compiled, exported, transformed, checkpointed, distributed."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from running import WARNINGS, Model, Step
from spellings import split_last
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iio_kernels import accelerate
from iio_kernels.acceleration import inductor
from iio_kernels.acceleration.replacement import rewriting
from iio_kernels.testing.families.family import SMALL, inputs_of, slots_of
from iio_kernels.testing.families.slotformer import SlotFormer

pytestmark = WARNINGS


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


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripted_modules_are_passed_over():
    model = Model()
    model.encoder = torch.jit.script(nn.Linear(10, 10))
    assert accelerate(model, torch.randn(2, 7, 10)).accelerated == ["slot_attention"]


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
