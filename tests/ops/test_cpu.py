"""The compiled CPU backend beyond the formula: operators, threads, instruction sets, memory, strides, training."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import literal
import pytest
import test_compose
import test_iio_loss
import test_spatial_mixture
import torch
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import iio_kernels
from iio_kernels import (
    compose,
    conditional_entropies,
    iio_loss,
    inpaint,
    interaction_information,
    slot_attention,
    slot_attention_from_inputs,
)
from iio_kernels.ops.iio_loss import sampling
from iio_kernels.ops.slot_attention_module import api as iterations_operation
from iio_kernels.runtime import backends, build
from iio_kernels.runtime.backends import OPERATIONS
from iio_kernels.testing import broadcast_conv2d as broadcast_spec
from iio_kernels.testing import compose as composition_spec
from iio_kernels.testing import iio_loss as iio_spec
from iio_kernels.testing import slot_attention as attention_spec
from iio_kernels.testing import slot_attention_module as iterations_spec
from iio_kernels.testing import spatial_mixture as mixture_spec
from models.slot_attention import SlotAttentionAutoEncoder

if build.missing() is not None:
    pytest.skip(f"no CPU kernels: {build.missing()}", allow_module_level=True)

for op in OPERATIONS:
    backends.implementation(op, "cpu")  # which defines the operators
ops = torch.ops.iio_kernels
ROOT = Path(__file__).parents[2]
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _one_thread():
    """Unless a test asks for more: threads that wait for each other take long where others compute too."""
    with threads(1):
        yield


# --- good calls of the raw operators ------------------------------------------------------------------------


def attention(
    dtype=F32, B=2, H=2, K=3, N=37, Dk=5, Dv=7, masks=True, bias=True, attention=True, **options
) -> dict[str, object]:
    """The arguments of slot_attention_forward; Dv = None: no values of their own."""
    arithmetic = F64 if dtype == F64 else F32
    random = torch.Generator().manual_seed(0)

    def randn(*shape, dtype=arithmetic):
        return torch.randn(shape, generator=random, dtype=F64).to(dtype)

    options = {"scale": 0.5, "eps": 1e-3, "eps_in_weights": True, "normalize": True, "joint_heads": False} | options
    return {
        "q": randn(B, H, K, Dk),
        "k": randn(B, H, N, Dk, dtype=dtype),
        "v": None if Dv is None else randn(B, H, N, Dv, dtype=dtype),
        "logit_bias": randn(B, H, K) if bias else None,
        "slot_mask": torch.rand(B, H, K, generator=random) < 0.8 if masks else None,
        "input_mask": torch.rand(B, H, N, generator=random) < 0.8 if masks else None,
        **options,
        "return_attention": attention,
    }


def attention_backward(**how) -> dict[str, object]:
    arguments = attention(**how)
    U, S, A = ops.slot_attention_forward(**arguments)
    wanted = arguments.pop("return_attention")
    random = torch.Generator().manual_seed(1)
    dU, dS, dA = (torch.randn(x.shape, generator=random, dtype=F64).to(U.dtype) for x in (U, S, A))
    return {"dU": dU, "dS": dS, "dA": dA if wanted else None, **arguments, "U": U, "S": S}


def images(dtype=F32, B=2, C=3, K=3, H=11, W=13, **options) -> dict[str, object]:
    """What all operators under the inpainting functions begin with."""
    random = torch.Generator().manual_seed(0)
    image = torch.rand(B, C, H, W, generator=random, dtype=F64).to(dtype)
    masks = torch.randn(B, K, H, W, generator=random, dtype=F64).softmax(1).to(dtype)
    return {"image": image, "masks": masks, "sigma": 2.0, "kernel_size": 5, "repeats": 2, "eps": 1e-3} | options


def loss(wanted=(True, True), **how) -> dict[str, object]:
    return images(**how) | {"image_gradient": wanted[0], "masks_gradient": wanted[1]}


def sampled_loss(wanted=(True, True), **how) -> dict[str, object]:
    arguments = loss(wanted, **how)
    B, K = arguments["masks"].shape[:2]
    draw = sampling.draw(B, K, max(6, sampling.least(K)), torch.device("cpu"), torch.Generator().manual_seed(0))
    return arguments | {"pairs": draw.pairs, "weights": draw.weights.to(arguments["masks"].dtype)}


def with_gradient(operator: str, **how) -> dict[str, object]:
    """The arguments of `operator`'s backward: a gradient to its result before its own."""
    arguments = images(**how)
    (result,) = call(operator, arguments)
    return {"grad": torch.randn(result.shape, dtype=result.dtype), **arguments}


def entropies_backward(wanted=True, **how) -> dict[str, object]:
    return with_gradient("conditional_entropies", **how) | {"image_gradient": wanted}


def inpaint_backward(**how) -> dict[str, object]:
    return with_gradient("inpaint", **how)


def composition(
    dtype=F32, B=2, K=3, C=3, H=11, W=13, channels_last=True, image=True, wanted=(True, True)
) -> dict[str, object]:
    """The arguments of composition_forward."""
    (x, decoded), _ = composition_spec.Case("raw", B, K, C, H, W, channels_last).make(F64)
    x, decoded = x.to(F64 if dtype == F64 else F32), decoded.to(dtype)
    options = {"return_reconstruction": wanted[0], "return_masks": wanted[1]}
    return {"decoded": decoded, "image": x if image else None, **options}


