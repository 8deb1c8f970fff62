"""The compiled CPU kernels keep their error budgets with every instruction set."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from cpu_operators import (
    BF16,
    F32,
    F64,
    ROOT,
    _one_thread,  # noqa: F401
    threads,
)
from torch import Tensor

import iio_kernels
from iio_kernels import (
    conditional_entropies,
    inpaint,
)
from iio_kernels.runtime import build
from iio_kernels.testing import broadcast_conv2d as broadcast_spec
from iio_kernels.testing import compose as composition_spec
from iio_kernels.testing import iio_loss as iio_spec
from iio_kernels.testing import slot_attention as attention_spec
from iio_kernels.testing import slot_attention_module as iterations_spec
from iio_kernels.testing import spatial_mixture as mixture_spec

#: Run in a process of its own: every call of a file, its results to another one.
PROGRAM = """
import sys, torch, iio_kernels
from iio_kernels.runtime import build
results = []
for name, tensors, incoming, options in torch.load(sys.argv[1]):
    leaves = [x.requires_grad_() for x in tensors]
    arguments = [*leaves[:2], tuple(leaves[2:])] if name == "slot_attention_module" else leaves
    outputs = getattr(iio_kernels, name)(*arguments, backend="cpu", **options)
    outputs = outputs[:5] if isinstance(outputs, tuple) else (outputs,)  # of a mixture, views come behind
    differentiable = [x for x in outputs if x.requires_grad]
    gradients = torch.autograd.grad(differentiable, leaves, incoming[:len(differentiable)])
    results.append([x.detach() for x in (*outputs, *gradients)])
