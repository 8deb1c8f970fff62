"""From the options given to all that a run needs: the preset fills in, and what cannot run is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

from data import DATASETS
from models import MODELS
from training.building import recipe_of
from training.config import Config, UsageError, changed_fields, option
from training.console import say
from training.devices import device_of, multiplies_bfloat16
from training.networks import NETWORK_OF, NETWORKS
from training.refusals import refuse_impossible, refuse_sizes, refuse_values
from training.schedule import learning_rate, phase_steps, warm_up
from training.weights import ARCHITECTURE, SCORING, load_weights, pretrained


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
    asked = [n for n in ARCHITECTURE if n in changed]
    if config.from_ is not None or config.eval_only is not None:
        config = with_weights(config, asked)
    elif config.model is None:
        config = dataclasses.replace(config, model=next(iter(MODELS)))
    refuse_impossible(config)
    defaults = preset_of(config, preset)
    if config.ablation == "soft-k-means":  # slots are means of inputs
        defaults["input_size"] = config.slot_size or defaults["slot_size"]
        if config.input_size not in (None, defaults["input_size"]):
            raise UsageError(f"--input-size {config.input_size}: --ablation soft-k-means takes inputs as wide as "
                             f"slots, {defaults['input_size']}")  # fmt: skip
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
    refuse_values(config)
    refuse_sizes(config)
    tell_surprises(config)
    return config


def with_weights(config: Config, asked: list[str]) -> Config:
    """The configuration with the architecture of the weights that it starts from or scores.

    Of the options that are `asked` for, those may differ without which the weights fit.
    """
    path = config.from_ or (pretrained(config)[0] if str(config.eval_only) == "pretrained" else config.eval_only)
    free = ("num_slots", "iterations") if config.eval_only else ()
    if fixed := [n for n in asked if n not in (*free, "model")]:
        raise UsageError(f"{option(fixed[0])}: weights bring their own architecture; leave it out")
    if config.initial_weights is not None:
        raise UsageError("--initial-weights: these weights are the initial ones; leave it out")
    model = config.model
    config, _ = load_weights(path, config)
    if model not in (None, config.model):
        raise UsageError(f"--model {model}: {path.name} has weights of {config.model}; leave it out")
    if recipe_of(config).fixed_slots and "num_slots" in asked:
        raise UsageError(f"--num-slots: {config.model} has as many slots as it was trained with; leave it out")
    return config


def preset_of(config: Config, name: str) -> dict[str, Any]:
    """What the preset sets, and of the network what the data set decides."""
    dataset, recipe = DATASETS[config.dataset], recipe_of(config)
    if name not in recipe.presets:
        raise UsageError(f"--preset {name}: {config.model} has {', '.join(recipe.presets)}")
    defaults = {"num_slots": dataset.num_entities - (config.task == "set-prediction")}
    if "network_of" in recipe.options:
        defaults["network_of"] = config.network_of or NETWORK_OF.get(config.dataset, NETWORKS[0])
    return {**recipe.presets[name], **recipe.published.get((name, defaults.get("network_of")), {}), **defaults}


def tell_surprises(config: Config) -> None:
    """Say what a run that can be done does otherwise than one may think."""
    dataset = DATASETS[config.dataset]
    if config.network_of is not None and config.dataset not in NETWORK_OF and not config.eval_only:
        say(f"No network is published for {config.dataset}: this one is {config.network_of}'s (--network-of)")
    for phase, steps in phase_steps(config).items():
        peak, warming = warm_up(phase, config)
        if 0 < steps < warming:
            say(f"The learning rate of {phase} climbs to {learning_rate(steps - 1, phase, config):.2g}, not to the "
                f"{peak:.2g} asked for: its warm-up of {warming:,} steps outlasts its {steps:,}")  # fmt: skip
    if config.task == "set-prediction" and config.num_slots < (most := dataset.num_entities - 1):
        say(f"K {config.num_slots} is fewer than the {most} objects that a scene can have: those left over cost "
            f"nothing, so losses compare at equal K alone")  # fmt: skip