def composition_backward(wanted=(True, True), **how) -> dict[str, object]:
    arguments = composition(**how)
    x_hat, a, errors = ops.composition_forward(**arguments)
    d_x_hat, d_a, d_errors = test_compose.random_like(x_hat, a, errors)
    incoming = {
        "d_reconstruction": d_x_hat if wanted[0] else None,
        "d_masks": d_a if wanted[1] else None,
        "d_errors": None if arguments["image"] is None else d_errors,
    }
    inputs = {name: arguments[name] for name in ("decoded", "image")}
    return {**incoming, **inputs, "image_gradient": inputs["image"] is not None}


def mixture(dtype=F32, B=2, K=3, C=3, H=11, W=13, channels_last=True, everything=True) -> dict[str, object]:
    """The arguments of mixture_forward."""
    (image, decoded), _ = mixture_spec.Case("raw", B, K, C, H, W, channels_last).make(F64)
    image, decoded = image.to(F64 if dtype == F64 else F32), decoded.to(dtype)
    return {"image": image, "decoded": decoded, "sigma": 0.1, "everything": everything}


def mixture_backward(everything=True, **how) -> dict[str, object]:
    arguments = mixture(**how)
    log_likelihood, m, q, _, d_nll = ops.mixture_forward(**arguments)
    g, dm, dq = test_compose.random_like(log_likelihood, m, q)
    del arguments["everything"]
    others = {"d_masks": dm, "d_posterior": dq} if everything else {"d_masks": None, "d_posterior": None}
    kept = {"masks": m, "posterior": q, "d_nll": d_nll} if everything else {}
    return {"d_log_likelihood": g, **others, **arguments, "image_gradient": everything, **kept}


def broadcast(
    dtype=F32,
    B=5,
    O=7,
    H=6,
    W=9,
    rows=(1, 2, 1),
    columns=(2, 1, 3),
    relu=True,
) -> dict[str, object]:
    """The arguments of broadcast_forward for B slots."""
    random = torch.Generator().manual_seed(0)
    arithmetic = F64 if dtype == F64 else F32
    constant, position_map = (
        torch.randn(shape, generator=random, dtype=F64).to(arithmetic)
        for shape in ((B, sum(rows), sum(columns), O), (H, W, O))
    )
    options = {"rows": list(rows), "columns": list(columns), "relu": relu}
    return {"constant": constant, "position_map": position_map, **options, "dtype": dtype}


def broadcast_backward(**how) -> dict[str, object]:
    arguments = broadcast(**how)
    (out,) = call("broadcast_forward", arguments)
    del arguments["dtype"]
    return {"d_out": broadcast_spec.random_like(out), **arguments}


def iterations(dtype=F32, B=2, N=37, K=3, Dx=5, D=7, H=6, T=2, eps=1e-3, return_attention=True) -> dict[str, object]:
    """The arguments of iterations_forward."""
    (x, slots, weights, _), _ = iterations_spec.Case("raw", B, N, K, Dx, D, H).make(F64)
    wide = F64 if dtype == F64 else F32
    maps = [x.to(wide) for x in iterations_operation._maps(weights, 0.5)]
    options = {"iterations": T, "eps": eps, "norm_eps": 1e-5, "return_attention": return_attention}
    return {"x": x.to(dtype), "slots": slots.to(wide), "weights": maps[:5], "biases": maps[5:], **options}


def iterations_backward(**how) -> dict[str, object]:
    arguments = iterations(**how)
    slots, attention, tape = ops.iterations_forward(**arguments)
    d_slots, d_attention = test_compose.random_like(slots, attention)
    incoming = {"d_slots": d_slots, "d_attention": d_attention if arguments["return_attention"] else None}
    return {**incoming, "tape": tape, **{name: arguments[name] for name in ("x", "weights", "eps")}}


ATTENTION = {"slot_attention_forward": attention, "slot_attention_backward": attention_backward}
INPAINTING = {
    "iio_loss": loss,
    "sampled_iio_loss": sampled_loss,
    "conditional_entropies": images,
    "conditional_entropies_backward": entropies_backward,
    "inpaint": images,
    "inpaint_backward": inpaint_backward,
}
COMPOSITION = {"composition_forward": composition, "composition_backward": composition_backward}
MIXTURE = {"mixture_forward": mixture, "mixture_backward": mixture_backward}
BROADCAST = {"broadcast_forward": broadcast, "broadcast_backward": broadcast_backward}
ITERATIONS = {"iterations_forward": iterations, "iterations_backward": iterations_backward}
GOOD = ATTENTION | INPAINTING | COMPOSITION | MIXTURE | BROADCAST | ITERATIONS
each_operator = pytest.mark.parametrize("operator", GOOD)


def call(operator: str, arguments: dict[str, object]) -> tuple[Tensor, ...]:
    results = getattr(ops, operator)(**arguments)
    return results if isinstance(results, tuple) else (results,)


def assert_same(got, expected) -> None:
    """Bit for bit, shapes and dtypes included."""
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def without_nan(results) -> tuple[Tensor, ...]:
    assert not any(x.isnan().any() for x in results)
    return results


# --- what torch asks of operators ---------------------------------------------------------------------------

