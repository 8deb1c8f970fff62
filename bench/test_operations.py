"""Each operation, forward alone and with its gradients: the formula as printed, eager PyTorch, torch.compile, ours."""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.nn.functional as F

from iio_kernels import (
    SlotAttentionWeights,
    broadcast_conv2d,
    composition_error,
    iio_loss,
    slot_attention,
    slot_attention_from_inputs,
    slot_attention_module,
    spatial_mixture,
)
from iio_kernels.testing.broadcast_conv2d import BENCHMARKS as BROADCAST
from iio_kernels.testing.compose import BENCHMARKS as COMPOSITION
from iio_kernels.testing.iio_loss import BENCHMARKS as IIO
from iio_kernels.testing.slot_attention import BENCHMARKS as ATTENTION
from iio_kernels.testing.slot_attention_module import BENCHMARKS as ITERATIONS
from iio_kernels.testing.slot_attention_module import literal_slot_attention_module
from iio_kernels.testing.spatial_mixture import BENCHMARKS as MIXTURE
from tests import literal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: "toy" is for gpu.sh --dry-run: the kernels of a GPU, in Triton's interpreter.
SIZES = os.environ.get("IIO_KERNELS_BENCH_SIZES", DEVICE)
OURS = "triton" if SIZES == "toy" else "auto"
each_direction = pytest.mark.parametrize("backward", [True, False], ids=["forward+backward", "forward"])
each_contender = pytest.mark.parametrize("contender", ["eager", "torch.compile", "ours"])
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32] if SIZES == "cpu" else [torch.float32, torch.bfloat16], ids=str
)
named = {"ids": lambda case: case.name}


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function)


def floor(case, machine, dtype: torch.dtype, backward: bool) -> float:
    """Seconds for the least traffic at a copy's speed, or the operations at a matrix product's."""
    bytes_moved = case.bytes_moved(dtype, backward) + (case.bytes_moved(dtype) if backward else 0)
    operations = case.flops() + case.flops(backward=True) if backward else case.flops()
    rate = machine.get(f"{str(dtype).removeprefix('torch.')}_operations_per_second", machine["operations_per_second"])
    return max(bytes_moved / machine["bytes_per_second"], operations / rate)


def loss_floor(case, machine, backward: bool) -> float:
    """One pass serves loss and gradient."""
    return max(
        case.bytes_moved(torch.float32, backward) / machine["bytes_per_second"],
        case.flops(backward) / machine["operations_per_second"],
    )


def suffix(dtype: torch.dtype) -> str:
    return "" if dtype == torch.float32 else f" {str(dtype).removeprefix('torch.')}"


