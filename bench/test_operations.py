"""Each operation, forward alone and with its gradients: the formula as printed, eager PyTorch, torch.compile, ours."""

from __future__ import annotations

import pytest
import torch

from iio_kernels import iio_loss, slot_attention, slot_attention_from_inputs
from iio_kernels.ops.inpainting.spec import BENCHMARKS as IIO
from iio_kernels.ops.slot_attention.spec import BENCHMARKS as ATTENTION
from tests import literal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
each_direction = pytest.mark.parametrize("backward", [True, False], ids=["forward+backward", "forward"])
each_contender = pytest.mark.parametrize("contender", ["eager", "torch.compile", "ours"])
named = {"ids": lambda case: case.name}


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function)


def floor(case, machine, backward: bool) -> float:
    """Seconds that no kernel can beat: the least traffic at a copy's speed, the operations at a product's."""
    bytes_moved = case.bytes_moved(torch.float32, backward) + (case.bytes_moved(torch.float32) if backward else 0)
    operations = case.flops() + case.flops(backward=True) if backward else case.flops()
    return max(bytes_moved / machine["bytes_per_second"], operations / machine["operations_per_second"])


def loss_floor(case, machine, backward: bool) -> float:
    """One pass serves loss and gradient."""
    return max(
        case.bytes_moved(torch.float32, backward) / machine["bytes_per_second"],
        case.flops(backward) / machine["operations_per_second"],
    )


@each_contender
@each_direction
@pytest.mark.parametrize("case", ATTENTION[DEVICE], **named)
def test_slot_attention(race, device, machine, case, backward, contender):
    inputs, options = case.make(torch.float32, device)
    inputs = [x.requires_grad_(backward) for x in inputs]
    call = {
        "eager": lambda *x: slot_attention(*x, backend="reference", **options),
        "ours": lambda *x: slot_attention(*x, **options),
    }
    call["torch.compile"] = compiled(call["eager"])
    dU = torch.randn(*inputs[0].shape[:-1], case.Dv, device=device)

    def step():
        U = call[contender](*inputs)
        return torch.autograd.grad(U, inputs, dU) if backward else U

    race(
        step,
        group=f"slot_attention, {case.name}, B{case.batch[0]} N{case.N} K{case.K} D{case.Dk}, "
        f"{'forward+backward' if backward else 'forward'}",
        name=contender,
        floor=floor(case, machine, backward),
    )


@each_contender
@each_direction
@pytest.mark.parametrize("case", ATTENTION[f"{DEVICE}, from inputs"], **named)
def test_slot_attention_from_inputs(race, device, machine, case, backward, contender):
    """Against projecting x to keys and values, then eager attention. Dv stands for the width of x."""
    (q, _, x), options = case.make(torch.float32, device)
    wk, wv = (torch.randn(case.Dk, case.Dv, device=device) for _ in range(2))
    inputs = [y.requires_grad_(backward) for y in (x, q, wk, wv)]
    call = {
        "eager": lambda x, q, wk, wv: slot_attention(q, x @ wk.mT, x @ wv.mT, backend="reference", **options),
        "ours": lambda x, q, wk, wv: slot_attention_from_inputs(x, q, wk, None, wv, None, **options),
    }
    call["torch.compile"] = compiled(call["eager"])
    dU = torch.randn(*q.shape, device=device)

    def step():
        U = call[contender](*inputs)
        return torch.autograd.grad(U, inputs, dU) if backward else U

    x_bytes = x.nbytes * (3 if backward else 1)
    race(
        step,
        group=f"slot_attention_from_inputs, {case.name}, B{case.batch[0]} N{case.N} K{case.K} D{case.Dk} "
        f"x{case.Dv}, {'forward+backward' if backward else 'forward'}",
        name=contender,
        floor=x_bytes / machine["bytes_per_second"],
    )


@pytest.mark.parametrize("contender", ["literal", "eager", "torch.compile", "ours"])
@each_direction
@pytest.mark.parametrize("case", IIO[DEVICE], **named)
def test_iio_loss(race, device, machine, case, backward, contender):
    if contender != "ours" and case.K > 7:
        pytest.skip("at this size only ours is practical")
    (image, masks), options = case.make(torch.float32, device)
    masks.requires_grad_(backward)
    call = {
        "literal": lambda: literal.iio_loss(image, masks).mean(),
        "eager": lambda: iio_loss(image, masks, backend="reference", **options),
        "ours": lambda: iio_loss(image, masks, **options),
    }
    call["torch.compile"] = compiled(call["eager"])

    def step():
        loss = call[contender]()
        return torch.autograd.grad(loss, masks) if backward else loss

    race(
        step,
        group=f"iio_loss, {case.name}, B{case.B} K{case.K} {case.H}x{case.W}, "
        f"{'forward+backward' if backward else 'forward'}",
        name=contender,
        floor=loss_floor(case, machine, backward),
    )