ATTENTION_HOW = [
    {},
    {"dtype": F64},
    {"dtype": BF16},
    {"Dv": None},
    {"Dv": None, "dtype": BF16, "masks": False, "bias": False, "attention": False},
    {"masks": False, "bias": False},
    {"attention": False, "eps_in_weights": False},
    {"joint_heads": True, "normalize": False},
    {"N": 0},
    {"B": 0},
    {"Dv": 0},
    {"B": 1, "H": 1, "K": 1, "N": 1, "Dk": 1, "Dv": 1},
]
INPAINTING_HOW = [
    {},
    {"dtype": F64},
    {"K": 5, "C": 1},
    {"K": 2, "C": 4, "repeats": 1, "eps": 0.0},
    {"H": 1, "W": 1, "kernel_size": 1},
    {"B": 0},
]
COMPOSITION_HOW = [
    {"wanted": (False, True), "image": False},
    {"wanted": (True, False), "channels_last": False},
    {"wanted": (False, False), "dtype": BF16},
    {"K": 1, "C": 1, "dtype": F64},
    {"H": 1, "W": 1},
    {"H": 1, "W": 1, "channels_last": False},
    {"B": 0},
]
MIXTURE_HOW = [{"dtype": F64}, {"everything": False, "channels_last": False}, {"B": 0, "dtype": BF16}]
BROADCAST_HOW = [
    {"relu": False, "dtype": BF16},
    {"rows": (6, 1, 0), "columns": (0, 4, 0), "dtype": F64},
    {"O": 32, "rows": (0, 1, 6)},
    {"B": 0},
]
ITERATIONS_HOW = [
    {},
    {"dtype": F64, "return_attention": False},
    {"dtype": BF16},
    {"N": 0},
    {"B": 0},
    {"B": 1, "N": 1, "K": 1, "Dx": 1, "D": 1, "H": 1, "T": 1},
]
WANTED = ((True, False), (False, True), (False, False))
HOW = [
    *((operator, how) for operator in ATTENTION for how in ATTENTION_HOW),
    *((operator, how) for operator in INPAINTING for how in INPAINTING_HOW),
    *((operator, how) for operator in COMPOSITION for how in COMPOSITION_HOW),
    *((operator, how) for operator in MIXTURE for how in MIXTURE_HOW),
    *((operator, how) for operator in BROADCAST for how in BROADCAST_HOW),
    *((operator, how) for operator in ITERATIONS for how in ITERATIONS_HOW),
    *((f"{kind}iio_loss", {"wanted": wanted}) for kind in ("", "sampled_") for wanted in WANTED),
    ("conditional_entropies_backward", {"wanted": False}),
    ("inpaint", {"K": 1}),
    ("inpaint_backward", {"K": 1}),
]


@pytest.mark.parametrize(("operator", "how"), HOW, ids=str)
def test_opcheck(operator, how):
    torch.library.opcheck(getattr(ops, operator).default, (), GOOD[operator](**how))


# --- threads and batches ------------------------------------------------------------------------------------

#: Several chunks of inputs, the last one and its last block not full; images left over for 2 and for 5 threads.
LARGE = [
    *((operator, {"B": 3, "N": 2500, "Dk": 20, "Dv": 9, "dtype": d}) for operator in ATTENTION for d in (F32, BF16)),
    *((operator, {"B": 3, "N": 1100, "K": 7, "joint_heads": True, "dtype": F64}) for operator in ATTENTION),
    *((operator, {"B": 7, "N": 70, "H": 3, "Dv": None}) for operator in ATTENTION),
    *((operator, {"B": 7, "H": 23, "W": 17}) for operator in INPAINTING),
    *((operator, {"B": 3, "H": 23, "W": 32, "C": 4}) for operator in INPAINTING),
    *((operator, {"B": 1, "K": 6, "H": 29, "W": 31, "dtype": F64}) for operator in INPAINTING),
    *((operator, {"B": 3, "H": 61, "W": 47, "channels_last": cl}) for operator in COMPOSITION for cl in (False, True)),
    *((operator, {"B": 7, "H": 35, "W": 35, "dtype": BF16}) for operator in COMPOSITION),
    *((operator, {"B": 2, "C": 4, "H": 35, "W": 35, "dtype": F64}) for operator in COMPOSITION),
    *((operator, {"B": 3, "H": 61, "W": 47, "channels_last": cl}) for operator in MIXTURE for cl in (False, True)),
    *((operator, {"B": 2, "C": 4, "H": 35, "W": 35, "dtype": BF16}) for operator in MIXTURE),
    *(
        (operator, {"B": 77, "O": O, "dtype": d})
        for operator in BROADCAST
        for O, d in ((5, F64), (32, F32), (33, BF16))
    ),
    *((operator, {"B": 300, "H": 13, "W": 35, "O": 16, "relu": False}) for operator in BROADCAST),
]
LARGE += [
    *(
        (operator, {"B": 3, "N": 1100, "K": 4, "Dx": 20, "D": 33, "dtype": d})
        for operator in ITERATIONS
        for d in (F32, BF16)
    ),
    *((operator, {"B": 7, "N": 70, "K": 7, "Dx": 16, "D": 16, "H": 32, "T": 3}) for operator in ITERATIONS),
    *((operator, {"B": 3, "N": 45, "K": 16, "dtype": F64}) for operator in ITERATIONS),
]
each_large = pytest.mark.parametrize(("operator", "how"), LARGE, ids=str)


@pytest.mark.parametrize(
    "operators",
    [
        tuple(ATTENTION),
        *((x,) for x in INPAINTING),
        tuple(COMPOSITION),
        tuple(MIXTURE),
        tuple(BROADCAST),
        tuple(ITERATIONS),
    ],
    ids=" ".join,
)
def test_a_thousand_runs_on_two_threads_give_the_same_bits(operators):
    how = {"B": 3, "N": 1100, "K": 4, "Dk": 16, "Dv": 16} if operators[0] in ATTENTION else {"B": 3}
    how = {"B": 70, "O": 64} if operators[0] in BROADCAST else how
    calls = [(operator, GOOD[operator](**how)) for operator in operators]
    with threads(2):
        expected = [without_nan(call(*each)) for each in calls]
        for _ in range(1000):
            for each, results in zip(calls, expected, strict=True):
                assert all(map(torch.equal, call(*each), results))


