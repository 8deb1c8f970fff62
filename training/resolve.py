"""From the options given to all that a run needs: the preset fills in, and what cannot run is refused."""

from __future__ import annotations

import dataclasses
import math

from data import DATASETS
from training.config import Config, UsageError, changed_fields, option
from training.console import say
from training.devices import device_of, multiplies_bfloat16
from training.presets import ADJUSTED, PRESETS, recipe_of
from training.schedule import learning_rate, phase_steps, warm_up
from training.tables import NAMES
from training.weights import ARCHITECTURE, CHOICES, SCORING, SIZES, load_weights, pretrained


def resolve(config: Config) -> Config:
    """Fill in what the preset decides, and refuse what cannot run before any work starts."""
    device = device_of(config)
    preset = config.preset if config.preset != "auto" else ("paper" if device.type == "cuda" else "quick")
    if config.from_pretrained:
        if config.from_ is not None:
            raise UsageError("--from-pretrained and --from exclude each other")
        config = dataclasses.replace(config, from_=pretrained(config)[0])
    if config.table1 and (config.fine_tune != "iio" or config.from_ is not None or config.score_steps):
        raise UsageError("--table1 takes --fine-tune iio, pre-trains from scratch and chooses its own --score-steps")
    if not (config.table1 or config.long_row):
        raise UsageError("--no-long-row is for --table1")
    changed = changed_fields(config)
    if config.eval_only is not None and (trains := [n for n in changed if n not in (*SCORING, *ARCHITECTURE)]):
        raise UsageError(f"--eval-only trains nothing: leave out {option(trains[0])}")
    weights = config.from_ or config.eval_only
    asked = [n for n in ARCHITECTURE if n in changed]
    if weights is not None:
        free = ("num_slots", "iterations") if config.eval_only else ()
        if fixed := [n for n in asked if n not in free]:
            raise UsageError(f"{option(fixed[0])}: weights bring their own architecture; leave it out")
        if "initial_weights" in changed:
            raise UsageError("--initial-weights: these weights are the initial ones; leave it out")
        if str(config.eval_only) == "pretrained":
            weights = pretrained(config)[0]
        config, _ = load_weights(weights, config)
        if config.model in ("slot-mlp", "dspn") and "num_slots" in asked:
            raise UsageError(f"--num-slots: {config.model} has as many slots as it was trained with; leave it out")
    refuse_impossible(config)
    dataset, recipe = DATASETS[config.dataset], recipe_of(config)
    defaults = PRESETS[recipe][preset] | ADJUSTED.get((recipe, preset, dataset.size[0]), {})
    defaults["num_slots"] = dataset.num_entities - (config.task == "set-prediction")
    if config.ablation == "soft-k-means":  # slots are means of inputs
        defaults["input_size"] = config.slot_size or defaults["slot_size"]
        if config.input_size not in (None, defaults["input_size"]):
            raise UsageError(f"--input-size {config.input_size}: --ablation soft-k-means takes inputs as wide as "
                             f"slots, {defaults['input_size']}")  # fmt: skip
    if unused := [n for n in asked if n not in CHOICES and n not in defaults]:
        raise UsageError(f"{option(unused[0])}: {recipe} has no such size")
    for epochs, steps in (("epochs", "steps"), ("fine_tune_epochs", "fine_tune_steps")):
        given = [name for name in (epochs, steps) if getattr(config, name) is not None]
        if len(given) == 2:
            raise UsageError(f"{option(steps)} and {option(epochs)} exclude each other")
        if given:
            defaults.pop(epochs, None), defaults.pop(steps, None)
    tuning = ("fine_tune_epochs", "fine_tune_steps", "fine_tune_lr", "fine_tune_warmup_steps")
    given = [name for name in tuning if getattr(config, name) is not None]
    if given and config.fine_tune == "none":
        raise UsageError(f"{option(given[0])}: there is no fine-tuning without --fine-tune")
    if config.from_pretrained and config.steps is None and config.epochs is None:
        if config.fine_tune == "none":
            raise UsageError("--from-pretrained: nothing to train without --fine-tune or --steps")
        defaults.pop("epochs", None), defaults.update(steps=0)
    defaults = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if preset != "paper" and multiplies_bfloat16(device) else "fp32"
    config = dataclasses.replace(config, **defaults, preset=preset, device=str(device), precision=precision)

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
    for name in ("kernel_size", "taps"):
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
    if config.model in ("iodine", "monet") and config.num_slots < 2:
        raise UsageError(f"--num-slots: {NAMES[config.model]} takes at least 2, got 1")
    if not 0 <= config.seed <= 2**31 - config.seeds:
        raise UsageError(f"--seed: expected a number in [0, 2**31 - {config.seeds}], got {config.seed}")
    last = phase_steps(config)["pre-training"]
    if any(not 0 < step <= last for step in config.score_steps):
        raise UsageError(f"--score-steps: expected steps in 1..{last}, got {' '.join(map(str, config.score_steps))}")
    if config.table1 and not last:
        raise UsageError("--table1 pre-trains from scratch: --steps and --epochs must be more than 0")
    for phase, steps in phase_steps(config).items():
        peak, warming = warm_up(phase, config)
        if 0 < steps < warming:
            say(f"The learning rate of {phase} climbs to {learning_rate(steps - 1, phase, config):.2g}, not to the "
                f"{peak:.2g} asked for: its warm-up of {warming:,} steps outlasts its {steps:,}")  # fmt: skip
    if config.task == "set-prediction" and config.num_slots < (most := dataset.num_entities - 1):
        say(f"K {config.num_slots} is fewer than the {most} objects that a scene can have: those left over cost "
            f"nothing, so losses compare at equal K alone")  # fmt: skip
    return config


def refuse_impossible(config: Config) -> None:
    """Refuse tasks, models and data sets that do not go together, with those that do."""
    dataset = DATASETS[config.dataset]
    if config.task == "set-prediction":
        if config.model not in (possible := ("slot-attention", "slot-mlp", "dspn")):
            raise UsageError(f"--model {config.model} is for discovery; set prediction takes {', '.join(possible)}")
        if not dataset.properties:
            names = [name for name, each in DATASETS.items() if each.properties]
            raise UsageError(f"--dataset {config.dataset} does not tell its objects' properties; set prediction takes "
                             f"{', '.join(names)}")  # fmt: skip
        if config.fine_tune != "none":
            raise UsageError(f"--fine-tune {config.fine_tune} fine-tunes masks; set prediction has none")
        if config.stepwise_loss and config.model == "slot-mlp":
            raise UsageError("--stepwise-loss: slot-mlp predicts once; leave it out")
        if config.downsample not in (None, 1, 2, 4, 8):
            raise UsageError(f"--downsample: expected 1, 2, 4 or 8, got {config.downsample}")
    elif config.model == "dspn":
        raise UsageError("--model dspn predicts sets: add --task set-prediction")
    elif config.stepwise_loss or config.coordinate_scale != 1:
        raise UsageError("--stepwise-loss and --coordinate-scale are for --task set-prediction")
    if config.ablation != "none" and (config.task, config.model) != ("discovery", "slot-attention"):
        raise UsageError("--ablation is for --task discovery --model slot-attention")
    if (config.gradient, config.neumann_terms) != ("unrolled", 0) and config.model != "slot-attention":
        raise UsageError("--gradient and --neumann-terms are for --model slot-attention")
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
