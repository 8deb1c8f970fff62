"""The operators under the broadcast convolution, and torch.compile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comparing import comparison
from marks import NAMESPACES, compiles, kernels_alone
from torch._dynamo.testing import CompileCounterWithBackend

from iio_kernels import broadcast_conv2d
from iio_kernels.runtime import backends
from iio_kernels.testing.broadcast_conv2d import (
    NAMES,
    STRIDED_CONV,
    Case,
    random_like,
    results,
)

OPERATION = "broadcast_conv2d"
each_kind = pytest.mark.parametrize("kind", [Case("conv"), STRIDED_CONV], ids=lambda case: case.name)
each_relu = pytest.mark.parametrize("relu", [True, False], ids=["ReLU", "no ReLU"])
assert_all_close = comparison(NAMES, 1e-12)


@pytest.mark.long("triton")
@kernels_alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@each_relu
def test_opcheck(dtype, relu, backend, device):
    backends.implementation("broadcast_conv2d", backend)  # which defines them
    operators = getattr(torch.ops, NAMESPACES[backend])
    wide = torch.promote_types(dtype, torch.float32)
    constant, position_map = (torch.randn(shape, device=device).to(wide) for shape in ((3, 4, 5, 2), (6, 9, 2)))
    options = [1, 2, 1], [0, 3, 2], relu
    torch.library.opcheck(operators.broadcast_forward.default, (constant, position_map, *options, dtype))
    out = operators.broadcast_forward(constant, position_map, *options, dtype)
    torch.library.opcheck(operators.broadcast_backward.default, (random_like(out), constant, position_map, *options))


@pytest.mark.long("reference", "triton", "written_out")
@compiles
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@each_kind
def test_compiles_as_one_graph(dynamic, kind, backend, device):
    torch.compiler.reset()

    def function(*tensors, **options):
        return broadcast_conv2d(*tensors, **options, backend=backend)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch, size in (((2, 3), kind.size), ((4, 2), (8, 10))) if dynamic else (((2, 3), kind.size),):
        tensors, options = replace(kind, batch=batch, size=size).make(device=device)
        assert_all_close(results(compiled, tensors, **options), results(function, tensors, **options))


@compiles
def test_a_last_batch_is_not_compiled_anew(backend, device):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(broadcast_conv2d, backend=counter, fullgraph=True)
    for M in (8, 6, 3):
        tensors, options = Case("batches", (M,)).make(device=device)
        torch._dynamo.maybe_mark_dynamic(tensors[0], 0)
        compiled(*tensors, backend=backend, **options)
    assert counter.frame_count == 1


@compiles
def test_compiles_under_autocast(backend, device):
    torch.compiler.reset()
    tensors, options = Case("autocast").make(torch.float32, device)

    def function(*tensors):
        with torch.autocast(device, dtype=torch.bfloat16):
            return broadcast_conv2d(*tensors, backend=backend, **options)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got, expected = results(compiled, tensors), results(function, tensors)
    assert got[0].dtype == torch.bfloat16
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.long("cpu", "triton")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
@kernels_alone
def test_compiles_to_code(backend, device):
    """Once all the way through Inductor."""
    torch.compiler.reset()
    tensors, options = STRIDED_CONV.make(torch.float32, device)

    def function(*tensors):
        return broadcast_conv2d(*tensors, backend=backend, **options)

    compiled = torch.compile(function, fullgraph=True)
    assert_all_close(results(compiled, tensors), results(function, tensors), relative=1e-5)