@each_large
def test_the_number_of_threads_changes_no_bit(operator, how):
    arguments = GOOD[operator](**how)
    with threads(1):
        expected = without_nan(call(operator, arguments))
    for number in (2, 5):
        with threads(number):
            assert_same(call(operator, arguments), expected)


@pytest.mark.parametrize(("operator", "how"), [x for x in LARGE if x[0] not in BROADCAST], ids=str)
@pytest.mark.parametrize("number", [1, 2])
def test_an_image_does_not_depend_on_the_others(operator, how, number):
    arguments = GOOD[operator](**how)
    with threads(number):
        whole = without_nan(call(operator, arguments))
        for b in range(how["B"]):
            own = [name for name, x in arguments.items() if isinstance(x, Tensor) and name != "weights"]
            one = arguments | {name: arguments[name][b : b + 1] for name in own}
            assert_same(call(operator, one), [x[b : b + 1] if x.numel() else x for x in whole])


@pytest.mark.parametrize("how", [how for operator, how in LARGE if operator == "broadcast_backward"], ids=str)
def test_a_broadcast_slot_does_not_depend_on_the_others(how):
    arguments = broadcast_backward(**how)
    images = call("broadcast_forward", broadcast(**how))[0], call("broadcast_backward", arguments)[0]
    for b in (0, 7, 8, how["B"] - 1):
        one = arguments | {name: arguments[name][b : b + 1] for name in ("d_out", "constant")}
        forward = {name: x for name, x in one.items() if name != "d_out"} | {"dtype": images[0].dtype}
        got = call("broadcast_forward", forward)[0], call("broadcast_backward", one)[0]
        assert_same(got, without_nan([x[b : b + 1] for x in images]))


@each_operator
def test_calls_from_four_threads_of_python_at_once(operator):
    arguments = GOOD[operator]()
    expected = without_nan(call(operator, arguments))
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: call(operator, arguments), range(100)):
            assert_same(results, expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("dtype", "B"), [(F32, 96), (F64, 48)], ids=["float32", "float64"])
def test_gradients_of_compositions_too_large_for_the_caches(dtype, B, channels_last):
    """As above; images beside a chunk that is not full, whose last block is written otherwise."""
    one = composition_backward(dtype=dtype, B=1, K=8, H=37, W=40, channels_last=channels_last)
    many = {name: x.expand(B, *x.shape[1:]) if isinstance(x, Tensor) else x for name, x in one.items()}
    expected = without_nan(call("composition_backward", one))
    for x, y in zip(call("composition_backward", many), expected, strict=True):
        assert torch.equal(x, y.expand_as(x))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("operator", MIXTURE)
def test_mixtures_too_large_for_the_caches(operator, channels_last):
    one = GOOD[operator](B=1, K=8, H=37, W=40, channels_last=channels_last)
    many = {name: x.expand(96, *x.shape[1:]) if isinstance(x, Tensor) else x for name, x in one.items()}
    for x, y in zip(call(operator, many), without_nan(call(operator, one)), strict=True):
        assert torch.equal(x, y.expand_as(x))


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("relu", [True, False])
def test_broadcasts_too_large_for_the_caches(dtype, relu):
    """Those too are written past them."""
    one = broadcast(dtype=dtype, B=1, O=32, H=35, W=33, relu=relu)
    many = one | {"constant": one["constant"].expand(120, -1, -1, -1)}
    (expected,), (got,) = (without_nan(call("broadcast_forward", arguments)) for arguments in (one, many))
    assert torch.equal(got, expected.expand_as(got))


@pytest.mark.parametrize(("dtype", "B"), [(F32, 66), (F64, 33)], ids=["float32", "float64"])
def test_gradients_of_iterations_too_large_for_the_caches(dtype, B):
    """As below."""
    one = iterations_backward(dtype=dtype, B=1, N=1030, Dx=64)
    many = {name: x.expand(B, *x.shape[1:]) if isinstance(x, Tensor) else x for name, x in one.items()}
    expected = without_nan(call("iterations_backward", one))
    for x, y in zip(call("iterations_backward", many), expected, strict=True):
        assert torch.equal(x, y.expand_as(x))


@pytest.mark.parametrize(("dtype", "B"), [(F32, 33), (F64, 17)], ids=["float32", "float64"])
def test_gradients_too_large_for_the_caches(dtype, B):
    """Rows are then written past the caches, and hold the same bits."""
    one = attention_backward(dtype=dtype, B=1, H=1, K=4, N=1030, Dk=64, Dv=64)
    many = {name: x.expand(B, *x.shape[1:]) if isinstance(x, Tensor) else x for name, x in one.items()}
    expected = without_nan(call("slot_attention_backward", one))
    for x, y in zip(call("slot_attention_backward", many), expected, strict=True):
        assert torch.equal(x, y.expand_as(x))


# --- instruction sets ---------------------------------------------------------------------------------------

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
    return test_iio_loss.results(function, *tensors, *incoming, **options)


def put_together(tensors, incoming, **options) -> tuple[Tensor, ...]:
    return test_compose.results(literal.composition_error, *tensors, incoming, **options)


