"""What a run will do, and how long it should take."""

from __future__ import annotations

import copy
import time

import torch
from torch import nn

from data import Scenes
from training.building import build_optimizer
from training.config import Config
from training.processes import num_ranks, share
from training.random_numbers import draw_noise
from training.scenes import objects_of
from training.step import Batch, Step


def greeting(config: Config, phases: dict[str, int], done: int, model: nn.Module, source: Scenes) -> str:
    """What will run, and how long it should take: from three steps timed on a copy of the model."""
    trial, times = copy.deepcopy(model), {}
    optimizer = build_optimizer(trial, config)
    indices = share(torch.arange(config.batch_size) % config.num_scenes)
    pixels = source.images(indices, device=config.device)
    noise = share(draw_noise(config, config.batch_size, model.noise_shape, 0))
    batch = Batch(pixels, noise, objects_of(config, source, indices))
    for phase in phases:
        step = Step(trial, optimizer, phase, config)
        for _ in range(3):
            begun = time.monotonic()
            step(batch, 0.0)
            step.bad.item()
            times[phase] = time.monotonic() - begun
    total = sum(phases.values())
    minutes = sum(times[phase] * steps for phase, steps in phases.items()) * (1 - done / max(1, total)) / 60
    length = "a minute" if minutes < 1.5 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    plan = ", then ".join(f"{steps:,} steps of {phase}" for phase, steps in phases.items())
    where = f"from step {done:,} " if done else ""
    device = config.device if num_ranks() == 1 else f"{num_ranks()} x {torch.device(config.device).type}"
    return f"Preset {config.preset} on {device}, {config.precision}: {plan}; {where}about {length}."