def einsums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What a careful user writes: inputs in the last dimension, where a softmax over few slots is quicker."""
    A = (torch.einsum("bkd,bnd->bkn", q, k) * q.shape[-1] ** -0.5).softmax(1) + 1e-8
    return torch.einsum("bkn,bnd->bkd", A / A.sum(-1, keepdim=True), v)


@pytest.mark.parametrize("contender", ["einsums", "eager", "torch.compile", "ours"])
@each_direction
@each_dtype
@pytest.mark.parametrize("case", ATTENTION[SIZES], **named)
def test_slot_attention(race, device, machine, sets_of_inputs, case, dtype, backward, contender):
    """On inputs of their own, one call after the other, where a cache could hold them."""
    call = {
        "einsums": einsums,
        "eager": lambda *x: slot_attention(*x, backend="reference", **case.options),
        "ours": lambda *x: slot_attention(*x, **case.options, backend=OURS),
    }
    call["torch.compile"] = compiled(call["eager"])

    def step(seed: int):
        inputs = [x.requires_grad_(backward) for x in case.make(dtype, device, seed)[0]]
        dU = torch.randn(*inputs[0].shape[:-1], case.Dv, device=device, dtype=dtype)

        def run():
            U = call[contender](*inputs)
            return torch.autograd.grad(U, inputs, dU) if backward else U

        return run

    race(
        [step(seed) for seed in sets_of_inputs(case.bytes_moved(dtype))],
        group=f"slot_attention, {case.name}, B{case.batch[0]} N{case.N} K{case.K} D{case.Dk}{suffix(dtype)}, "
        f"{'forward+backward' if backward else 'forward'}",
        name=contender,
        floor=floor(case, machine, dtype, backward),
    )


@each_contender
@each_direction
@each_dtype
@pytest.mark.parametrize("case", ATTENTION[f"{SIZES}, from inputs"], **named)
def test_slot_attention_from_inputs(race, device, machine, sets_of_inputs, case, dtype, backward, contender):
    """Against projecting x to keys and values, then eager attention. Dv stands for the width of x."""
    call = {
        "eager": lambda x, q, wk, wv: slot_attention(q, x @ wk.mT, x @ wv.mT, backend="reference", **case.options),
        "ours": lambda x, q, wk, wv: slot_attention_from_inputs(x, q, wk, None, wv, None, **case.options, backend=OURS),
    }
    call["torch.compile"] = compiled(call["eager"])

    def step(seed: int):
        (q, _, x), _ = case.make(dtype, device, seed)
        wk, wv = (torch.randn(case.Dk, case.Dv, device=device, dtype=dtype) for _ in range(2))
        inputs = [y.requires_grad_(backward) for y in (x, q, wk, wv)]
        dU = torch.randn_like(q)

        def run():
            U = call[contender](*inputs)
            return torch.autograd.grad(U, inputs, dU) if backward else U

        return run

    x_bytes = math.prod(case.batch) * case.N * case.Dv * dtype.itemsize
    race(
        [step(seed) for seed in sets_of_inputs(x_bytes)],
        group=f"slot_attention_from_inputs, {case.name}, B{case.batch[0]} N{case.N} K{case.K} D{case.Dk} "
        f"x{case.Dv}{suffix(dtype)}, {'forward+backward' if backward else 'forward'}",
        name=contender,
        floor=max(
            x_bytes * (3 if backward else 1) / machine["bytes_per_second"],
            2
            * math.prod(case.batch)
            * case.N
            * case.K
            * case.Dv
            * (7 if backward else 2)
            / machine["operations_per_second"],
        ),
    )


@pytest.mark.parametrize(
    "contender", ["literal", "eager", "torch.compile", "ours", *(["ours, cuda"] if DEVICE == "cuda" else [])]
)
@each_direction
@pytest.mark.parametrize("case", IIO[SIZES], **named)
def test_iio_loss(race, device, machine, sets_of_inputs, case, backward, contender):
    if not contender.startswith("ours") and case.K > 7 and (contender == "literal" or "subsets" not in case.options):
        pytest.skip("at this size only ours is practical")
    call = {
        "literal": lambda image, masks: literal.iio_loss(image, masks).mean(),
        "eager": lambda image, masks: iio_loss(image, masks, backend="reference", **case.options),
        "ours": lambda image, masks: iio_loss(image, masks, **case.options, backend=OURS),
        "ours, cuda": lambda image, masks: iio_loss(image, masks, **case.options, backend="cuda"),
    }
    call["torch.compile"] = compiled(call["eager"])

    def step(seed: int):
        random = torch.Generator(device).manual_seed(seed)
        image = torch.rand(case.B, case.C, case.H, case.W, generator=random, device=device)
        masks = torch.randn(case.B, case.K, case.H, case.W, generator=random, device=device).softmax(1)
        masks.requires_grad_(backward)

        def run():
            loss = call[contender](image, masks)
            return torch.autograd.grad(loss, masks) if backward else loss

        return run

    race(
        [step(seed) for seed in sets_of_inputs(case.bytes_moved(torch.float32))],
        group=f"iio_loss, {case.name}, B{case.B} K{case.K} {case.H}x{case.W}, "
        f"{'forward+backward' if backward else 'forward'}",
        name=contender,
        floor=loss_floor(case, machine, backward),
    )


@each_contender
@each_direction
@pytest.mark.parametrize("case", COMPOSITION[SIZES], **named)
def test_composition(race, device, machine, sets_of_inputs, case, backward, contender):
    """The error; decoded stored as decoders leave it."""
    call = {
        "eager": lambda image, decoded: composition_error(image, decoded, backend="reference"),
        "ours": lambda image, decoded: composition_error(image, decoded, backend=OURS),
    }
    call["torch.compile"] = compiled(call["eager"])

    def step(seed: int):
        (image, decoded), _ = case.make(case.dtype, device, seed)
        image, decoded = image.float(), decoded.requires_grad_(backward)

        def run():
            error = call[contender](image, decoded)
            return torch.autograd.grad(error, decoded) if backward else error

        return run

    race(
        [step(seed) for seed in sets_of_inputs(case.bytes_moved(case.dtype))],
        group=f"composition_error, {case.name}, B{case.B} K{case.K} {case.H}x{case.W}{suffix(case.dtype)}, "
        f"{'forward+backward' if backward else 'forward'}",
        name=contender,
        floor=floor(case, machine, case.dtype, backward),
    )


def plain_mixture(image: torch.Tensor, decoded: torch.Tensor, sigma: float = 0.1) -> tuple[torch.Tensor, ...]:
    """What a careful user writes of a mixture: over all slots at once, and all pairs of slots for leaving one out; the
    gradients that IODINE refines from by autograd."""
    log_m = decoded[:, :, -1].log_softmax(1)
    exponent = -0.5 * ((image.unsqueeze(1) - decoded[:, :, :-1]) / sigma).square().sum(2)
    log_p_k = exponent - image.shape[1] * math.log(sigma * math.sqrt(2 * math.pi))
    joint = log_m + log_p_k
    log_p = joint.logsumexp(1)
    (d_decoded,) = torch.autograd.grad(-log_p.sum(), decoded, retain_graph=True)
    with torch.no_grad():
        same = torch.eye(decoded.shape[1], dtype=torch.bool, device=decoded.device)[:, :, None, None]
        others = [x.unsqueeze(1).masked_fill(same, -math.inf).logsumexp(2) for x in (joint, log_m)]
    return log_p, log_m.exp(), log_p_k.softmax(1), others[0] - others[1], d_decoded


@pytest.mark.parametrize("contender", ["literal", "eager", "torch.compile", "ours"])
@each_direction
@pytest.mark.parametrize("case", MIXTURE[SIZES], **named)
def test_mixture(race, device, machine, sets_of_inputs, case, backward, contender):
    """All that IODINE refines from, and the gradient through what is differentiable; decoded as decoders leave it.

    Literal goes slot by slot, as the published program does; torch.compile has the gradients written out.
    """
    call = {
        "literal": literal.spatial_mixture,
        "eager": plain_mixture,
        "torch.compile": compiled(lambda *x: tuple(spatial_mixture(*x, backend="reference"))),
        "ours": lambda *x: spatial_mixture(*x, backend=OURS),
    }

    def step(seed: int):
        (image, decoded), _ = case.make(case.dtype, device, seed)
        image, decoded = image.float(), decoded.requires_grad_()
        incoming = [torch.rand_like(x) for x in spatial_mixture(image, decoded, backend="reference")[:3]]

        def run():
            results = call[contender](image, decoded)
            return torch.autograd.grad(results[:3], decoded, incoming) if backward else results

        return run

    race(
        [step(seed) for seed in sets_of_inputs(case.bytes_moved(case.dtype))],
        group=f"spatial_mixture, {case.name}, B{case.B} K{case.K} {case.H}x{case.W}{suffix(case.dtype)}, "
        f"{'forward+backward' if backward else 'forward'}",
        name=contender,
        floor=floor(case, machine, case.dtype, backward),
    )


@pytest.mark.parametrize("contender", ["eager", "split", "torch.compile", "ours"])
@each_direction
@pytest.mark.parametrize("case", BROADCAST[SIZES], **named)
def test_broadcast(race, device, machine, sets_of_inputs, case, backward, contender):
    """A decoder's first layer with its ReLU: eager convolves slots plus positions, as decoders do; the others split."""
    convolve = F.conv_transpose2d if case.transposed else F.conv2d
    more = (case.output_padding,) if case.transposed else ()

    def plain(z, weight, position, bias):
        grid = (z[:, :, None, None] + position).contiguous(memory_format=torch.channels_last)
        return F.relu(convolve(grid, weight, bias, case.stride, case.padding, *more))

    def split(z, weight, position, bias, backend):
        position_map = convolve(position[None], weight, bias, case.stride, case.padding, *more)[0]
        return broadcast_conv2d(z, weight, position_map, **case.options, backend=backend)

    call = {
        "eager": plain,
        "split": lambda *x: split(*x, backend="reference"),
        "torch.compile": compiled(plain),
        "ours": lambda *x: split(*x, backend=OURS),
    }

    def step(seed: int):
        (z, weight, position_map), _ = case.make(case.dtype, device, seed)
        position = torch.randn(*case.size, case.D, device=device, dtype=case.dtype).permute(2, 0, 1)
        inputs = [x.requires_grad_(backward) for x in (z, weight, position, position_map[:, 0, 0].clone())]
        d_out = torch.randn(*case.batch, *case.result, device=device, dtype=case.dtype)
        d_out = d_out.contiguous(memory_format=torch.channels_last)

        def run():
            out = call[contender](*inputs)
            return torch.autograd.grad(out, inputs, d_out) if backward else out

        return run

    race(
        [step(seed) for seed in sets_of_inputs(case.bytes_moved(case.dtype))],
        group=f"broadcast_conv2d, {case.name}, {case.batch[0]} slots D{case.D} to {case.O} x "
        f"{case.result[1]}x{case.result[2]}{suffix(case.dtype)}, {'forward+backward' if backward else 'forward'}",
        name=contender,
        floor=floor(case, machine, case.dtype, backward),
    )