def mixed(tensors, incoming, **options) -> tuple[Tensor, ...]:
    """All results but views, and the gradients through the differentiable three."""
    return test_spatial_mixture.literally(*tensors, incoming[:3], **options)


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
            lose = functools.partial(iio_results, literal.iio_loss)
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


# --- memory -------------------------------------------------------------------------------------------------

#: Blocks, vectors and tiles that are not full, one by one and together.
ODD = [
    *(
        (operator, {"N": N, "Dk": Dk, "Dv": Dv, "K": K, "dtype": dtype})
        for operator in ATTENTION
        for N, Dk, Dv, K in ((1, 1, 3, 1), (31, 15, 17, 2), (1057, 33, 1, 5), (45, 16, None, 9), (1025, 64, 64, 3))
        for dtype in (F32, F64, BF16)
    ),
    *(
        (operator, {"H": H, "W": W, "C": C, "K": K, "dtype": dtype})
        for operator in INPAINTING
        for H, W, C, K in ((5, 5, 1, 2), (7, 33, 3, 4), (17, 16, 4, 3), (13, 5, 5, 5))
        for dtype in (F32, F64)
    ),
    *(
        (operator, {"H": H, "W": W, "C": C, "K": K, "dtype": dtype, "channels_last": channels_last})
        for operator in COMPOSITION
        for H, W, C, K in ((1, 1, 3, 2), (7, 9, 3, 4), (16, 17, 3, 1), (5, 13, 2, 24), (1, 1025, 3, 3))
        for dtype in (F32, F64, BF16)
        for channels_last in (False, True)
    ),
    *(
        (operator, {"H": H, "W": W, "C": C, "K": K, "dtype": dtype, "channels_last": channels_last})
        for operator in MIXTURE
        for H, W, C, K in ((1, 1, 3, 2), (7, 9, 3, 4), (5, 13, 2, 24))
        for dtype, channels_last in ((F32, False), (F32, True), (F64, True), (BF16, False))
    ),
    *(
        (operator, {"B": B, "O": O, "H": H, "W": W, "rows": rows, "columns": columns, "dtype": dtype})
        for operator in BROADCAST
        for B, O, H, W, rows, columns in (
            (1, 1, 1, 1, (0, 1, 0), (1, 1, 0)),
            (9, 15, 4, 5, (2, 1, 2), (0, 3, 1)),
            (2, 17, 1, 7, (0, 2, 1), (3, 2, 4)),
            (40, 64, 3, 3, (1, 1, 1), (1, 1, 1)),
        )
        for dtype in (F32, F64, BF16)
    ),
    *(
        (operator, {"N": N, "K": K, "Dx": Dx, "D": D, "H": H, "dtype": dtype})
        for operator in ITERATIONS
        for N, K, Dx, D, H in ((1, 1, 1, 1, 1), (31, 2, 17, 15, 33), (33, 16, 16, 16, 16), (65, 5, 1, 40, 3))
        for dtype in (F32, F64, BF16)
    ),
]
each_odd = pytest.mark.parametrize(("operator", "how"), ODD, ids=str)


@each_operator
def test_memory_of_results_begins_as_nan(operator):
    """conftest.py asks torch for it: what the operators allocate in C++ is filled too."""
    arguments = GOOD[operator]()
    with torch.autograd.profiler.profile() as profile:
        call(operator, arguments)
    names = [event.name for event in profile.function_events]
    assert names.count("aten::fill_") == names.count("aten::empty") >= 1


@each_odd
def test_results_are_written_to_the_last_number(operator, how):
    without_nan(call(operator, GOOD[operator](**how)))


@pytest.fixture
def fill_memory():
    """A function that makes malloc fill all memory that it gives out with a byte: the kernels' own workspace too."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc's malloc fills memory")
    libc = ctypes.CDLL(None)
    torch.utils.deterministic.fill_uninitialized_memory = False

    def fill(byte: int) -> None:
        # M_PERTURB: the number's lowest byte is inverted, and 0 means not to fill.
        assert libc.mallopt(-6, 0x100 | byte ^ 0xFF) == 1
        assert (torch.empty(5000, dtype=torch.uint8) == byte).all()

    yield fill
    libc.mallopt(-6, 0)


@pytest.mark.parametrize(("operator", "how"), ODD + LARGE, ids=str)
def test_results_do_not_depend_on_what_fresh_memory_holds(operator, how, fill_memory):
    arguments = GOOD[operator](**how)
    expected = without_nan(call(operator, arguments))
    for byte in (0xFF, 0x7F):  # NaN, and the largest numbers
        fill_memory(byte)
        with threads(2):
            assert_same(call(operator, arguments), expected)


def surrounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x amid NaN (True for a mask), and all of that memory."""
    memory = torch.full((x.numel() + 130,), float("nan")).to(x.dtype)
    return memory[65:-65].view(x.shape).copy_(x), memory


@pytest.mark.parametrize(("operator", "how"), ODD + LARGE, ids=str)
def test_what_is_given_is_not_written_to_and_what_lies_beside_it_does_not_matter(operator, how):
    arguments = GOOD[operator](**how)
    pairs = {name: surrounded(x) for name, x in arguments.items() if isinstance(x, Tensor)}
    before = {name: memory.clone() for name, (_, memory) in pairs.items()}
    expected = without_nan(call(operator, arguments))
    assert_same(call(operator, arguments | {name: x for name, (x, _) in pairs.items()}), expected)
    for name, (_, memory) in pairs.items():
        assert torch.equal(memory.view(torch.uint8), before[name].view(torch.uint8)), name


