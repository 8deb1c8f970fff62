"""What every operation is to keep, found by its folder in iio_kernels/ops and its file in iio_kernels/testing alone."""

from __future__ import annotations

import ast
import inspect
import math
from importlib import import_module
from pathlib import Path

import pytest
import torch
from serving import SERVING
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

import iio_kernels
from iio_kernels import testing
from iio_kernels.runtime.backends import BACKENDS, OPERATIONS, implementation

FOLDER = Path(iio_kernels.__file__).parent / "ops"
each_operation = pytest.mark.parametrize("operation", OPERATIONS)
#: Each operation on every backend that has it, on every device it serves here.
on_backends = pytest.mark.parametrize(
    ("operation", "serving"),
    [
        pytest.param(operation, pair, id="-".join((operation, *pair)))
        for operation in OPERATIONS
        for pair in SERVING
        if operation in BACKENDS[pair[0]].operations
    ],
    indirect=["serving"],
)
#: torch makes an instance of every Function that it traces.
traced = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def first_call(operation: str, dtype: torch.dtype, device: str = "cpu"):
    """A function of all numbers in the arguments of the first case, and these numbers, tensors that want gradients.

    The function returns what depends on them, in float64, each result by itself.
    """
    arguments, options = testing.samples(operation).CASES[0].make(dtype, device)
    flat, structure = tree_flatten(arguments)
    places = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]

    def call(*leaves: Tensor, backend: str) -> list[Tensor]:
        given = list(flat)
        for i, leaf in zip(places, leaves, strict=True):
            given[i] = leaf
        out = testing.function(operation)(*tree_unflatten(given, structure), **options, backend=backend)
        return [x for x in tree_flatten(out)[0] if x.requires_grad]

    return call, [flat[i].detach().clone().requires_grad_() for i in places]


def results(operation: str, dtype: torch.dtype, device: str, backend: str, arithmetic: torch.dtype) -> list[Tensor]:
    """Of the first case, stored in `dtype` and computed in `arithmetic`: the results, and the gradients to all numbers
    from fixed ones that come in."""
    call, leaves = first_call(operation, dtype, device)
    leaves = [x.detach().to(arithmetic).requires_grad_() for x in leaves]
    out = call(*leaves, backend=backend)
    incoming = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).view_as(x) for x in out]
    return [x.detach() for x in (*out, *torch.autograd.grad(out, leaves, incoming))]


@each_operation
def test_its_public_functions_are_exported(operation):
    names = import_module(f"iio_kernels.ops.{operation}").__all__
    assert operation in names
    for name in names:
        assert name in iio_kernels.__all__
        assert inspect.getdoc(getattr(iio_kernels, name))


@each_operation
def test_it_has_samples(operation):
    samples = testing.samples(operation)
    assert len({case.name for case in samples.CASES}) == len(samples.CASES)
    assert {"cpu", "cuda", "toy"} <= samples.BENCHMARKS.keys()
    for case in (case for cases in samples.BENCHMARKS.values() for case in cases):
        for backward in (False, True):
            assert case.bytes_moved(torch.float32, backward) > 0
            assert case.flops(backward) > 0


def called_of_kernels(operation: str) -> set[str]:
    """What an operation calls of a backend's module, `implementation(...)`, whether it has a name first or not."""

    def is_implementation(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "implementation"

    called = set()
    for path in (FOLDER / operation).glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            nodes = list(ast.walk(function))
            names = {
                target.id
                for node in nodes
                if isinstance(node, ast.Assign) and is_implementation(node.value)
                for target in node.targets
                if isinstance(target, ast.Name)
            }
            called |= {
                node.attr
                for node in nodes
                if isinstance(node, ast.Attribute)
                and (is_implementation(node.value) or (isinstance(node.value, ast.Name) and node.value.id in names))
            }
    return called


@pytest.mark.parametrize(
    ("operation", "backend"),
    [
        (operation, backend)
        for operation in OPERATIONS
        for backend in BACKENDS
        if backend != "reference" and operation in BACKENDS[backend].operations
    ],
)
def test_every_backend_offers_what_it_calls(operation, backend):
    """Whether or not it can serve here. The reference is called by its own names, and differentiated by autograd."""
    if backend == "triton":
        pytest.importorskip("triton")
    called = called_of_kernels(operation)
    assert called
    kernels = implementation(operation, backend)
    assert all(callable(getattr(kernels, name, None)) or name.isupper() for name in called)
    assert called <= vars(kernels).keys()


@on_backends
def test_the_first_case_is_as_near_the_truth_as_allowed(operation, backend, device):
    """The reference in float64 is the truth; plain PyTorch is the reference in the dtype of the numbers."""
    F32, F64 = torch.float32, torch.float64
    truth = results(operation, F32, device, "reference", F64)
    eager = results(operation, F32, device, "reference", F32)
    got = results(operation, F32, device, backend, F32)
    allowed_error = testing.samples(operation).allowed_error
    for i, (x, true, plain) in enumerate(zip(got, truth, eager, strict=True)):
        error = (x.double() - true.double()).abs().max().item()
        assert error <= allowed_error(true, plain), f"result {i}"


@pytest.mark.long("triton")  # whose interpreter has many forward passes to run
@traced
@on_backends
def test_gradcheck(operation, backend, device):
    call, leaves = first_call(operation, torch.float64, device)
    assert torch.autograd.gradcheck(lambda *x: tuple(call(*x, backend=backend)), leaves, fast_mode=True)


class Calls(TorchDispatchMode):
    """Notes the calls of this package's operators, and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[torch._ops.OpOverload, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("iio_kernels"):
            self.noted.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.long("triton")
@traced
@on_backends
def test_opcheck(operation, backend, device):
    """Of every operator that a call and its backward pass come to."""
    call, leaves = first_call(operation, torch.float32, device)
    with Calls() as calls:
        sum(x.sum() for x in call(*leaves, backend=backend)).backward()
    if backend not in ("reference", "written_out"):  # those are torch's own operators
        assert calls.noted
    for operator, args, kwargs in calls.noted:
        detached = tree_map_only(Tensor, lambda x: x.detach().clone(), args)
        torch.library.opcheck(operator, detached, kwargs)


@each_operation
def test_a_wrong_dtype_is_refused_by_the_arguments_name(operation):
    function, samples = testing.function(operation), testing.samples(operation)
    arguments, options = samples.CASES[0].make(torch.float32)
    names = list(inspect.signature(function).parameters)
    tensors = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
    assert tensors
    for i in tensors:
        wrong = (*arguments[:i], arguments[i].long(), *arguments[i + 1 :])
        with pytest.raises(TypeError, match=rf"^{names[i]}: expected dtype .* got torch.int64"):
            function(*wrong, **options)


@each_operation
def test_an_error_of_nothing_is_allowed_where_plain_pytorch_has_none(operation):
    """But for rounding: a budget that were large would let every result pass."""
    truth = torch.linspace(-1, 1, 9, dtype=torch.float64).float().double()
    allowed = testing.samples(operation).allowed_error(truth, truth.float())
    assert 0 < allowed < 1e-5
    assert not math.isnan(allowed)
