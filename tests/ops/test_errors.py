"""What the public functions refuse and in which words; and that they never look at values."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_refused
from torch import Tensor

from iio_kernels import (
    conditional_entropies,
    iio_loss,
    inpaint,
    interaction_information,
    slot_attention,
    slot_attention_from_inputs,
)

LOSSES = (iio_loss, conditional_entropies, interaction_information)


def images(B=2, C=3, K=4, H=12, W=13, **changes) -> dict[str, object]:
    return {"image": torch.rand(B, C, H, W), "masks": torch.rand(B, K, H, W), **changes}


def slots(batch=(2,), K=4, N=5, Dk=6, Dv=7, **changes) -> dict[str, object]:
    q, k, v = torch.rand(*batch, K, Dk), torch.rand(*batch, N, Dk), torch.rand(*batch, N, Dv)
    return {"q": q, "k": k, "v": v, **changes}


def projected(**changes) -> dict[str, object]:
    """Arguments of `slot_attention_from_inputs`: two images, 4 slots 6 wide, 5 inputs 8 wide, values 7 wide."""
    shapes = {"x": (2, 5, 8), "q": (2, 4, 6), "wk": (6, 8), "bk": (6,), "wv": (7, 8), "bv": (7,)}
    return {**{name: torch.rand(shape) for name, shape in shapes.items()}, **changes}


def on_meta(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# A row: the arguments, the type of the error, and what its message must hold in this order.
INPAINTING = [
    (images(image=None), TypeError, ["image", "torch.Tensor (B, C, H, W)", "NoneType"]),
    (images(image=[[0.0]]), TypeError, ["image", "torch.Tensor", "list"]),
    (images(masks=torch.rand(2, 4, 12, 13).numpy()), TypeError, ["masks", "torch.Tensor", "ndarray"]),
    (
        images(image=torch.zeros(2, 3, 12, 13, dtype=torch.uint8)),
        TypeError,
        ["image", "float32", "torch.uint8"],
    ),
    (images(masks=torch.ones(2, 4, 12, 13, dtype=torch.bool)), TypeError, ["masks", "float32", "torch.bool"]),
    (images(masks=torch.rand(2, 4, 12, 13) + 0j), TypeError, ["masks", "float32", "torch.complex64"]),
    (
        images(masks=torch.rand(2, 4, 12, 13).to(torch.float8_e5m2)),
        TypeError,
        ["masks", "float16", "torch.float8_e5m2"],
    ),
    (images(image=torch.rand(3, 12, 13)), ValueError, ["image", "(B, C, H, W)", "(3, 12, 13)"]),
    (images(masks=torch.rand(2, 4, 1, 12, 13)), ValueError, ["masks", "(B, K, H, W)", "(2, 4, 1, 12, 13)"]),
    (
        images(masks=torch.rand(1, 4, 12, 13)),
        ValueError,
        ["masks", "(2, K, 12, 13)", "(2, 3, 12, 13)", "(1, 4, 12, 13)"],
    ),
    (images(masks=torch.rand(2, 4, 13, 12)), ValueError, ["masks", "(2, K, 12, 13)", "(2, 4, 13, 12)"]),
    (images(masks=torch.rand(2, 4, 1, 13)), ValueError, ["masks", "(2, K, 12, 13)", "(2, 4, 1, 13)"]),
    (images(C=0), ValueError, ["image", "at least one channel", "(2, 0, 12, 13)"]),
    (images(H=0), ValueError, ["image", "at least one", "pixel", "(2, 3, 0, 13)"]),
    (images(masks=on_meta((2, 4, 12, 13))), ValueError, ["masks", "device of image, cpu", "meta"]),
    (images(sigma=0.0), ValueError, ["sigma", "> 0", "0"]),
    (images(sigma=-1), ValueError, ["sigma", "> 0", "-1"]),
    (images(sigma=float("nan")), ValueError, ["sigma", "finite", "nan"]),
    (images(sigma=float("inf")), ValueError, ["sigma", "finite", "inf"]),
    (images(sigma="5"), TypeError, ["sigma", "number", "str"]),
    (images(sigma=True), TypeError, ["sigma", "number", "bool"]),
    (images(sigma=torch.tensor(5.0)), TypeError, ["sigma", "number", "Tensor"]),
    (images(kernel_size=4), ValueError, ["kernel_size", "odd", "4"]),
    (images(kernel_size=0), ValueError, ["kernel_size", ">= 1", "0"]),
    (images(kernel_size=-3), ValueError, ["kernel_size", ">= 1", "-3"]),
    (images(kernel_size=13), ValueError, ["kernel_size", "smaller side, 12", "13"]),
    (images(kernel_size=5.0), TypeError, ["kernel_size", "int", "float"]),
    (images(kernel_size=True), TypeError, ["kernel_size", "int", "bool"]),
    (images(repeats=0), ValueError, ["repeats", ">= 1", "0"]),
    (images(repeats=1.5), TypeError, ["repeats", "int", "float"]),
    (images(eps=-1e-9), ValueError, ["eps", ">= 0", "-1e-09"]),
    (images(eps=float("nan")), ValueError, ["eps", "finite", "nan"]),
    (images(eps=None), TypeError, ["eps", "number", "NoneType"]),
    (images(backend="fastest"), ValueError, ["backend", "'auto'", "'reference'", "'fastest'"]),
    (images(backend=None), ValueError, ["backend", "'auto'", "None"]),
]
MANY_MASKS = [
    (images(K=1), ValueError, ["masks", "at least 2", "1"]),
    (
        images(K=13, backend="reference"),
        ValueError,
        ["masks", "at most 12", "'reference'", "13", "2**13 subsets", "0.0381 GiB"],
    ),
    (images(K=17, backend="cpu"), ValueError, ["masks", "at most 16", "'cpu'", "17", "2**17 subsets", "sums"]),
    (
        images(K=3000, backend="reference"),
        ValueError,
        ["masks", "at most 12", "3000", "2**3000 subsets", "GiB"],
    ),
]
LOSS = [
    (images(terms="all"), ValueError, ["terms", "'sum', 'mean'", "'all'"]),
    (images(terms=None), ValueError, ["terms", "'sum', 'mean'", "None"]),
    (images(reduction="batchmean"), ValueError, ["reduction", "'mean', 'sum', 'none'", "'batchmean'"]),
    (images(reduction=None), ValueError, ["reduction", "'mean', 'sum', 'none'", "None"]),
]
MASK = torch.ones(2, 4, dtype=torch.bool)
ATTENTION = [
    (slots(q=None), TypeError, ["q", "torch.Tensor (..., K, Dk)", "NoneType"]),
    (slots(k=[1.0]), TypeError, ["k", "torch.Tensor (..., N, Dk)", "list"]),
    (slots(v=torch.rand(2, 5, 7).numpy()), TypeError, ["v", "torch.Tensor (..., N, Dv)", "ndarray"]),
    (slots(q=torch.ones(2, 4, 6, dtype=torch.int64)), TypeError, ["q", "float32", "torch.int64"]),
    (slots(v=torch.rand(2, 5, 7) + 0j), TypeError, ["v", "float32", "torch.complex64"]),
    (
        slots(k=torch.rand(2, 5, 6).to(torch.float8_e4m3fn)),
        TypeError,
        ["k", "float16", "torch.float8_e4m3fn"],
    ),
    (slots(q=torch.rand(6)), ValueError, ["q", "(..., K, Dk)", "(6,)"]),
    (slots(batch=(), joint_heads=True), ValueError, ["q", "(..., H, K, Dk)", "(4, 6)"]),
    (slots(K=0), ValueError, ["q", "at least one slot", "(2, 0, 6)"]),
    (slots(Dk=0), ValueError, ["q", "one feature", "(2, 4, 0)"]),
    (slots(k=torch.rand(2, 5, 8)), ValueError, ["k", "(2, N, 6)", "(2, 4, 6)", "(2, 5, 8)"]),
    (slots(k=torch.rand(3, 5, 6)), ValueError, ["k", "(2, N, 6)", "(3, 5, 6)"]),
    (slots(k=torch.rand(1, 5, 6)), ValueError, ["k", "(2, N, 6)", "(1, 5, 6)"]),
    (slots(k=torch.rand(5, 6)), ValueError, ["k", "(2, N, 6)", "(5, 6)"]),
    (slots(v=torch.rand(2, 6, 7)), ValueError, ["v", "(2, 5, Dv)", "(2, 5, 6)", "(2, 6, 7)"]),
    (slots(v=torch.rand(2, 2, 5, 7)), ValueError, ["v", "(2, 5, Dv)", "(2, 2, 5, 7)"]),
    (slots(k=on_meta((2, 5, 6))), ValueError, ["k", "device of q, cpu", "meta"]),
    (slots(v=on_meta((2, 5, 7))), ValueError, ["v", "device of q, cpu", "meta"]),
    (slots(slot_mask=on_meta((2, 4), torch.bool)), ValueError, ["slot_mask", "device of q, cpu", "meta"]),
    (slots(input_mask=on_meta((5,), torch.bool)), ValueError, ["input_mask", "device of q, cpu", "meta"]),
    (slots(slot_mask=True), TypeError, ["slot_mask", "boolean torch.Tensor (..., K)", "bool"]),
    (slots(input_mask=[True] * 5), TypeError, ["input_mask", "boolean torch.Tensor (..., N)", "list"]),
    (slots(slot_mask=MASK.float()), TypeError, ["slot_mask", "torch.bool", "torch.float32"]),
    (
        slots(input_mask=torch.ones(2, 5, dtype=torch.uint8)),
        TypeError,
        ["input_mask", "torch.bool", "torch.uint8"],
    ),
    (slots(slot_mask=MASK[:, :3]), ValueError, ["slot_mask", "(..., K) = (2, 4)", "(2, 3)"]),
    (slots(slot_mask=MASK[None]), ValueError, ["slot_mask", "(2, 4)", "(1, 2, 4)"]),
    (slots(input_mask=MASK), ValueError, ["input_mask", "(..., N) = (2, 5)", "(2, 4)"]),
    (slots(scale="0.5"), TypeError, ["scale", "number", "str"]),
    (slots(scale=True), TypeError, ["scale", "number", "bool"]),
    (slots(scale=float("nan")), ValueError, ["scale", "finite", "nan"]),
    (slots(scale=float("-inf")), ValueError, ["scale", "finite", "-inf"]),
    (slots(eps=-1.0), ValueError, ["eps", ">= 0", "-1"]),
    (slots(eps=float("inf")), ValueError, ["eps", "finite", "inf"]),
    (slots(eps=None), TypeError, ["eps", "number", "NoneType"]),
    (slots(eps=False), TypeError, ["eps", "number", "bool"]),
    (slots(eps_in="numerator"), ValueError, ["eps_in", "'weights', 'denominator'", "'numerator'"]),
    (slots(normalize="max"), ValueError, ["normalize", "'mean', 'sum'", "'max'"]),
    (slots(normalize=True), ValueError, ["normalize", "'mean', 'sum'", "True"]),
    (slots(joint_heads=1), TypeError, ["joint_heads", "bool", "1"]),
    (slots(return_attention=None), TypeError, ["return_attention", "bool", "None"]),
    (slots(backend="fastest"), ValueError, ["backend", "'auto'", "'reference'", "'fastest'"]),
]
FROM_INPUTS = [
    (projected(x=None), TypeError, ["x", "torch.Tensor (..., N, Dx)", "NoneType"]),
    (projected(wk=torch.ones(6, 8, dtype=torch.int64)), TypeError, ["wk", "float32", "torch.int64"]),
    (projected(bk=1.0), TypeError, ["bk", "torch.Tensor (..., D)", "float"]),
    (projected(x=torch.rand(8)), ValueError, ["x", "(..., N, Dx)", "(8,)"]),
    (projected(x=torch.rand(3, 5, 8)), ValueError, ["x", "(5, 8)", "q", "(2,)", "(3, 5, 8)"]),
    (projected(x=torch.rand(2, 5, 0)), ValueError, ["x", "at least one feature", "(2, 5, 0)"]),
    (projected(q=torch.rand(2, 0, 6)), ValueError, ["q", "at least one slot", "(2, 0, 6)"]),
    (projected(wk=torch.rand(8, 6)), ValueError, ["wk", "(6, 8)", "q and x", "(8, 6)"]),
    (projected(wk=torch.rand(3, 6, 8)), ValueError, ["wk", "(6, 8)", "(2,)", "(3, 6, 8)"]),
    (projected(wv=torch.rand(7, 6)), ValueError, ["wv", "(7, 8)", "q and x", "(7, 6)"]),
    (projected(bk=torch.rand(7)), ValueError, ["bk", "(6,)", "its weight", "(7,)"]),
    (projected(bv=torch.rand(6)), ValueError, ["bv", "(7,)", "its weight", "(6,)"]),
    (projected(bv=torch.rand(3, 7)), ValueError, ["bv", "(7,)", "(2,)", "(3, 7)"]),
    (projected(bv=on_meta((7,))), ValueError, ["bv", "device of x, cpu", "meta"]),
    (projected(input_mask=MASK), ValueError, ["input_mask", "(..., N) = (2, 5)", "(2, 4)"]),
    (projected(eps_in="numerator"), ValueError, ["eps_in", "'weights', 'denominator'", "'numerator'"]),
]
TABLE = [
    *((function, *row) for row in INPAINTING for function in (*LOSSES, inpaint)),
    *((function, *row) for row in MANY_MASKS for function in LOSSES),
    *((iio_loss, *row) for row in LOSS),
    (inpaint, images(K=0), ValueError, ["masks", "at least 1", "0"]),
    *((slot_attention, *row) for row in ATTENTION),
    *((slot_attention_from_inputs, *row) for row in FROM_INPUTS),
]


def _name(value: object) -> str | None:
    if callable(value) and not isinstance(value, type):
        return value.__name__
    return ", ".join(value) if isinstance(value, list) else None


@pytest.mark.parametrize(("function", "arguments", "error", "words"), TABLE, ids=_name)
def test_bad_arguments_are_named(function, arguments, error, words):
    assert_refused(function, arguments, error, words)


@pytest.mark.parametrize("function", [*LOSSES, inpaint, slot_attention], ids=lambda function: function.__name__)
def test_options_are_given_by_name(function):
    arguments = images() if function is not slot_attention else slots()
    with pytest.raises(TypeError, match="positional"):
        function(*arguments.values(), 5.0)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (iio_loss, images(sigma=5, eps=0, kernel_size=11)),
        (iio_loss, images(H=11, W=11)),
        (iio_loss, images(K=12, H=11, W=11, B=0, backend="reference")),
        (inpaint, images(K=13)),
        (slot_attention, slots(scale=-1, eps=0)),
        (slot_attention, slots(slot_mask=torch.tensor(True), input_mask=torch.ones(1, 5, dtype=torch.bool))),
    ],
)
def test_the_edge_of_what_is_allowed(function, arguments):
    function(**arguments)


# --- by shapes alone ----------------------------------------------------------------------------------------
# A meta tensor has no values: to look at one, or to wait for the device, raises.


def differentiable(arguments: dict[str, object]) -> dict[str, object]:
    moved = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in arguments.items()}
    for x in moved.values():
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_()
    return moved


BACKENDS = ("reference", "written_out")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (iio_loss, ()),
        (conditional_entropies, (2, 4, 7)),
        (interaction_information, (2, 4)),
        (inpaint, (2, 4, 3, 12, 13)),
    ],
    ids=_name,
)
def test_inpainting_looks_at_no_value(function, shape, backend):
    arguments = differentiable(images(backend=backend))
    result = function(**arguments)
    assert result.shape == shape
    result.sum().backward()
    assert arguments["image"].grad.shape == (2, 3, 12, 13)
    assert arguments["masks"].grad.shape == (2, 4, 12, 13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"eps_in": "denominator"}, {"normalize": "sum"}, {"joint_heads": True}], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
def test_slot_attention_looks_at_no_value(options, masked, backend):
    masks = {"slot_mask": torch.ones(3, 1, dtype=torch.bool), "input_mask": torch.ones(5, dtype=torch.bool)}
    arguments = slots(batch=(2, 3), backend=backend, return_attention=True, **options, **(masks if masked else {}))
    arguments = differentiable(arguments)
    U, A = slot_attention(**arguments)
    assert U.shape == (2, 3, 4, 7)
    assert A.shape == (2, 3, 4, 5)
    (U.sum() + A.sum()).backward()
    for name, shape in (("q", (2, 3, 4, 6)), ("k", (2, 3, 5, 6)), ("v", (2, 3, 5, 7))):
        assert arguments[name].grad.shape == shape