# --- wrong calls of the raw operators -----------------------------------------------------------------------

MUTATIONS = {
    "a dimension more": lambda x: x.unsqueeze(0),
    "a dimension less": lambda x: x[0],
    "int64": lambda x: x.to(torch.int64),
    "float16": lambda x: x.half(),
    **{f"size {d} one more": lambda x, d=d: torch.cat([x, x.narrow(d, 0, 1)], d) for d in range(5)},
    **{f"size {d} zero": lambda x, d=d: x.narrow(d, 0, 0) for d in range(5)},
}
#: What is a good call too: no other argument shares the size.
STILL_GOOD = {("slot_attention_forward", "v", f"size 3 {change}") for change in ("one more", "zero")}
STILL_GOOD |= {(operator, "image", "size 1 one more") for operator in INPAINTING if operator != "inpaint_backward"}
STILL_GOOD |= {(operator, "masks", "size 1 one more") for operator in INPAINTING if "backward" not in operator}
STILL_GOOD |= {("sampled_iio_loss", "pairs", "int64")}
STILL_GOOD |= {(f"{name}_forward", "decoded", "size 1 one more") for name in ("composition", "mixture")}  # K
STILL_GOOD |= {("broadcast_forward", "constant", f"size 0 {change}") for change in ("one more", "zero")}
STILL_GOOD |= {("broadcast_forward", "position_map", f"size {d} one more") for d in (0, 1)}  # classes are the same
STILL_GOOD |= {("iterations_forward", "x", f"size 1 {change}") for change in ("one more", "zero")}  # N
STILL_GOOD |= {("iterations_forward", "slots", "size 1 one more"), ("iterations_backward", "tape", "size 1 one more")}
WRONG = [
    (operator, name, mutation)
    for operator in GOOD
    for name, x in GOOD[operator]().items()
    for mutation in (MUTATIONS if isinstance(x, Tensor) else ())
    if (operator, name, mutation) not in STILL_GOOD
    and not (mutation.startswith("size") and int(mutation.split()[1]) >= x.dim())
]


def words(error: pytest.ExceptionInfo) -> str:
    """The message, without the place in the source that torch puts before it."""
    return re.sub(r"^.*\.(cpp|h):\d+, ", "", str(error.value))


@pytest.mark.parametrize(("operator", "name", "mutation"), WRONG)
def test_a_wrong_tensor_is_refused(operator, name, mutation):
    arguments = GOOD[operator]()
    arguments[name] = MUTATIONS[mutation](arguments[name])
    with pytest.raises(RuntimeError) as caught:
        call(operator, arguments)
    # Of two that do not fit each other either may be named.
    names = [other for other, x in arguments.items() if isinstance(x, Tensor)] if "size" in mutation else [name]
    spelled = {"masks": "masks?", "grad": "gradient", "x": "(x|w[pi])", "slots": "(slots|w[pij12])"}
    spelled |= {"d_slots": "(d_slots|w[pij12])", "tape": "(tape|iterations)"}
    assert re.search(rf"\b({'|'.join(spelled.get(x, x) for x in names)})\b", words(caught)), words(caught)


WRONG_OPTIONS = [
    *(("sigma", sigma) for sigma in (0.0, -1.0, float("nan"))),
    *(("kernel_size", size) for size in (4, 0, -1, -3, 13, 2**40 + 1)),
    *(("repeats", repeats) for repeats in (0, -1)),
]


@pytest.mark.parametrize(("name", "value"), WRONG_OPTIONS)
@pytest.mark.parametrize("operator", INPAINTING)
def test_a_wrong_option_is_refused(operator, name, value):
    with pytest.raises(RuntimeError) as caught:
        call(operator, GOOD[operator]() | {name: value})
    assert words(caught).startswith(name)


@pytest.mark.parametrize("operator", BROADCAST)
@pytest.mark.parametrize("name", ["rows", "columns"])
@pytest.mark.parametrize("value", [[1, 2], [1, 0, 1], [-1, 5, 0], [0, 5, -1], [9, 1, 2], [2**62, 1, 2**62]])
def test_wrong_classes_are_refused(operator, name, value):
    with pytest.raises(RuntimeError) as caught:
        call(operator, GOOD[operator]() | {name: value})
    assert words(caught).startswith(name)


@pytest.mark.parametrize("K", [1, 17, 33, 70])
@pytest.mark.parametrize(
    "operator", ["iio_loss", "sampled_iio_loss", "conditional_entropies", "conditional_entropies_backward"]
)
def test_a_wrong_number_of_masks_is_refused(operator, K):
    most = 32 if operator == "sampled_iio_loss" else 16
    if 1 < K <= most:
        pytest.skip("not so many")
    arguments = GOOD[operator]()
    arguments["masks"] = torch.rand(2, K, 11, 13)
    with pytest.raises(RuntimeError, match=f"expected 2 to {most} masks, got {K}"):
        call(operator, arguments)


# --- strides ------------------------------------------------------------------------------------------------


def restrided(x: Tensor, how: str) -> Tensor:
    if how == "of one number":
        return x.flatten()[0].expand(x.shape)
    if x.dim() == 1:  # a vector has one stride only
        return x.repeat_interleave(2)[::2]
    if x.dim() == 2 and how == "heads":
        how = "transposed"
    return attention_spec.strided(x, how)


