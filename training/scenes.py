"""The scenes of a run, and in which order it sees them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data import DATASETS, ResidentScenes, Scenes, load
from training.config import Config, UsageError
from training.processes import rank, share
from training.random_numbers import hash_seed


def open_scenes(config: Config) -> Scenes:
    """The data set: training scenes first, scoring scenes behind them; on the device where they are not too many."""
    needed = config.num_scenes + config.eval_scenes
    if config.data is None:
        source = DATASETS[config.dataset].generator(needed)
    else:
        try:
            source = load(config.data, dataset=config.dataset)
        except OSError as error:
            raise UsageError(f"--data: {error}") from None
    if config.eval_only is not None:
        return source
    if len(source) < needed:
        raise UsageError(
            f"--data: {config.data} holds {len(source):,} scenes, and --num-scenes {config.num_scenes} with "
            f"--eval-scenes {config.eval_scenes} take {needed:,}: lower them"
        )
    if needed * 4 * math.prod(source.size) > room_for_scenes(config.device):
        return source
    properties = config.task == "set-prediction"
    return ResidentScenes(source, config.device, needed, properties=properties, progress=rank() == 0)


def room_for_scenes(device: str) -> int:
    """Bytes of scenes that may lie in the device's memory: a quarter of a GPU's, or 4 GiB."""
    return torch.cuda.get_device_properties(device).total_memory // 4 if device.startswith("cuda") else 4 << 30


class Order:
    """Which scenes each step sees: a fresh permutation every epoch, by seed and step alone. They lie on the device."""

    def __init__(self, config: Config) -> None:
        self.seed, self.length, self.batch_size = config.seed, config.num_scenes, config.batch_size
        self.device = config.device
        self.epoch, self.permutation = -1, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """All of the step's scenes, or of several processes this one's share."""
        position, end = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        while position < end:
            epoch, place = divmod(position, self.length)
            if epoch != self.epoch:
                generator = torch.Generator().manual_seed(hash_seed(self.seed, epoch))
                permutation = torch.randperm(self.length, generator=generator)
                self.epoch, self.permutation = epoch, permutation.to(self.device)
            parts.append(self.permutation[place : place + end - position])
            position += len(parts[-1])
        return share(torch.cat(parts))


def objects_of(config: Config, source: Scenes, indices: Tensor) -> Tensor | None:
    return source.properties(indices, device=config.device) if config.task == "set-prediction" else None
