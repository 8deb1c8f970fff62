"""Several processes that train together, as torchrun starts them. Without it a process is alone."""

from __future__ import annotations

import gc
import os
import traceback
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.config import Config, UsageError
from training.devices import device_of, multiplies_bfloat16


def num_ranks() -> int:
    """How many processes train together, as torchrun started them; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def rank() -> int:
    """Which of them this is. Number 0 alone writes and prints."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def meet_other_ranks(config: Config) -> None:
    """Meet the other processes, if this machine and their number suit the run, be it new or resumed.

    Of several, each takes the GPU of its number on its machine, and calls it "cuda".
    """
    device = device_of(config)
    if config.precision == "bf16" and not multiplies_bfloat16(device):
        raise UsageError(f"--precision bf16: {device.type} has no bfloat16 arithmetic here; use fp32")
    if config.batch_size % num_ranks():
        raise UsageError(f"--batch-size {config.batch_size}: expected a multiple of the {num_ranks()} processes")
    if device.type == "cuda":
        if num_ranks() > 1 and device.index is not None:
            raise UsageError(f"--device {device}: with several processes each takes a GPU of its own; use cuda")
        if num_ranks() > 1 and int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise UsageError(f"--nproc-per-node: this machine has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) if num_ranks() > 1 else device.index or 0)
    if num_ranks() > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes, without gradient."""
    if num_ranks() > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
        x /= num_ranks()
    return x


def any_rank(number: int) -> int:
    """The largest of all processes' numbers."""
    if num_ranks() > 1:
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        number = int(largest)
    return number


def same_on_all_ranks(x: Any) -> Any:
    """What process number 0 has."""
    if num_ranks() > 1:
        box = [x]
        dist.broadcast_object_list(box)
        (x,) = box
    return x


def share(batch: Tensor) -> Tensor:
    """This process's rows of a tensor for all."""
    return batch.chunk(num_ranks())[rank()]


def part_from_other_ranks(error: BaseException | None = None) -> None:
    """End the group of processes, if there is one, after all that uses it: `error` is why, None where all is done.

    A `DistributedDataParallel` that outlives the group can abort the process at its end. An error's traceback holds the
    variables of the functions that it ended, and the model in them.
    """
    if not dist.is_initialized():
        return
    if error is not None:
        traceback.clear_frames(error.__traceback__)
    gc.collect()
    dist.destroy_process_group()