each_stride = pytest.mark.parametrize("how", ["transposed", "sliced", "expanded", "heads", "of one number"])
STRIDED = [
    *((operator, {"N": 1100, "Dk": 16, "Dv": 6, "dtype": d}) for operator in ATTENTION for d in (F32, BF16)),
    *((operator, {"N": 37, "Dv": None, "joint_heads": True}) for operator in ATTENTION),
    *((operator, {}) for operator in INPAINTING),
    *((operator, {"dtype": dtype}) for operator in COMPOSITION for dtype in (F32, BF16)),
    *((operator, {"dtype": dtype}) for operator in MIXTURE for dtype in (F32, BF16)),
    *((operator, {"dtype": dtype}) for operator in BROADCAST for dtype in (F32, BF16)),
    *((operator, {"dtype": dtype}) for operator in ITERATIONS for dtype in (F32, BF16)),
]


@each_stride
@pytest.mark.parametrize(("operator", "sizes"), STRIDED, ids=str)
def test_strides_change_no_bit(operator, sizes, how):
    """Of any tensor that a raw operator takes."""
    arguments = GOOD[operator](**sizes)
    views = {name: restrided(x, how) for name, x in arguments.items() if isinstance(x, Tensor)}
    assert not any(x.is_contiguous() for x in views.values())
    dense = {name: x.clone(memory_format=torch.contiguous_format) for name, x in views.items()}
    assert_same(call(operator, arguments | views), without_nan(call(operator, arguments | dense)))


@each_operator
def test_tensors_that_are_negated_when_read(operator):
    """As the imaginary part of a conjugate is."""
    arguments = GOOD[operator]()
    numbers = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()}
    lazy = {name: torch.complex(x, -x).conj().imag for name, x in numbers.items()}
    assert all(x.is_neg() for x in lazy.values())
    assert_same(call(operator, arguments | lazy), without_nan(call(operator, arguments)))


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded", "of one number"])
@pytest.mark.parametrize("function", [conditional_entropies, interaction_information, inpaint])
def test_strided_incoming_gradients(function, how):
    tensors, _ = iio_spec.Case("strided", K=5, H=19, W=21).make()
    leaves = [x.requires_grad_() for x in tensors]
    y = function(*leaves, backend="cpu")
    grad = restrided(torch.randn(y.shape, dtype=F64), how)
    assert not grad.is_contiguous()
    expected = torch.autograd.grad(y, leaves, grad.contiguous(), retain_graph=True)
    assert_same(torch.autograd.grad(y, leaves, grad), without_nan(expected))


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded", "heads"])
@pytest.mark.parametrize("function", [conditional_entropies, interaction_information, inpaint])
def test_strided_images_and_masks(function, how):
    tensors, _ = iio_spec.Case("strided", B=3, H=19, W=21).make()
    views = [restrided(x, how).detach() for x in tensors]
    results = []
    for inputs in (views, [x.contiguous() for x in views]):
        leaves = [x.requires_grad_() for x in inputs]
        y = function(*leaves, backend="cpu")
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    assert_same(*results)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_reduced_losses(reduction):
    """Their incoming gradient is one number, seen as many."""
    (image, masks), _ = iio_spec.Case("reduced", B=5, K=3).make()
    leaves = image.requires_grad_(), masks.requires_grad_()
    losses = iio_loss(*leaves, reduction="none", backend="cpu")
    expected = torch.autograd.grad(losses, leaves, torch.full((5,), 2 / 5 if reduction == "mean" else 2, dtype=F64))
    loss = iio_loss(*leaves, reduction=reduction, backend="cpu").expand(2)
    assert_same(torch.autograd.grad(loss.sum(), leaves), expected)


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded", "heads"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_strided_queries_keys_and_values(how, dtype):
    """Several chunks of inputs."""
    tensors, options = attention_spec.Case("strided", batch=(2, 2), N=1100, Dv=6, inputs="some").make(dtype)
    views = [restrided(x, how) for x in tensors]
    dense = [x.clone(memory_format=torch.contiguous_format) for x in views]
    results = []
    for inputs in (views, dense):
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = slot_attention(*leaves, return_attention=True, backend="cpu", **options)
        incoming = [restrided(torch.linspace(-1, 1, x.numel()).view(x.shape).to(x), "transposed") for x in outputs]
        results.append((*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, incoming)))
    assert_same(results[0], without_nan(results[1]))


# --- torch.compile ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", [slot_attention, iio_loss], ids=lambda function: function.__name__)
def test_compiles_to_code(function, dynamic):
    """All the way through Inductor, forward and backward."""
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: function(*x, backend="cpu"), fullgraph=True, dynamic=dynamic)
    for size in (13, 16) if dynamic else (13,):
        case = attention_spec.Case("compiled", N=size) if function is slot_attention else iio_spec.Case("", K=2, H=size)
        tensors, _ = case.make(F32)
        leaves = [x.requires_grad_() for x in tensors]
        y, expected = compiled(*leaves), function(*leaves, backend="cpu")
        torch.testing.assert_close(y, expected)
        grad = torch.randn(y.shape)
        for x, exact in zip(*(torch.autograd.grad(out, leaves, grad) for out in (y, expected)), strict=True):
            torch.testing.assert_close(x, exact)


# --- derivatives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [conditional_entropies, interaction_information])
@pytest.mark.parametrize("K", [2, 3, 4])
def test_gradcheck_of_entropies(function, K):
    options = {"sigma": 1.0, "kernel_size": 3, "eps": 1e-3}
    tensors, options = iio_spec.Case("small", B=1, C=2, K=K, H=4, W=5, options=options).make()
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: function(*x, backend="cpu", **options), leaves)


