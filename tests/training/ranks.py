"""One step of each phase on as many processes as torchrun starts: torchrun ... ranks.py MARGIN OUT.pt

OUT.pt: each phase's values and gradients as process number 0 has them, beside the errors of all processes' shares.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import train


def one_step_each(margin: float) -> dict[str, dict[str, torch.Tensor]]:
    config = train.resolve(
        train.Config(preset="smoke", device="cpu", precision="fp32", fine_tune="iio", optimizer="adam", margin=margin)
    )
    train.meet_other_ranks(config)
    source = train.open_scenes(config)
    results = {}
    for phase in ("pre-training", "fine-tuning"):
        model = train.build_model(config, source.size)
        parallel = DistributedDataParallel(model) if train.num_ranks() > 1 else model
        step = train.Step(parallel, train.build_optimizer(model, config), phase, config)
        pixels, _ = source.batch(train.Order(config)(0))
        noise = train.share(train.draw_noise(config, config.batch_size, model.noise_shape, 0))
        step(train.Batch(pixels, noise, None), 0.0)
        own = step.values.get("mse")
        results[phase] = {name: train.mean_over_ranks(value) for name, value in step.values.items()}
        results[phase] |= {name: p.grad for name, p in model.named_parameters()}
        errors = [torch.empty(()) for _ in range(train.num_ranks())]
        if train.num_ranks() > 1:
            dist.all_gather(errors, own)
            results[phase]["errors of shares"] = torch.stack(errors)
    return results


if __name__ == "__main__":
    found = one_step_each(float(sys.argv[1]))
    if train.rank() == 0:
        torch.save(found, sys.argv[2])
    dist.destroy_process_group()
