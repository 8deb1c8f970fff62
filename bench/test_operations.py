"""Forward and backward of each operation: the formula as printed, eager PyTorch, torch.compile, and our Functions."""

from __future__ import annotations

import pytest
import torch

import iio_kernels
from iio_kernels.ops import inpainting, slot_attention
from iio_kernels.ops.inpainting.reference import Inpainter
from iio_kernels.ops.inpainting.spec import BENCHMARKS as IIO
from iio_kernels.ops.slot_attention.spec import BENCHMARKS as ATTENTION
from tests import literal


@pytest.mark.parametrize("contender", ["literal", "reference", "reference, compiled", "IIOLossFunction"])
@pytest.mark.parametrize("case", IIO, ids=lambda case: case.name)
def test_iio_loss(race, device, case, contender):
    if contender == "literal" and case.name != "Tetrominoes":
        pytest.skip("the formula as printed takes minutes at this size")
    (image, masks), options = case.make(torch.float32, device)
    masks.requires_grad_()
    inpainter = Inpainter(5.0, 11, 2, 1e-8)
    losses = {
        "literal": lambda: literal.iio_loss(image, masks).mean(),
        "reference": lambda: iio_kernels.iio_loss(image, masks, backend="reference", **options),
        "IIOLossFunction": lambda: inpainting.IIOLossFunction.apply(image, masks, inpainter, "reference").mean(),
    }
    losses["reference, compiled"] = torch.compile(losses["reference"])
    race(
        lambda: torch.autograd.grad(losses[contender](), masks),
        group=f"iio_loss, {case.name}: B {case.B}, K {case.K}, {case.H}x{case.W}",
        name=contender,
    )


@pytest.mark.parametrize("contender", ["reference", "reference, compiled", "SlotAttentionFunction"])
@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_slot_attention(race, device, case, contender):
    inputs, options = case.make(torch.float32, device)
    for x in inputs:
        x.requires_grad_()
    complete = slot_attention.reference.Options(inputs[0].shape[-1] ** -0.5, 1e-8, "weights", "mean", False)
    steps = {
        "reference": lambda: iio_kernels.slot_attention(*inputs, backend="reference", **options),
        "SlotAttentionFunction": lambda: slot_attention.SlotAttentionFunction.apply(
            *inputs, None, None, complete, "reference"
        )[0],
    }
    steps["reference, compiled"] = torch.compile(steps["reference"])
    grad = torch.randn(*inputs[0].shape[:-1], inputs[2].shape[-1], device=device)
    race(
        lambda: torch.autograd.grad(steps[contender](), inputs, grad),
        group=f"slot_attention, {case.name}: batch {case.batch}, N {case.N}, K {case.K}, D {case.Dk}",
        name=contender,
    )
