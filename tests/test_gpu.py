"""What only a GPU can show: graphs, streams, several devices, calls that do not wait, sizes beyond 2^31."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from iio_kernels import (
    SlotAttentionWeights,
    broadcast_conv2d,
    composition_error,
    conditional_entropies,
    iio_loss,
    inpaint,
    mixture_log_likelihood,
    slot_attention,
    slot_attention_module,
    spatial_mixture,
)
from iio_kernels.runtime import build
from iio_kernels.runtime.backends import BACKENDS
from iio_kernels.testing import slot_attention_module as iterations_spec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

Tensors = tuple[Tensor, ...]


def attention_inputs(random: torch.Generator) -> Tensors:
    return tuple(torch.randn(4, n, 32, generator=random, device=random.device) for n in (5, 300, 300))


def inpainting_inputs(random: torch.Generator) -> Tensors:
    image = torch.rand(3, 3, 21, 19, generator=random, device=random.device)
    return image, torch.randn(3, 4, 21, 19, generator=random, device=random.device).softmax(1)


def composition_inputs(random: torch.Generator) -> Tensors:
    image = torch.rand(3, 3, 21, 19, generator=random, device=random.device)
    return image, torch.randn(3, 4, 4, 21, 19, generator=random, device=random.device)


def mixture(image: Tensor, decoded: Tensor, *, backend: str) -> Tensor:
    """All of its results in one tensor, the differentiable and the others."""
    x = spatial_mixture(image, decoded, backend=backend)
    log_likelihoods = x.log_likelihood + mixture_log_likelihood(image, decoded, backend=backend)
    planes = log_likelihoods.unsqueeze(1), x.masks, x.posterior, x.leave_one_out, x.d_decoded.flatten(1, 2)
    return torch.cat(planes, 1)


def broadcast_inputs(random: torch.Generator) -> Tensors:
    return tuple(
        torch.randn(shape, generator=random, device=random.device) for shape in ((19, 5), (7, 5, 5, 5), (7, 9, 8))
    )


def broadcast(z: Tensor, weight: Tensor, position_map: Tensor, *, backend: str) -> Tensor:
    return broadcast_conv2d(z, weight, position_map, (9, 8), padding=2, relu=True, backend=backend)


def module_inputs(random: torch.Generator) -> Tensors:
    (x, slots, weights, _), _ = iterations_spec.Case("gpu", N=300).make(torch.float32)
    return tuple(
        (y + 0.1 * torch.randn(y.shape, generator=random, device=random.device).cpu()).to(random.device)
        for y in (x, slots, *weights)
    )


def module(x: Tensor, slots: Tensor, *weights: Tensor, backend: str) -> Tensor:
    return slot_attention_module(x, slots, SlotAttentionWeights(*weights), 3, backend=backend)


FUNCTIONS = {
    slot_attention: ("slot_attention", attention_inputs),
    iio_loss: ("iio_loss", inpainting_inputs),
    conditional_entropies: ("iio_loss", inpainting_inputs),
    inpaint: ("iio_loss", inpainting_inputs),
    composition_error: ("compose", composition_inputs),
    mixture: ("spatial_mixture", composition_inputs),
    broadcast: ("broadcast_conv2d", broadcast_inputs),
    module: ("slot_attention_module", module_inputs),
}
CALLS = [
    pytest.param(function, backend, new, id=f"{function.__name__}-{backend}")
    for function, (operation, new) in FUNCTIONS.items()
    for backend in ("triton", "cuda")
    if operation in BACKENDS[backend].operations
    and torch.cuda.is_available()
    and BACKENDS[backend].refuses(torch.device("cuda")) is None
]
each_call = pytest.mark.parametrize(("function", "backend", "new"), CALLS)


def inputs(new: Callable[[torch.Generator], Tensors], seed: int, device: str = "cuda") -> Tensors:
    return tuple(x.requires_grad_() for x in new(torch.Generator(device).manual_seed(seed)))


def run(function: Callable[..., Tensor], backend: str, leaves: Tensors) -> Tensors:
    """The result, and the gradients of its sum of squares."""
    y = function(*leaves, backend=backend)
    return y.detach(), *torch.autograd.grad(y, leaves, 2 * y.detach())


@each_call
def test_a_graph_replays_on_new_inputs(function, backend, new):
    leaves, others = inputs(new, 0), inputs(new, 1)
    expected = run(function, backend, others)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(function, backend, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(function, backend, leaves)
    with torch.no_grad():
        for x, y in zip(leaves, others, strict=True):
            x.copy_(y)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_graph_of_kernels_that_take_much_shared_memory(backend):
    """Which has to be asked for, at each launch."""
    if BACKENDS[backend].refuses(torch.device("cuda")) is not None:
        pytest.skip(f"no {backend}")
    image = torch.rand(2, 3, 128, 128, device="cuda")
    masks = torch.rand(2, 3, 128, 128, device="cuda").requires_grad_()
    expected = run(iio_loss, backend, (image.requires_grad_(), masks))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(iio_loss, backend, (image, masks))
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, results, expected))


@each_call
def test_kernels_queue_on_the_current_stream(function, backend, new):
    leaves, others = inputs(new, 0), inputs(new, 1)
    expected = run(function, backend, others)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second, in which other streams would overtake
        with torch.no_grad():
            for x, y in zip(leaves, others, strict=True):
                x.copy_(y)
        results = run(function, backend, leaves)
    stream.synchronize()
    assert all(map(torch.equal, results, expected))


@each_call
def test_no_call_waits_for_the_device(function, backend, new):
    leaves = inputs(new, 0)
    run(function, backend, leaves)
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        run(function, backend, leaves)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
@each_call
def test_on_another_device_than_the_current_one(function, backend, new):
    expected = run(function, backend, inputs(new, 0))
    got = run(function, backend, tuple(x.detach().to("cuda:1").requires_grad_() for x in inputs(new, 0)))
    assert all(x.device.index == 1 for x in got)
    assert all(torch.equal(x, y.to("cuda:1")) for x, y in zip(got, expected, strict=True))


@each_call
def test_repeats_are_bitwise_equal(function, backend, new):
    leaves = inputs(new, 0)
    first = run(function, backend, leaves)
    for _ in range(100):
        assert all(map(torch.equal, run(function, backend, leaves), first))


def test_cuda_is_built_where_there_is_a_compiler():
    try:
        build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    assert build.cuda_missing() is None


def test_auto_takes_kernels():
    for function, (_, new) in FUNCTIONS.items():
        leaves = inputs(new, 0)
        assert all(map(torch.equal, run(function, "auto", leaves), run(function, "triton", leaves)))


def test_more_than_two_to_the_31_elements():
    """All but the first and last inputs masked: as if there were no others."""
    N, D, ends = 2**25 + 5, 64, 100
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("24 GiB of memory are not free")
    random = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(1, 4, D, generator=random, device="cuda").bfloat16().requires_grad_()
    k = torch.zeros(1, N, D, device="cuda", dtype=torch.bfloat16)
    taken = torch.zeros(1, N, device="cuda", dtype=torch.bool)
    for rows in (slice(0, ends), slice(N - ends, N)):
        k[:, rows] = torch.randn(1, ends, D, generator=random, device="cuda").bfloat16()
        taken[:, rows] = True
    few = k[taken].unsqueeze(0)
    for x in (k, few):
        x.requires_grad_()
    U = slot_attention(q, k, k, input_mask=taken, backend="triton")
    expected = slot_attention(q, few, few, backend="triton")
    torch.testing.assert_close(U, expected)
    got, wanted = (torch.autograd.grad(y, (q, x), torch.ones_like(y)) for y, x in ((U, k), (expected, few)))
    torch.testing.assert_close(got[0], wanted[0])
    torch.testing.assert_close(got[1][taken].unsqueeze(0), wanted[1])
    assert not got[1][~taken].any()


def test_memory_of_the_loss_is_that_of_a_few_inputs():
    """Seven masks of 128 x 128: loss and gradient take less than three times image and masks."""
    B, K, C, H, W = 64, 7, 3, 128, 128
    image = torch.rand(B, C, H, W, device="cuda")
    masks = torch.rand(B, K, H, W, device="cuda").softmax(1).requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = iio_loss(image, masks)
    (gradient,) = torch.autograd.grad(loss, masks)
    taken = torch.cuda.max_memory_allocated() - before - gradient.nbytes
    assert taken < 3 * (image.nbytes + masks.nbytes)


@pytest.mark.parametrize("phase", ["pre-training", "fine-tuning"])
@pytest.mark.parametrize(
    ("precision", "optimizer"), [("fp32", "adam"), ("bf16", "adam"), ("fp32", "muon"), ("fp32", "rmsprop")]
)
def test_a_captured_training_step_is_the_step_itself(phase, precision, optimizer):
    """From the first step on and from a resumed optimizer, without waiting for the device."""
    pytest.importorskip("training.run", reason="train.py needs what the extra 'train' installs")
    from training.building import build_model, build_optimizer
    from training.config import Config
    from training.random_numbers import draw_noise
    from training.resolve import resolve
    from training.scenes import Order, open_scenes
    from training.step import Batch, Step

    options = dict(preset="smoke", device="cuda", precision=precision, optimizer=optimizer, fine_tune="iio")
    config = resolve(Config(**options))
    source = open_scenes(config)
    order = Order(config)
    ends, states = [], []
    for captured in (False, True):
        own = dataclasses.replace(config, cuda_graph=captured)
        model = build_model(own, source.size)
        optimizer = build_optimizer(model, own)
        for resumed in (False, True):
            if resumed:
                state = optimizer.state_dict()
                optimizer = build_optimizer(model, own)
                optimizer.load_state_dict(copy.deepcopy(state))
            step = Step(model, optimizer, phase, own)
            for i in range(4):
                pixels = source.images(order(i), "cuda")
                noise = draw_noise(own, own.batch_size, model.noise_shape, i)
                mode = torch.cuda.get_sync_debug_mode()
                torch.cuda.set_sync_debug_mode("error" if i > 0 else mode)  # compiling and capturing may wait
                try:
                    step(Batch(pixels, noise, None), 1e-3 / (i + 1))
                finally:
                    torch.cuda.set_sync_debug_mode(mode)
            assert (step.graph is not None) == captured
            assert int(step.bad) == -1
            assert int(step.number) == 4
        ends.append([p.detach().clone() for p in model.parameters()])
        states.append({name: value.item() for name, value in step.values.items()})
    assert states[1] == pytest.approx(states[0], rel=1e-3)
    for plain, graphed in zip(*ends, strict=True):
        torch.testing.assert_close(graphed, plain, rtol=1e-3, atol=1e-4)


def test_a_captured_step_notices_what_is_no_number():
    pytest.importorskip("training.run", reason="train.py needs what the extra 'train' installs")
    from training.building import build_model, build_optimizer
    from training.config import Config
    from training.random_numbers import draw_noise
    from training.resolve import resolve
    from training.scenes import Order, open_scenes
    from training.step import Batch, Step

    config = resolve(Config(preset="smoke", device="cuda", optimizer="adam", clip=0.0))
    source = open_scenes(config)
    model = build_model(config, source.size)
    step = Step(model, build_optimizer(model, config), "pre-training", config, 10)
    pixels = source.images(Order(config)(0), "cuda")
    noise = draw_noise(config, config.batch_size, model.noise_shape, 0)
    for i in range(4):
        step(Batch(pixels, noise, None), 1e-3)
        if i == 1:
            noise = noise * float("nan")
    assert int(step.bad) == 12
