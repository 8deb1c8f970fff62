"""What cannot run, and why: each refusal names the option to change."""

from __future__ import annotations

import math

import torch

from data import DATASETS
from models import MODELS
from training.building import make_module, recipe_of
from training.config import Config, UsageError, option
from training.schedule import phase_steps
from training.weights import ARCHITECTURE, SIZES


def refuse_impossible(config: Config) -> None:
    """Refuse tasks, models and data sets that do not go together, with those that do."""
    dataset, recipe = DATASETS[config.dataset], MODELS[config.model].get(config.task)
    if recipe is None:
        (other,) = MODELS[config.model]
        if other == "set-prediction":
            raise UsageError(f"--model {config.model} predicts sets: add --task set-prediction")
        possible = [name for name, recipes in MODELS.items() if config.task in recipes]
        raise UsageError(f"--model {config.model} is for discovery; set prediction takes {', '.join(possible)}")
    refuse_options_of_others(config)
    if config.task == "set-prediction":
        if not dataset.properties:
            names = [name for name, each in DATASETS.items() if each.properties]
            raise UsageError(f"--dataset {config.dataset} does not tell its objects' properties; set prediction takes "
                             f"{', '.join(names)}")  # fmt: skip
        if config.fine_tune != "none":
            raise UsageError(f"--fine-tune {config.fine_tune} fine-tunes masks; set prediction has none")
        if config.stepwise_loss and "iterations" not in recipe.options:
            raise UsageError(f"--stepwise-loss: {config.model} predicts once; leave it out")
        if config.downsample not in (None, 1, 2, 4, 8):
            raise UsageError(f"--downsample: expected 1, 2, 4 or 8, got {config.downsample}")
    elif config.stepwise_loss or config.coordinate_scale != 1:
        raise UsageError("--stepwise-loss and --coordinate-scale are for --task set-prediction")
    if config.neumann_terms < 0:
        raise UsageError(f"--neumann-terms: expected a number >= 0, got {config.neumann_terms}")
    if config.neumann_terms and (config.gradient != "implicit" or config.stepwise_loss):
        raise UsageError("--neumann-terms is for --gradient implicit, without --stepwise-loss")
    if config.task == "discovery" and not dataset.masks:
        raise UsageError(f"--dataset {config.dataset} does not tell which pixels are whose, by which discovery is "
                         "scored: add --task set-prediction")  # fmt: skip
    if config.data is None and dataset.generator is None:
        names = [name for name, each in DATASETS.items() if each.generator is not None]
        what = "file" if dataset.file.masks else "folder"
        raise UsageError(f"--dataset {config.dataset} cannot be generated: give its {what} as --data, or choose one of "
                         f"{', '.join(names)}")  # fmt: skip
    if config.data is not None and dataset.file is None:
        names = [name for name, each in DATASETS.items() if each.file is not None]
        raise UsageError(f"--data: {config.dataset} has no file; there are files of {', '.join(names)}")
    if config.table1 and config.task == "set-prediction":
        raise UsageError("--table1 compares segmentations: leave out --task set-prediction")


def refuse_options_of_others(config: Config) -> None:
    """Refuse what is asked of the network and the model has not: its recipe names what it has."""
    recipe = recipe_of(config)
    brought = () if config.from_ is None and config.eval_only is None else set(ARCHITECTURE) - {"iterations"}
    for name in (*ARCHITECTURE, "gradient", "neumann_terms"):
        default = getattr(Config, name)
        if name in ("task", "model", *brought, *recipe.options) or getattr(config, name) == default:
            continue
        if default is None:
            what = "" if config.task == "discovery" else " for set prediction"
            raise UsageError(f"{option(name)}: {config.model} has no such size{what}")
        takes = [each for recipes in MODELS.values() for each in recipes.values() if name in each.options]
        tasks, models = {each.task for each in takes}, dict.fromkeys(each.model for each in takes)
        task = f"--task {min(tasks)} " if len(tasks) == 1 else ""
        raise UsageError(f"{option(name)} is for {task}--model {' or '.join(models)}")


def refuse_values(config: Config) -> None:
    """Refuse numbers out of their ranges; all options have values."""
    for name in ("num_scenes", "eval_scenes", "eval_draws", *SIZES, "batch_size", "half_life", "seeds", "repeats",
                 "log_every", "eval_every"):  # fmt: skip
        value = getattr(config, name)
        if value is not None and not value >= 1:
            raise UsageError(f"{option(name)}: expected at least 1, got {value}")
    for name in ("epochs", "fine_tune_epochs", "steps", "fine_tune_steps", "lr", "fine_tune_lr", "warmup_steps",
                 "fine_tune_warmup_steps", "clip", "margin", "hinge_scale", "checkpoint_every"):  # fmt: skip
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{option(name)}: expected a number >= 0, got {value}")
    for name in ("kernel_size", "iio_kernel_size"):
        value = getattr(config, name)
        if value is not None and (value % 2 == 0 or value < 1):
            raise UsageError(f"{option(name)}: expected an odd number, got {value}")
    if not (math.isfinite(config.sigma) and config.sigma > 0):
        raise UsageError(f"--sigma: expected a number > 0, got {config.sigma}")
    for name in ("coordinate_scale", "pixel_sigma", "background_sigma"):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{option(name)}: expected a number > 0, got {value}")
    if config.neumann_terms and config.iterations < 2:
        raise UsageError("--neumann-terms: the gradient of a fixed point takes at least 2 --iterations, got 1")
    if config.fine_tune == "iio" and not 2 <= config.num_slots <= 16:
        raise UsageError(f"--num-slots: the IIO loss takes 2 to 16 masks, got {config.num_slots}")
    if config.num_slots < (least := recipe_of(config).least_slots):
        raise UsageError(f"--num-slots: {recipe_of(config).title} takes at least {least}, got {config.num_slots}")
    if not 0 <= config.seed <= 2**31 - config.seeds:
        raise UsageError(f"--seed: expected a number in [0, 2**31 - {config.seeds}], got {config.seed}")
    last = phase_steps(config)["pre-training"]
    if any(not 0 < step <= last for step in config.score_steps):
        raise UsageError(f"--score-steps: expected steps in 1..{last}, got {' '.join(map(str, config.score_steps))}")
    if config.table1 and not last:
        raise UsageError("--table1 pre-trains from scratch: --steps and --epochs must be more than 0")


def refuse_sizes(config: Config) -> None:
    """Refuse sizes of which no network can be built for the images of the data set."""
    try:
        with torch.device("meta"):  # it takes no memory
            make_module(config, DATASETS[config.dataset].size)
    except ValueError as error:
        raise UsageError(f"--model {config.model}: {error}") from None