torch.save(results, sys.argv[2])
print(build.instruction_set())
"""

ATTENTION_CASES = ["plain", "narrow values", "wide values", "wide features", "one slot", "one feature"]
ATTENTION_CASES += ["zero eps", "denominator", "sum", "two batch dimensions", "joint heads, masks"]
ATTENTION_CASES += ["slot mask", "input mask", "both masks"]
ITERATIONS_CASES = ["plain", "seven slots", "sixteen slots", "one of all", "odd widths", "whole vectors", "many inputs"]
IIO_CASES = ["plain", "two masks", "five masks", "one channel", "five channels", "odd sizes", "tall"]
IIO_CASES += ["narrow", "three times", "large eps", "zero eps", "rows of whole vectors"]
WHOLE_VECTORS = iio_spec.Case("rows of whole vectors", B=1, K=3, H=12, W=32)


def has(instruction_set: str) -> bool:
    """Whether this machine has it, as torch sees it."""
    widest = torch.backends.cpu.get_cpu_capability()
    return instruction_set == "baseline" or widest == "AVX512" or (widest, instruction_set) == ("AVX2", "avx2")


def start(program: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=300)


def iio_results(function, tensors, incoming, **options) -> tuple[Tensor, ...]:
    return iio_spec.results(function, *tensors, *incoming, **options)


def put_together(tensors, incoming, **options) -> tuple[Tensor, ...]:
    return composition_spec.results(composition_spec.literal_composition_error, *tensors, incoming, **options)


def mixed(tensors, incoming, **options) -> tuple[Tensor, ...]:
    """All results but views, and the gradients through the differentiable three."""
    return mixture_spec.literally(*tensors, incoming[:3], **options)


def broadcasted(tensors, incoming, **options) -> tuple[Tensor, ...]:
    return broadcast_spec.literally(tensors, *incoming, **options)


def budget(name, formula, case, dtype, plain, copies=1, **more) -> tuple:
    """A public call, and its results in plain PyTorch: in float64, and in the dtype `plain`."""
    tensors, options = case.make(dtype)
    with torch.no_grad():
        outputs = getattr(iio_kernels, name)(*tensors, backend="reference", **options, **more)
    random = torch.Generator().manual_seed(2)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    incoming = [torch.randn(x.shape, generator=random).to(x.dtype) for x in outputs]

    def compute(kind):
        return formula([x.to(kind) for x in tensors], [x.to(kind) for x in incoming], **options)

    exact = compute(F64)
    eager = exact if plain == F64 else compute(plain)
    many = [[x.expand(copies * len(x), *x.shape[1:]) for x in xs] for xs in (tensors, incoming)]
    return f"{name}, {case.name}, {dtype}", (name, *many, options | more), exact, eager


def module_budget(case, dtype) -> tuple:
    """`budget` of slot_attention_module, whose weights are a tuple."""
    arguments, options = case.make(dtype)
    exact = iterations_spec.literally(iterations_spec.cast(arguments, F64), **options)
    eager = exact if dtype == F64 else iterations_spec.literally(iterations_spec.cast(arguments, F32), **options)
    x, slots, weights, T = arguments
    incoming = [y.to(slots.dtype) for y in iterations_spec.random_like(*exact[:2])]
    options = options | {"iterations": T, "return_attention": True}
    call = "slot_attention_module", (x, slots, *weights), incoming, options
    return f"slot_attention_module, {case.name}, {dtype}", call, exact, eager


def budgets_of(dtype: torch.dtype) -> Iterator[tuple]:
    # Attention is computed in the storage type throughout, inpainting in float32 at least.
    arithmetic = F64 if dtype == F64 else F32
    attend = functools.partial(attention_spec.results, attention_spec.literal_slot_attention)
    for case in attention_spec.CASES:
        if case.name in ATTENTION_CASES:
            yield budget("slot_attention", attend, case, dtype, dtype, return_attention=True)
    if dtype != BF16:
        large = attention_spec.Case("past the caches", batch=(1,), N=1030, Dk=64, Dv=64, inputs="shared")
        yield budget("slot_attention", attend, large, dtype, dtype, copies=33, return_attention=True)

    for case in iterations_spec.CASES:
        if case.name in ITERATIONS_CASES:
            yield module_budget(case, dtype)

    for case in composition_spec.CASES:
        if case.B > 0:
            yield budget(
                "composition_error", put_together, case, dtype, arithmetic, reduction="none", return_masks=True
            )
    if dtype != BF16:
        large = composition_spec.Case("past the caches", B=1, K=8, H=37, W=40, channels_last=True)
        yield budget(
            "composition_error", put_together, large, dtype, arithmetic, copies=96, reduction="none", return_masks=True
        )

    for case in mixture_spec.CASES:
        if case.B > 0:
            yield budget("spatial_mixture", mixed, case, dtype, arithmetic)

    for case in (*broadcast_spec.CASES, broadcast_spec.Case("past the caches", (150,), O=32, size=(30, 31))):
        if 0 not in case.batch:
            yield budget("broadcast_conv2d", broadcasted, case, dtype, arithmetic)

    for case in (*iio_spec.CASES, WHOLE_VECTORS):
        if case.name in IIO_CASES:
            lose = functools.partial(iio_results, iio_spec.literal_iio_loss)
            yield budget("iio_loss", lose, case, dtype, arithmetic, reduction="none")
            for function in (conditional_entropies, inpaint):
                formula = functools.partial(iio_results, functools.partial(function, backend="reference"))
                yield budget(function.__name__, formula, case, dtype, arithmetic)


@pytest.fixture(scope="module")
def budgets() -> list[tuple]:
    """Once for all instruction sets."""
    with threads(1):
        return [each for dtype in (F32, F64, BF16) for each in budgets_of(dtype)]


@pytest.mark.parametrize("name", build.INSTRUCTION_SETS)
def test_error_is_within_budget_with_every_instruction_set(name, budgets, tmp_path):
    if not has(name):
        pytest.skip(f"this machine has no {name}")
    torch.save([each[1] for each in budgets], tmp_path / "calls")
    done = start(PROGRAM, tmp_path / "calls", tmp_path / "results", IIO_KERNELS_ISA=name, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [name]
    for (call, _, truth, eager), got in zip(budgets, torch.load(tmp_path / "results"), strict=True):
        for i, (x, exact, plain) in enumerate(zip(got, truth, eager, strict=True)):
            of_module = call.startswith("slot_attention_module")
            spec = iterations_spec if of_module else attention_spec
            allowed = spec.allowed_error(exact, plain.to(x.dtype))
            if x.dtype == F64:  # where the formula itself is the truth
                allowed = 1e-12 * max(1, exact.abs().max().item()) if of_module else 1e-13 * exact.abs().max().item()
            error = (x.double() - exact).abs().max().item()
            assert error <= allowed, f"{call}, result {i}: {error} > {allowed}"


@pytest.mark.long
def test_an_instruction_set_that_does_not_exist():
    program = """
import torch, iio_kernels
q, k, image, masks = (torch.rand(shape) for shape in ((1, 2, 4), (1, 5, 4), (1, 3, 11, 11), (1, 2, 11, 11)))
for call in (lambda: iio_kernels.slot_attention(q, k, k), lambda: iio_kernels.iio_loss(image, masks)) * 2:
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    done = start(program, IIO_KERNELS_ISA="sse9")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["IIO_KERNELS_ISA: expected baseline, avx2 or avx512, got sse9"] * 4