@each_contender
@each_direction
@each_dtype
@pytest.mark.parametrize("case", ITERATIONS[SIZES], **named)
def test_slot_attention_module(race, device, machine, sets_of_inputs, case, dtype, backward, contender):
    """Against the algorithm with keys and values, projected once for all iterations."""
    call = {
        "eager": lambda *inputs: literal_slot_attention_module(*inputs)[0],
        "ours": lambda *inputs: slot_attention_module(*inputs, backend=OURS),
    }
    call["torch.compile"] = compiled(call["eager"])

    def step(seed: int):
        (x, slots, weights, T), _ = case.make(dtype, device, seed)
        if contender != "ours":
            x = x.float()  # which torch's layers do not mix with others
        inputs = [y.requires_grad_(backward) for y in (x, slots, *weights)]

        def run():
            out = call[contender](*inputs[:2], SlotAttentionWeights(*inputs[2:]), T)
            return torch.autograd.grad(out, inputs, torch.ones_like(out)) if backward else out

        return run

    race(
        [step(seed) for seed in sets_of_inputs(case.bytes_moved(dtype))],
        group=f"slot_attention_module, {case.name}, B{case.B} N{case.N} K{case.K} D{case.D} x{case.Dx} T{case.T}"
        f"{suffix(dtype)}, {'forward+backward' if backward else 'forward'}",
        name=contender,
        floor=floor(case, machine, dtype, backward),
    )