@pytest.mark.parametrize("case", attention_spec.SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_gradcheck_from_inputs(case, biases):
    tensors, options = attention_spec.from_inputs(case, "cpu", biases)
    leaves = [x if x is None else x.requires_grad_() for x in tensors]

    def function(*leaves):
        return slot_attention_from_inputs(*leaves, return_attention=True, backend="cpu", **options)

    assert torch.autograd.gradcheck(function, leaves)


# --- any shape ----------------------------------------------------------------------------------------------


@settings(max_examples=examples(100), deadline=None, derandomize=True)
@given(
    batch=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    K=st.integers(1, 16),
    N=st.one_of(st.integers(0, 3000), st.sampled_from([0, 1, 32, 33, 1024, 1025, 2048, 2049])),
    Dk=st.integers(1, 70),
    Dv=st.integers(1, 70),
    options=st.sampled_from([{}, {"eps_in": "denominator"}, {"normalize": "sum"}, {"eps": 0.5}]),
    slots=st.sampled_from(["all", "some", "shared"]),
    inputs=st.sampled_from(["all", "some", "shared", "none"]),
    joint_heads=st.booleans(),
)
def test_any_large_shape(batch, K, N, Dk, Dv, options, slots, inputs, joint_heads):
    options = options | {"joint_heads": joint_heads and len(batch) > 0}
    case = attention_spec.Case("any", batch, K, N, Dk, Dv, options, slots, inputs)
    tensors, options = case.make(F32)
    got = attention_spec.run(tensors, "cpu", **options)
    eager = attention_spec.run(tensors, "reference", **options)
    truth = attention_spec.run([x.double() for x in tensors], "reference", **options)
    for name, x, plain, exact in zip(attention_spec.NAMES, got, eager, truth, strict=True):
        assert x.shape == exact.shape
        if exact.numel():
            allowed = attention_spec.allowed_error(exact, plain)
            if N < 4 and name in ("dq", "dk"):
                # U is close to a value, and what goes through it the rounding of terms that cancel.
                allowed += 100 * torch.finfo(F32).eps
            assert (x.double() - exact).abs().max() <= allowed, name


@settings(max_examples=examples(40), deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    C=st.integers(1, 7),
    K=st.integers(2, 6),
    H=st.integers(1, 40),
    W=st.one_of(st.integers(1, 40), st.sampled_from([8, 16, 32, 48])),
    half=st.integers(0, 7),
    repeats=st.integers(1, 3),
    number=st.integers(1, 3),
)
def test_any_large_image(B, C, K, H, W, half, repeats, number):
    kernel_size = 2 * min(half, (min(H, W) - 1) // 2) + 1
    options = {"sigma": 3.0, "kernel_size": kernel_size, "repeats": repeats}
    tensors, options = iio_spec.Case("any", B, C, K, H, W, options).make()
    for function in (conditional_entropies, inpaint):
        incoming = torch.randn_like(function(*tensors, backend="reference", **options))
        expected = test_iio_loss.results(function, *tensors, incoming, backend="reference", **options)
        with threads(number):
            got = test_iio_loss.results(function, *tensors, incoming, backend="cpu", **options)
        if kernel_size == 1 and function is conditional_entropies:  # residuals are rounding errors, and their signs
            got, expected = got[:1] * 3, expected[:1] * 3
        test_iio_loss.assert_all_close(got, expected, relative=1e-9)


# --- training -----------------------------------------------------------------------------------------------


def train(backend: str, dtype: torch.dtype, monkeypatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of 30 steps of a small autoencoder, 20 that reconstruct and 10 of the IIO loss; then its weights."""
    with monkeypatch.context() as patch:
        patch.setattr(backends, "BACKENDS", {backend: backends.BACKENDS[backend]})  # "auto" takes it
        torch.manual_seed(0)
        sizes = {"channels": 16, "kernel_size": 3, "slot_size": 16, "mlp_size": 32, "num_slots": 3}
        model = SlotAttentionAutoEncoder((12, 13), **sizes)
        torch.nn.init.normal_(model.decoder.to_rgba.weight, std=1.0)  # masks that differ
        model.to(dtype)
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        quarters, noise = torch.rand(4, 3, 2, 2).to(dtype), torch.randn(30, 4, 3, 16).to(dtype)
        image = quarters.repeat_interleave(6, 2).repeat_interleave(7, 3)[..., :13]
        losses = []
        for step in range(30):
            slots = model.slot_attention.mu + model.slot_attention.log_sigma.exp() * noise[step]
            slots, _ = model.slot_attention(model.encoder(2 * image - 1), slots, iterations=3)
            reconstruction, masks = compose(model.decoder(slots))
            error = (2 * image - 1 - reconstruction).square().mean()
            loss = error if step < 20 else iio_loss(image, masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses), {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "relative"), [(F64, 1e-9), (F32, 1e-3)], ids=["float64", "float32"])
def test_training_follows_the_reference(dtype, relative, monkeypatch):
    (got, weights), (expected, others) = (train(backend, dtype, monkeypatch) for backend in ("cpu", "reference"))
    assert expected[19] < 0.7 * expected[0]
    assert expected[29] < expected[20] - 0.01
    torch.testing.assert_close(got, expected, rtol=relative, atol=0)
    if dtype == F64:  # in float32 Adam makes steps of the rounding errors of a gradient that is 0
        for name, p in weights.items():
            torch.testing.assert_close(p, others[name], rtol=0, atol=relative)
