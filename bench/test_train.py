"""Whole training steps of the published model on Tetrominoes: forward, backward, Adam, batches of 64.

Eager and torch.compile are the plain model (tests/plain.py) in float32, ours is train.py's step, in float32 and in the
precision in which a CPU or a GPU trains best.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests import plain

pytest.importorskip("training.run", reason="train.py needs what the extra 'train' installs")
from training.building import build_model, build_optimizer
from training.config import Config
from training.devices import multiplies_bfloat16
from training.random_numbers import draw_noise
from training.resolve import resolve
from training.scenes import Order, open_scenes
from training.step import Batch, Step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOY = os.environ.get("IIO_KERNELS_BENCH_SIZES") == "toy"
PHASES = ("pre-training", "fine-tuning")


@pytest.mark.parametrize("contender", ["eager", "torch.compile", "ours", "ours, bf16"])
@pytest.mark.parametrize("phase", PHASES)
def test_train(race, machine, device, phase, contender):
    options = {"batch_size": 4, "channels": 8, "kernel_size": 3} if TOY else {}
    precision = "bf16" if contender.endswith("bf16") else "fp32"
    if precision == "bf16" and not multiplies_bfloat16(torch.device(device)):
        pytest.skip("this machine has no bfloat16 arithmetic")
    # The race captures all contenders alike.
    config = resolve(
        Config(
            preset="paper", device=device, precision=precision, fine_tune="iio", num_scenes=1000, cuda_graph=False,
            **options,
        )
    )  # fmt: skip
    source = open_scenes(config)
    model = build_model(config, source.size)
    pixels = source.images(Order(config)(0))
    noise = draw_noise(config, config.batch_size, model.noise_shape, 0)
    if contender.startswith("ours"):
        step = Step(model, build_optimizer(model, config), phase, config)
        race(
            [lambda: step(Batch(pixels, noise, None), 1e-4)],
            group=group(config, phase),
            name=contender,
            floor=floor(config, machine),
        )
        return

    loss = plain.loss
    if contender == "torch.compile":
        torch.compiler.reset()
        loss = torch.compile(plain.loss)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True, capturable=device == "cuda")

    def run():
        optimizer.zero_grad()
        loss(model, pixels / 255, noise, phase).backward()
        optimizer.step()

    race([run], group=group(config, phase), name=contender, floor=floor(config, machine))


def group(config: Config, phase: str) -> str:
    return f"train, {phase}, B{config.batch_size} {config.channels} channels {config.kernel_size}x{config.kernel_size}"


def floor(config: Config, machine: dict[str, float]) -> float:
    """Seconds for the products of the convolutions that are left, three times each, at a matrix product's rate."""
    images, slots, k2 = config.batch_size, config.batch_size * config.num_slots, config.kernel_size**2
    c = config.channels
    encoder = images * (3 * c + 3 * c * c) * k2
    decoder = slots * (2 * c * c * k2 + 4 * c * 9)
    return 3 * 2 * 35 * 35 * (encoder + decoder) / machine["operations_per_second"]
