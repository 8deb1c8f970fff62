"""Good calls of the compiled CPU operators, small and large, for the tests in test_cpu_*.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from iio_kernels.ops.iio_loss import sampling
from iio_kernels.ops.slot_attention_module import api as iterations_operation
from iio_kernels.runtime import backends, build
from iio_kernels.runtime.backends import OPERATIONS
from iio_kernels.testing import broadcast_conv2d as broadcast_spec
from iio_kernels.testing import compose as composition_spec
from iio_kernels.testing import slot_attention_module as iterations_spec
from iio_kernels.testing import spatial_mixture as mixture_spec
from iio_kernels.testing.tensors import random_like

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
    d_x_hat, d_a, d_errors = random_like(x_hat, a, errors)
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
    g, dm, dq = random_like(log_likelihood, m, q)
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
    d_slots, d_attention = random_like(slots, attention)
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
#: What the library defines.
NAMES = torch._C._dispatch_get_all_op_names()
DEFINED = {name.removeprefix("iio_kernels::") for name in NAMES if name.startswith("iio_kernels::")}


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


# --- the ways each is called ---------------------------------------------------------------------------------

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
