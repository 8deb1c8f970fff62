"""One step of each phase on as many processes as torchrun starts: torchrun ... ranks.py MARGIN OUT.pt

OUT.pt: each phase's values and gradients as process number 0 has them, beside the errors of all processes' shares.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from training.building import build_model, build_optimizer
from training.config import Config
from training.processes import mean_over_ranks, meet_other_ranks, num_ranks, part_from_other_ranks, rank, share
from training.random_numbers import draw_noise
from training.resolve import resolve
from training.scenes import Order, open_scenes
from training.step import Batch, Step


def one_step_each(margin: float) -> dict[str, dict[str, torch.Tensor]]:
    config = resolve(
        Config(preset="smoke", device="cpu", precision="fp32", fine_tune="iio", optimizer="adam", margin=margin)
    )
    meet_other_ranks(config)
    source = open_scenes(config)
    results = {}
    for phase in ("pre-training", "fine-tuning"):
        model = build_model(config, source.size)
        parallel = DistributedDataParallel(model) if num_ranks() > 1 else model
        step = Step(parallel, build_optimizer(model, config), phase, config)
        pixels = source.images(Order(config)(0))
        noise = share(draw_noise(config, config.batch_size, model.noise_shape, 0))
        step(Batch(pixels, noise, None), 0.0)
        own = step.values.get("mse")
        results[phase] = {name: mean_over_ranks(value) for name, value in step.values.items()}
        results[phase] |= {name: p.grad for name, p in model.named_parameters()}
        errors = [torch.empty(()) for _ in range(num_ranks())]
        if num_ranks() > 1:
            dist.all_gather(errors, own)
            results[phase]["errors of shares"] = torch.stack(errors)
    return results


if __name__ == "__main__":
    try:
        found = one_step_each(float(sys.argv[1]))
        if rank() == 0:
            torch.save(found, sys.argv[2])
    finally:
        part_from_other_ranks(sys.exc_info()[1])
