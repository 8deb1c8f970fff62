"""Train a slot model, fine-tune its masks with the IIO loss, score it on unseen scenes.

    python train.py --dataset tetrominoes --fine-tune iio            # the preset fits the machine
    python train.py --model iodine --dataset multi-dsprites          # another model, other scenes
    python train.py --task set-prediction --dataset clevr-like       # the objects' properties instead of their masks
    python train.py --resume runs/tetrominoes-quick-iio-seed0        # continue an interrupted run
    python train.py --eval-only runs/.../after.safetensors --data tetrominoes_train.tfrecords
    python train.py --from-pretrained --fine-tune iio                # fine-tune the weights that come with this
    python train.py --table1 --seeds 3                               # the paper's table 1, mean and std
    torchrun --nproc-per-node 4 train.py --fine-tune iio             # on four processes, a GPU each

The file reads top to bottom: configuration, processes, the run's folder, the model and its losses, the step, the
scores, the loop, the pictures, several runs, and `main`. Every random number of a run is a function of its seed and the
step, so a resumed run ends with the weights of one that was never interrupted.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TextIO

# Threads meet some hundred times in a step. Those that are there first spin for some 3 ms by default, and burn the time
# that the last one, whose core another program has, waits for; now for 0.1 ms, then they sleep. libgomp reads this when
# it is loaded. bench/README.md has what it is worth.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.distributed as dist
import tyro
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes out of one folder
    fcntl = None

import iio_kernels
from data import DATASETS, DataError, ResidentScenes, Scenes, load, metrics
from data.properties import kinds
from models import initial_weights
from models.dspn import DSPN, REPRESENTATION_WEIGHT
from models.iodine import IODINE
from models.monet import MONet
from models.optimizer import Optimizer
from models.set_prediction import SetPredictor, set_loss
from models.slot_attention import ABLATIONS, SlotAttentionAutoEncoder
from models.slot_mlp import SlotMLPAutoEncoder

# ---------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config:
    """Train a slot model on scenes of several objects; fine-tune its masks with Interaction Information Optimization.

    Options left out are set by the preset, which `--preset auto` (the default) chooses by the device. An interrupted
    run prints the command that resumes it.
    """

    task: Literal["discovery", "set-prediction"] = "discovery"
    """discovery: segment scenes by reconstructing them from slots, without labels. set-prediction: learn the properties
    of all objects of a scene from labels, and nothing of their order."""
    model: Literal["slot-attention", "slot-mlp", "iodine", "monet", "dspn"] = "slot-attention"
    """slot-attention: Locatello et al. 2020. slot-mlp: their baseline, an MLP in place of Slot Attention. iodine: Greff
    et al. 2019, and monet: Burgess et al. 2019, both for discovery alone. dspn: Zhang et al. 2019, for set
    prediction."""
    dataset: Literal[tuple(DATASETS)] = "tetrominoes"
    """What to train on. Without --data the scenes are generated, where they can be."""
    data: Path | None = None
    """A file of the data set: DeepMind's .tfrecords as published, or .npz with `image` and `mask`. Of clevr the folder
    with its images and scenes."""
    fine_tune: Literal["none", "iio", "reconstruction"] = "none"
    """What follows the pre-training on the reconstruction error: nothing; the IIO loss plus --hinge-scale times the
    reconstruction error while that is over --margin; or, to compare that with, the reconstruction error alone, with
    the same fresh optimizer, rate and warm-up."""
    preset: Literal["auto", "paper", "quick", "smoke"] = "auto"
    """paper: the published model and schedule (of Slot Attention on Tetrominoes 60,000 scenes, 50 + 5 epochs). quick: a
    smaller one in small batches, most with Muon, at most 20 minutes on two CPU cores with bfloat16 products. smoke:
    every phase within a minute, to test the program; it learns nothing. auto: paper on a GPU, quick on a CPU. PRESETS
    in train.py has each."""

    epochs: float | None = None
    """Passes over the training scenes in pre-training."""
    fine_tune_epochs: float | None = None
    """Passes over the training scenes in fine-tuning."""
    steps: int | None = None
    """Steps of pre-training, instead of --epochs."""
    fine_tune_steps: int | None = None
    """Steps of fine-tuning, instead of --fine-tune-epochs."""

    num_scenes: int | None = None
    """Scenes to train on: the first of the data set."""
    eval_scenes: int | None = None
    """Scenes to score: those that follow the training scenes."""
    eval_draws: int = 5
    """Scores are mean and standard deviation over this many draws of the noise, that is of the initial slots or latent
    variables."""

    num_slots: int | None = None
    """K, the number of slots: as many as a scene of the data set can have entities, or for set prediction objects.
    With --eval-only, another number than in training."""
    iterations: int | None = None
    """T, the rounds of Slot Attention or of IODINE's inference, or DSPN's steps of descent. With --eval-only, another
    number than in training."""
    slot_size: int | None = None
    """D, the width of slots, or of a slot's latent variable; of DSPN's representation of a set."""
    channels: int | None = None
    """Width of the convolutions; of DSPN's ResNet, the first stage."""
    kernel_size: int | None = None
    """Size of the convolutions, odd; IODINE's refinement network has its own."""
    input_size: int | None = None
    """Width of the encoder's MLP, which makes the inputs to Slot Attention or Slot MLP; of the convolutions of IODINE's
    refinement network."""
    pixel_sigma: float | None = None
    """IODINE and MONet: standard deviation of a pixel, for images in [0, 1]; of MONet's first slot --background-sigma.
    IODINE's paper compares with a MONet of 0.1 and 0.06."""
    background_sigma: float | None = None
    """MONet: standard deviation of a pixel under the first slot."""
    iodine_source: Literal["text", "program"] | None = None
    """IODINE's network and losses as its paper prints them, or as its authors' program has them: models/iodine.py tells
    them apart."""
    ablation: Literal[("none", *ABLATIONS)] = "none"
    """Slot Attention without one of its parts, for discovery: see `ABLATIONS` in models/slot_attention.py."""
    gradient: Literal["unrolled", "implicit", "bilevel"] = "unrolled"
    """Slot Attention, in training: through all iterations; implicit: through the last alone (Chang et al. 2022, whose T
    iterations and one are T + 1 here); bilevel: the same, and straight through to the initial slots (Jia et al.
    2023)."""
    neumann_terms: int = 0
    """--gradient implicit: further terms of the series that is the gradient of a fixed point."""
    downsample: int | None = None
    """Set prediction: the image has this many times as many rows as the features, 1, 2, 4 or 8."""
    stepwise_loss: bool = False
    """Set prediction: the loss after every iteration, not the last alone."""
    coordinate_scale: float = 1.0
    """Set prediction: factor on coordinates in the loss; a larger one asks for more exact places."""

    initial_weights: Literal["own", "keras", "sonnet"] | None = None
    """By which rule weights are drawn: as models/ has it (He's in Slot Attention's encoder, Glorot's in DSPN, otherwise
    PyTorch's), or the default of Keras or Sonnet, in which the papers' programs are written; see
    models/initial_weights.py."""
    batch_size: int | None = None
    """Scenes in a step, over all processes."""
    optimizer: Literal["adam", "rmsprop", "muon"] | None = None
    """adam or, of MONet, rmsprop, as published; or muon: Muon for hidden matrices and convolutions, Adam for the rest,
    at one rate."""
    lr: float | None = None
    """Peak learning rate in pre-training."""
    half_life: int | None = None
    """Steps in which the learning rate of each phase falls by half."""
    warmup_steps: int | None = None
    """Steps over which the learning rate of pre-training rises linearly from 0, while it decays, too."""
    fine_tune_lr: float | None = None
    """Peak learning rate in fine-tuning."""
    fine_tune_warmup_steps: int | None = None
    """The same of fine-tuning, which begins with a fresh optimizer; short, since fine-tuning is."""
    clip: float | None = None
    """Largest norm of the gradient of a step; 0 does not clip."""
    margin: float | None = None
    """Fine-tuning leaves the reconstruction error (mean over batch, pixels and channels on [-1, 1]) alone while it is
    at most this."""
    hinge_scale: float | None = None
    """Factor on the reconstruction error in fine-tuning while it is over the margin."""
    sigma: float = 5.0
    """Standard deviation of the IIO loss's Gaussian, in pixels."""
    taps: int = 11
    """How many pixels wide that Gaussian is cut off, odd."""
    repeats: int = 2
    """How often it is applied."""
    terms: Literal["sum", "mean"] = "sum"
    """Each mask's terms of the IIO loss, one for every set of others: their sum, as published, or their mean."""

    seed: int = 0
    """Of the order of the scenes, the initial weights and the noise. The scenes are the same for every seed."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of convolutions and linear layers; attention, losses and weights are float32 always. auto: bf16 in quick and
    smoke where the hardware multiplies it, otherwise fp32."""
    cuda_graph: bool = True
    """On a GPU, with one process: capture the whole step as a CUDA graph and replay it. --no-cuda-graph launches each
    kernel, to find out where something goes wrong."""

    seeds: int = 1
    """Train this many times, with --seed and the seeds after it, and give mean and standard deviation of the scores."""
    table1: bool = False
    """Train what table 1 of the IIO paper compares, from the same pre-training: the preset's fine-tuning (50 + 5
    epochs), as many steps of --fine-tune reconstruction instead (55 epochs), and pre-training 4 times as long (200)."""
    long_row: bool = True
    """Of --table1: the pre-training 4 times as long, three quarters of its time; --no-long-row leaves it out."""
    score_steps: tuple[int, ...] = ()
    """Steps of pre-training after which it is scored and its weights are kept, besides its end."""

    out: Path | None = None
    """Folder of the run, by default one in runs/ that is named by model, data set, preset and seed. With --eval-only,
    where to leave scores.json."""
    resume: Path | None = None
    """Folder of an interrupted run, to continue with its own options."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Start from these weights (.safetensors) instead of from scratch, with their architecture."""
    from_pretrained: bool = False
    """Start from the weights that come with this, pre-trained on the data set, instead of pre-training."""
    eval_only: Path | None = None
    """Score these weights (.safetensors) and train nothing; `pretrained`: those that come with this. They know task,
    model and sizes; --dataset is to be given."""

    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 1000
    """Steps between scores on the first 128 scoring scenes, in the course of training."""
    checkpoint_every: float = 60.0
    """Seconds between checkpoints."""


#: What a preset sets, by what is trained, see `recipe_of`.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "slot-attention": {
        # Slot Attention's supplement, section E, and the IIO paper. How long fine-tuning warms up is
        # ours. Initial weights are those of the authors' program: the supplement is silent on them.
        "paper": dict(
            epochs=50, fine_tune_epochs=5, num_scenes=60_000, eval_scenes=1000,
            channels=32, kernel_size=5, input_size=32, slot_size=64, iterations=3, batch_size=64,
            optimizer="adam", lr=4e-4, fine_tune_lr=4e-4, warmup_steps=10_000, half_life=100_000, clip=0.0,
            fine_tune_warmup_steps=100, margin=4e-4, hinge_scale=1e3, initial_weights="keras",
        ),
        # The lowest error in 20 minutes of what was tried (bench/README.md). The loss and its hinge are the paper's.
        "quick": dict(
            steps=5000, fine_tune_steps=4500, num_scenes=60_000, eval_scenes=320,
            channels=32, kernel_size=3, input_size=64, slot_size=64, iterations=3, batch_size=16,
            optimizer="muon", lr=1e-3, fine_tune_lr=5e-4, warmup_steps=100, half_life=2500, clip=1.0,
            fine_tune_warmup_steps=100, margin=4e-4, hinge_scale=1e3, initial_weights="own",
        ),
        "smoke": dict(
            steps=20, fine_tune_steps=10, num_scenes=256, eval_scenes=32,
            channels=8, kernel_size=3, input_size=8, slot_size=64, iterations=3, batch_size=8,
            optimizer="muon", lr=1e-3, fine_tune_lr=5e-4, warmup_steps=5, half_life=20, clip=1.0,
            fine_tune_warmup_steps=5, margin=4e-4, hinge_scale=1e3, initial_weights="own",
        ),
    },
}  # fmt: skip


def without(preset: dict[str, Any], *names: str) -> dict[str, Any]:
    """A preset but for sizes that another model has not."""
    return {name: value for name, value in preset.items() if name not in names}


PRESETS["set-prediction"] = {
    # Slot Attention's supplement, section E: 150,000 steps on CLEVR's 70,000 images.
    "paper": dict(
        steps=150_000, num_scenes=70_000, eval_scenes=15_000,
        channels=64, kernel_size=5, input_size=64, downsample=4, slot_size=64, iterations=3, batch_size=512,
        optimizer="adam", lr=4e-4, warmup_steps=1000, half_life=50_000, clip=0.0, initial_weights="keras",
    ),
    "quick": PRESETS["slot-attention"]["quick"] | dict(
        steps=6000, num_scenes=10_000, channels=32, kernel_size=5, downsample=8, batch_size=32, lr=3e-3,
        half_life=1200,
    ),
    "smoke": PRESETS["slot-attention"]["smoke"] | dict(num_scenes=64, eval_scenes=16, downsample=8),
}  # fmt: skip

PRESETS["set-prediction by dspn"] = {
    # Zhang et al., and the options of their published code.
    "paper": dict(
        epochs=100, num_scenes=70_000, eval_scenes=15_000,
        channels=64, slot_size=512, iterations=10, batch_size=32,
        optimizer="adam", lr=3e-4, warmup_steps=0, half_life=10**9, clip=0.0, initial_weights="own",
    ),
    "quick": dict(
        steps=5000, num_scenes=10_000, eval_scenes=320,
        channels=16, slot_size=128, iterations=5, batch_size=16,
        optimizer="muon", lr=2e-3, warmup_steps=100, half_life=1800, clip=1.0, initial_weights="own",
    ),
    "smoke": without(PRESETS["set-prediction"]["smoke"], "kernel_size", "input_size", "downsample")
    | dict(slot_size=16, iterations=2),
}  # fmt: skip

PRESETS["iodine"] = {
    # Greff et al., appendix C as printed, of Tetrominoes; their program's recipe differs (models/iodine.py), but for
    # initial weights, on which the text is silent. Fine-tuning is ours.
    "paper": dict(
        steps=1_000_000, fine_tune_steps=100_000, num_scenes=60_000, eval_scenes=320, iodine_source="text",
        channels=32, kernel_size=5, input_size=32, slot_size=32, iterations=5, pixel_sigma=0.1, batch_size=32,
        optimizer="adam", lr=3e-4, fine_tune_lr=3e-4, warmup_steps=0, half_life=10**9, clip=5.0,
        fine_tune_warmup_steps=0, margin=4e-4, hinge_scale=1e3, initial_weights="sonnet",
    ),
    "quick": dict(
        steps=6000, fine_tune_steps=1000, num_scenes=60_000, eval_scenes=320, iodine_source="program",
        channels=16, kernel_size=3, input_size=64, slot_size=32, iterations=3, pixel_sigma=0.3, batch_size=8,
        optimizer="muon", lr=1e-3, fine_tune_lr=5e-4, warmup_steps=100, half_life=3000, clip=5.0,
        fine_tune_warmup_steps=100, margin=4e-4, hinge_scale=1e3, initial_weights="own",
    ),
    "smoke": PRESETS["slot-attention"]["smoke"]
    | dict(slot_size=8, iterations=2, pixel_sigma=0.3, clip=5.0, iodine_source="program"),
}  # fmt: skip
PRESETS["monet"] = {
    # Burgess et al., appendix B, as printed, with the deviation of initial weights that is Sonnet's.
    "paper": dict(
        steps=1_000_000, fine_tune_steps=100_000, num_scenes=60_000, eval_scenes=320,
        channels=32, slot_size=16, pixel_sigma=0.11, background_sigma=0.09, batch_size=64,
        optimizer="rmsprop", lr=1e-4, fine_tune_lr=1e-4, warmup_steps=0, half_life=10**9, clip=0.0,
        fine_tune_warmup_steps=0, margin=4e-4, hinge_scale=1e3, initial_weights="sonnet",
    ),
    "quick": dict(
        steps=4000, fine_tune_steps=1000, num_scenes=60_000, eval_scenes=320,
        channels=16, slot_size=16, pixel_sigma=0.11, background_sigma=0.09, batch_size=8,
        optimizer="muon", lr=1e-3, fine_tune_lr=5e-4, warmup_steps=100, half_life=2500, clip=5.0,
        fine_tune_warmup_steps=100, margin=4e-4, hinge_scale=1e3, initial_weights="own",
    ),
    "smoke": without(PRESETS["slot-attention"]["smoke"], "kernel_size", "input_size", "iterations")
    | dict(slot_size=8, pixel_sigma=0.11, background_sigma=0.09),
}  # fmt: skip

# Muon would spend its time on Slot MLP's first layer, which holds nearly all of its weights.
for _name, _of in (("slot-mlp", "slot-attention"), ("set-prediction by slot-mlp", "set-prediction")):
    _own = dict(optimizer="adam", lr=4e-4, fine_tune_lr=4e-4)
    PRESETS[_name] = {preset: without(values, "iterations") | _own for preset, values in PRESETS[_of].items()}

#: What images of another height than Tetrominoes' change, by what is trained, the preset and the height: Multi-dSprites
#: has 64, CLEVR 128. Of Slot Attention and Slot MLP steps and scoring scenes are those of the supplement's table 10; 50
#: epochs are the IIO paper's, of Tetrominoes alone. IODINE's sizes are those of its text.
ADJUSTED: dict[tuple[str, str, int], dict[str, Any]] = {
    ("iodine", "paper", 64): dict(slot_size=16),
    ("iodine", "paper", 128): dict(slot_size=64, channels=64, input_size=64, kernel_size=3),
}
for _name in ("slot-attention", "slot-mlp"):
    _own = dict(steps=500_000, epochs=None, eval_scenes=320)
    ADJUSTED[_name, "paper", 64] = _own
    ADJUSTED[_name, "paper", 128] = _own | dict(channels=64, input_size=64)

#: The weights that come with this, before and after fine-tuning.
PRETRAINED = Path(__file__).with_name("models") / "pretrained"


class UsageError(Exception):
    """The run cannot start as asked, for a reason the user can mend: one line, no traceback."""


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


def recipe_of(config: Config) -> str:
    """Under which name `PRESETS` has what is trained."""
    if config.task == "discovery":
        return config.model
    return "set-prediction" if config.model == "slot-attention" else f"set-prediction by {config.model}"


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


def device_of(config: Config) -> torch.device:
    """The device asked for, which must be here."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def changed_fields(config: Config) -> list[str]:
    """The fields that are not at their defaults, in order."""
    return [f.name for f in dataclasses.fields(Config) if getattr(config, f.name) != f.default]


def option(field: str) -> str:
    """The command-line option of a field of `Config`."""
    return "--" + field.rstrip("_").replace("_", "-")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16; PyTorch emulates it elsewhere, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def phase_steps(config: Config) -> dict[str, int]:
    """The phases of a run in order, and how many steps each takes."""

    def steps(steps: int | None, epochs: float | None) -> int:
        return steps if steps is not None else math.ceil(epochs * config.num_scenes / config.batch_size)

    phases = {"pre-training": steps(config.steps, config.epochs)}
    if config.fine_tune != "none":
        phases["fine-tuning"] = steps(config.fine_tune_steps, config.fine_tune_epochs)
    return phases


# ---------------------------------------------------------------------------------------------- processes


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


def open_standard_streams() -> None:
    """Let output and errors take all that is printed: what the shell closed leads nowhere, what an encoding has not is
    escaped."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # or the next file to be opened would be number 2, and get what libraries say of errors
    os.close(handle)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def say(words: str, file: TextIO | None = None) -> None:
    """Print on process number 0. The work goes on where that fails, as where a reader like `head` has left."""
    if rank() > 0:
        return
    stream = file or sys.stdout
    try:
        print(words, file=stream, flush=True)
    except OSError as error:
        # What is printed from now on leads nowhere, and so does what the stream still holds.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        if stream is sys.stdout:
            warn(f"nothing more can be printed ({error.strerror}); the work goes on")


def warn(words: str) -> None:
    say(f"train.py: warning: {words}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------- the run's folder


def write(path: Path, content: bytes | memoryview | str) -> None:
    """Write a file whole or not at all: a reader, or a kill at any moment, never meets half of it.

    Raises:
        OSError: it cannot be written, as where the disk is full; what was there before still is, and nothing else.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        # A name in it may be no UTF-8.
        temporary.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def to_json(config: Config) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def claim(folder: Path, claims: ExitStack) -> bool:
    """Make a run's folder and keep other processes out of it until `claims` ends; False where another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        return True
    handle = os.open(folder, os.O_RDONLY)
    claims.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # the file system knows no locks
    return True


def open_run(config: Config, claims: ExitStack) -> Path:
    """Make the run's folder, and claim it. Results that are there are never overwritten."""
    folder = config.out
    if folder is not None:
        if not claim(folder, claims):
            raise UsageError(f"--out: another process trains in {folder}: choose another one")
    else:
        name = default_name(config)
        folder, number = Path("runs", name), 2
        while is_finished(folder) or not claim(folder, claims):
            folder, number = Path("runs", f"{name}-{number}"), number + 1
    if is_finished(folder):
        raise UsageError(f"{folder} holds a finished run: choose another --out")
    if (folder / "checkpoint.pt").exists() or (several(config) and (folder / "config.json").exists()):
        raise UsageError(f"{folder} holds an unfinished run: continue it with {resume_command(folder)}, "
                         f"or choose another --out")  # fmt: skip
    write(folder / "config.json", json.dumps(to_json(config) | {"started_in": os.getcwd()}, indent=2) + "\n")
    return folder


def default_name(config: Config) -> str:
    model = "" if config.model == "slot-attention" else f"{config.model}-"
    task = "" if config.task == "discovery" else f"{config.task}-"
    ablation = "" if config.ablation == "none" else f"{config.ablation}-"
    name = f"{model}{task}{ablation}{config.dataset}-{config.preset}"
    name += f"{'' if config.fine_tune == 'none' else f'-{config.fine_tune}'}-seed{config.seed}"
    return name + ("-table1" if config.table1 else f"-and-{config.seeds - 1}-more" if config.seeds > 1 else "")


def reopen_run(given: Config) -> tuple[Config, Path]:
    """The configuration and folder of the run that --resume names."""
    folder = given.resume
    others = [name for name in changed_fields(given) if name != "resume"]
    if others:
        raise UsageError(f"--resume continues a run with its own options: leave out {', '.join(map(option, others))}")
    if folder.is_file():
        raise UsageError(f"--resume: {folder} is a file: give the run's folder, {folder.parent}")
    try:
        saved = json.loads((folder / "config.json").read_text())
        saved.setdefault("fine_tune_warmup_steps", saved["warmup_steps"])  # one option set both once
        saved = {"initial_weights": "own"} | completed(saved)
        started_in = saved.pop("started_in", "")  # earlier runs did not keep it
        saved |= {name: Path(saved[name]) for name in ("data", "out", "from_") if saved[name] is not None}
        for name in ("data", "from_"):
            if saved[name] is not None and (there := Path(started_in, saved[name])).exists():
                saved[name] = there
        config = Config(**saved | {"score_steps": tuple(saved["score_steps"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"--resume: {folder} holds no run ({error})") from None
    if is_finished(folder) and (several(config) or (folder / PICTURES[config.task]).exists()):
        raise UsageError(f"--resume: {folder} is finished; its scores are in {folder / 'summary.json'}")
    return config, folder


def is_finished(folder: Path) -> bool:
    """Whether a run has all scores and weights. Its picture may lack, which `--resume` then draws."""
    return (folder / "summary.json").exists()


def resume_command(folder: Path) -> str:
    program = "python"
    if num_ranks() > 1:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        program = f"torchrun --nproc-per-node {here}" if here == num_ranks() else "torchrun [its options as before]"
    return f"{program} {quoted(sys.argv[0])} --resume {quoted(str(folder))}"


def quoted(name: str) -> str:
    """A file's name for a shell, and for a terminal: what is no UTF-8 as the bytes' numbers."""
    try:
        name.encode()
    except UnicodeEncodeError:
        escaped = "".join(chr(b) if 32 <= b < 127 and chr(b) not in "\\'" else f"\\x{b:02x}" for b in os.fsencode(name))
        return f"$'{escaped}'"
    return shlex.quote(name)


def to_continue(folder: Path | None) -> str:
    """How to go on with the run in a folder, where one was begun and is not finished."""
    begun = folder is not None and (folder / "config.json").exists() and not is_finished(folder)
    return f"; to continue: {resume_command(folder)}" if begun else ""


#: What a model is built from, and weights carry with them.
SIZES = ("channels", "kernel_size", "input_size", "downsample", "slot_size", "num_slots", "iterations")
CHOICES = ("task", "model", "ablation")
ARCHITECTURE = (*CHOICES, "pixel_sigma", "background_sigma", "iodine_source", *SIZES)

#: What else bears on the scores of given weights.
SCORING = ("eval_only", "dataset", "data", "preset", "num_scenes", "eval_scenes", "eval_draws", "coordinate_scale",
           "seed", "device", "precision", "out")  # fmt: skip


def save_weights(path: Path, model: nn.Module, config: Config, results: dict) -> None:
    """Weights as safetensors, with what is needed to build the model again."""
    about = {"architecture": {name: getattr(config, name) for name in ARCHITECTURE}, "scores": results}
    about |= {"num_scenes": config.num_scenes, "dataset": config.dataset}
    about |= {"data": data_name(config)}
    # All under one key: safetensors writes several in an order of its own, and equal runs shall leave equal files.
    metadata = {"iio_kernels": json.dumps(about)}
    write(path, to_safetensors({k: v.contiguous() for k, v in model.state_dict().items()}, metadata))


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, and what they carry: their architecture, their scores, and which scenes they were trained on."""
    content = path.read_bytes()  # safe_open takes no name that is no UTF-8
    tensors = from_safetensors(content)
    about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    if "iio_kernels" in about:
        return tensors, json.loads(about["iio_kernels"])
    # Earlier ones kept each under a key of its own.
    return tensors, about | {key: json.loads(about[key]) for key in ("architecture", "scores") if key in about}


def completed(shape: dict[str, Any]) -> dict[str, Any]:
    """The architecture that weights or a run tell, with what those of older versions leave out."""
    shape = {"task": "discovery", "model": "slot-attention", "ablation": "none", "pixel_sigma": None,
             "background_sigma": None, "iodine_source": None, "slot_size": 64, "downsample": None} | shape  # fmt: skip
    unsaid = {"iodine": {"iodine_source": "program"}, "monet": {"pixel_sigma": 0.11, "background_sigma": 0.09}}
    unsaid = unsaid.get(shape["model"], {})
    return shape | {name: value for name, value in unsaid.items() if shape[name] is None}


def load_weights(path: Path, config: Config) -> tuple[Config, dict[str, Tensor]]:
    """Weights, and the configuration with their architecture in it. To score them, K and T may be other ones."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder: give the weights in it, such as {path / 'before.safetensors'}")
    try:
        tensors, about = read_weights(path)
        shape = about["architecture"]
        dataset = about.get("dataset", config.dataset)
        shape = completed(shape)
        if config.eval_only is not None:
            shape |= {n: getattr(config, n) for n in ("num_slots", "iterations") if getattr(config, n) is not None}
        sizes = {name: None if shape[name] is None else int(shape[name]) for name in SIZES}
        config = dataclasses.replace(config, **{n: shape[n] for n in ARCHITECTURE if n not in SIZES}, **sizes)
        seen = scenes_seen(about, config)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{path} holds no weights of a run ({error})") from None
    if dataset in DATASETS and DATASETS[dataset].size != DATASETS[config.dataset].size:
        raise UsageError(f"--dataset {config.dataset}: {path.name} was trained on {dataset}, whose images have another "
                         f"size; add --dataset {dataset}")  # fmt: skip
    if config.num_scenes is None and config.eval_only is not None and seen:
        config = dataclasses.replace(config, num_scenes=seen)
    if config.num_scenes is not None and config.num_scenes < seen:
        raise UsageError(f"--num-scenes {config.num_scenes}: {path.name} was trained on the first {seen:,} scenes, so "
                         f"those that follow are not unseen; expected at least {seen}")  # fmt: skip
    return config, tensors


def scenes_seen(about: dict[str, Any], config: Config) -> int:
    """How many of the scenes asked for, the first, weights were trained on, by what they carry: 0 if on others."""
    source = config.dataset, data_name(config)
    trained_on = about.get("dataset", config.dataset), about.get("data", "")
    return int(about.get("num_scenes", 0)) if trained_on == source else 0


def data_name(config: Config) -> str:
    """The name of the file or folder of scenes, of `--data .` the folder's own; nothing where they are generated."""
    return "" if config.data is None else os.path.basename(os.path.abspath(config.data))


def pretrained(config: Config) -> list[Path]:
    """The weights that come with this for the data set, before and after fine-tuning."""
    paths = [PRETRAINED / f"{config.dataset}-{when}.safetensors" for when in KEPT]
    if not all(path.exists() for path in paths):
        names = sorted({path.name.rpartition("-")[0] for path in PRETRAINED.glob("*.safetensors")})
        raise UsageError(f"--dataset {config.dataset}: weights come with this for {', '.join(names)} alone")
    return paths


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    content = io.BytesIO()  # of a file that cannot be written torch.save says nothing that tells why
    torch.save(state, content)
    write(folder / "checkpoint.pt", content.getbuffer())


def load_checkpoint(path: Path, config: Config) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:  # torch.load looks at no checksum
                raise zipfile.BadZipFile
        # weights_only: a checkpoint is data, and one from a stranger cannot run code.
        state = torch.load(path, map_location=config.device, weights_only=True)
    except OSError:
        raise
    except Exception:  # a damaged file can be wrong in any way
        raise UsageError(f"{path} is not a checkpoint of a run: it is damaged, or holds more than tensors") from None
    entries = {"phase", "step", "seconds", "results", "optimizer", "model"}
    if not isinstance(state, dict) or not state.keys() >= entries or (
        state["optimizer"] is not None and not state["optimizer"].keys() <= {"adam", "rmsprop", "muon"}
    ):  # fmt: skip
        raise UsageError(f"{path} was written by another version of train.py: continue the run with that version")
    return state


def step_of(line: bytes) -> int | None:
    """Of which step a line of metrics.jsonl is; None where it is damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


class Metrics:
    """metrics.jsonl, one line a logged step, and TensorBoard's event file where TensorBoard is installed."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            # What a killed run logged after its last checkpoint is about to be logged again.
            lines = [line for line in self.path.read_bytes().splitlines(True) if line.endswith(b"\n")]
            steps = {line: step_of(line) for line in lines}
            write(self.path, b"".join(line for line in lines if steps[line] is not None and steps[line] <= step))
            if None in steps.values():
                warn(f"{self.path}: damaged lines are left out")
        self.board = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder), purge_step=step + 1)
        except ImportError:
            pass
        except Exception as error:
            warn(f"no events for TensorBoard ({type(error).__name__}: {error})")

    def log(self, step: int, **values: Any) -> None:
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        if self.board is not None:
            for name, value in values.items():
                if not isinstance(value, str):
                    self.board.add_scalar(name, value, step)


# ---------------------------------------------------------------------------------------------- data, model, losses


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


def share(batch: Tensor) -> Tensor:
    """This process's rows of a tensor for all."""
    return batch.chunk(num_ranks())[rank()]


def hash_seed(*numbers: int) -> int:
    """One seed for several numbers: neighbouring seeds and steps must not give related random streams."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")


def build_model(config: Config, resolution: tuple[int, int]) -> nn.Module:
    """The model for images of `resolution`. All take images in [-1, 1] and `noise`, of `noise_shape` for each."""
    torch.manual_seed(hash_seed(config.seed, 0))
    strided = tuple(resolution) == (128, 128)  # as Slot Attention decodes CLEVR

    def sizes(*names: str) -> dict[str, Any]:
        return {name: getattr(config, name) for name in ("channels", "num_slots", *names)}

    layers = "kernel_size", "input_size", "slot_size"
    gradient = {"gradient": config.gradient, "neumann_terms": config.neumann_terms}
    match config.task, config.model:
        case "set-prediction", "dspn":
            model = DSPN(resolution, latent_size=config.slot_size, **sizes("iterations"))
        case "set-prediction", _:
            slots = config.model.removeprefix("slot-")
            sized = sizes(*layers, "iterations", "downsample")
            model = SetPredictor(resolution, slots=slots, slot_attention=gradient, **sized)
        case _, "slot-attention":
            changed = {} if config.ablation == "none" else ABLATIONS[config.ablation]
            changed = changed | {"slot_attention": changed.get("slot_attention", {}) | gradient}
            model = SlotAttentionAutoEncoder(resolution, strided=strided, **sizes(*layers, "iterations"), **changed)
        case _, "slot-mlp":
            model = SlotMLPAutoEncoder(resolution, strided=strided, **sizes(*layers))
        case _, "iodine":
            source = IODINE.configurations if config.iodine_source == "text" else IODINE.program
            published = {each["resolution"][0]: each for each in source.values()}
            published = published.get(resolution[0], source["tetrominoes"])
            own = dict(
                resolution=resolution, latent_size=config.slot_size, sigma=config.pixel_sigma,
                refinement_channels=config.input_size, refinement_kernel_size=published["kernel_size"],
                mlp_sizes=(4 * config.input_size,) * len(published["mlp_sizes"]),
            )  # fmt: skip
            model = IODINE(**published | own | sizes("kernel_size", "iterations"))
        case _, "monet":
            blocks = min(resolution).bit_length() - 2  # halved to 4 to 7 pixels: the published 5 of 64, 6 of 128
            sigmas = dict(sigma_first=config.background_sigma, sigma=config.pixel_sigma)
            model = MONet(resolution, latent_size=config.slot_size, blocks=blocks, **sigmas, **sizes())
    if config.initial_weights in initial_weights.RULES:
        initial_weights.RULES[config.initial_weights](model)
    return model.to(config.device, memory_format=torch.channels_last)


class Batch(NamedTuple):
    """What a step learns from."""

    pixels: Tensor
    """uint8 (B, 3, H, W)."""
    noise: Tensor
    """(B, ...), standard normal: what the model draws."""
    objects: Tensor | None
    """(B, M, 19), the properties to predict; None for discovery."""


def draw_noise(config: Config, batch: int, shape: tuple[int, ...], *seed: int) -> Tensor:
    """Standard normal numbers of `shape` for each of a batch, by the run's seed and what else names the batch."""
    generator = torch.Generator(config.device).manual_seed(hash_seed(config.seed, *seed))
    return torch.randn(batch, *shape, generator=generator, device=config.device)


def objects_of(config: Config, source: Scenes, indices: Tensor) -> Tensor | None:
    return source.properties(indices, device=config.device) if config.task == "set-prediction" else None


def apply_model(model: nn.Module, pixels: Tensor, noise: Tensor, config: Config, **options: Any) -> tuple[Any, Tensor]:
    """What the model makes of images (uint8, B 3 H W), and those images in [0, 1].

    It is in training mode where gradients are on, in evaluation mode where they are off.
    """
    image = pixels / 255
    model.train(torch.is_grad_enabled())
    with torch.autocast(image.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        return model(image * 2 - 1, noise=noise, **options), image


def losses(
    made: Any, image: Tensor, phase: str, config: Config, objects: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a phase, from what a model made of images in [0, 1], and its parts for the log."""
    if config.task == "set-prediction":
        predicted, representation = made if config.model == "dspn" else (made, None)
        loss = set_loss(predicted, objects, config.coordinate_scale)
        parts = {"loss": loss.detach()}
        if representation is not None:  # weighted beside a mean over the pairs, of which `set_loss` is the sum
            loss = loss + REPRESENTATION_WEIGHT * predicted.shape[-2] * representation
            parts["representation"] = representation.detach()
        return loss, parts
    objective, masks, error = made.objective(image * 2 - 1)
    if phase == "pre-training" or config.fine_tune == "reconstruction":
        parts = {} if objective is error else {"loss": objective.detach()}
        return objective, {"mse": error.detach(), **parts}
    inpainter = dict(sigma=config.sigma, kernel_size=config.taps, repeats=config.repeats)
    iio = iio_kernels.iio_loss(image, masks, terms=config.terms, **inpainter)
    # The IIO loss alone would let go of the image: the hinge brings the error back whenever it leaves the margin. It
    # switches on the device, which nothing waits for, and for all processes alike.
    hinge = torch.where(mean_over_ranks(error) > config.margin, config.hinge_scale * error, 0.0)
    return iio + hinge, {"mse": error.detach(), "iio": iio.detach()}


def build_optimizer(model: nn.Module, config: Config) -> Optimizer:
    return Optimizer(model, config.optimizer, capturable=torch.device(config.device).type == "cuda")


def warm_up(phase: str, config: Config) -> tuple[float, int]:
    """The peak of a phase's learning rate, and the steps in which it gets there."""
    if phase == "fine-tuning":
        return config.fine_tune_lr, config.fine_tune_warmup_steps
    return config.lr, config.warmup_steps


def learning_rate(step: int, phase: str, config: Config) -> float:
    """Linear warm-up times exponential decay, both from the phase's beginning."""
    peak, steps = warm_up(phase, config)
    return peak * min(1.0, (step + 1) / max(1, steps)) * 0.5 ** (step / config.half_life)


# ---------------------------------------------------------------------------------------------- the step


class Step:
    """A step of one phase: forward, backward, clip, optimizer. All it learns stays on the device; nothing waits for it.

    On a GPU, with one process, the first call captures the step in a CUDA graph and all calls replay it: some hundred
    launches then cost the host as much as one. Several processes meet in the middle of the backward pass: these launch
    each kernel.

    Attributes:
        values: of the last step, scalars: the parts of the loss, and "gradient_norm" before clipping.
        bad: the first step whose loss or gradient was no number, -1 while there is none.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, phase: str, config: Config, number: int = 0) -> None:
        self.model, self.optimizer, self.phase, self.config = model, optimizer, phase, config
        self.number = torch.tensor(number, device=config.device)
        self.bad = torch.tensor(-1, device=config.device)
        self.values: dict[str, Tensor] = {}
        on_gpu = self.number.is_cuda
        # The host matches predictions to objects: no graph holds that. Nor one, yet, the gradients within a gradient
        # that further terms of Neumann's series are.
        captured = config.task == "discovery" and not config.neumann_terms
        self.captures = on_gpu and config.cuda_graph and num_ranks() == 1 and captured
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch, rate: float) -> None:
        """Step with a batch and a learning rate."""
        self.optimizer.set_rate(rate)
        if not self.captures:
            self.values = self.compute(batch)
            return
        if self.graph is None:
            self.capture(batch)
        self.batch.pixels.copy_(batch.pixels)
        self.batch.noise.copy_(batch.noise)
        self.graph.replay()

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        options: dict[str, Any] = {"stepwise": True} if self.config.stepwise_loss else {}
        if self.config.model == "dspn":
            options["objects"] = batch.objects
        made, image = apply_model(self.model, batch.pixels, batch.noise, self.config, **options)
        loss, values = losses(made, image, self.phase, self.config, batch.objects)
        self.model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf)
        self.optimizer.step()
        wrong = (self.bad < 0) & ~(loss.detach() + norm).isfinite()
        self.bad.copy_(torch.where(wrong, self.number, self.bad))
        self.number += 1
        return values | {"gradient_norm": norm}

    def capture(self, batch: Batch) -> None:
        """Capture `compute`. A trial before it compiles kernels and makes the optimizer's state; then it is undone."""

        def tensors() -> Iterator[Tensor]:
            yield from (self.number, self.bad, *self.model.parameters(), *self.optimizer.tensors())

        self.batch = Batch(batch.pixels.clone(), batch.noise.clone(), None)
        before = {id(x): x.detach().clone() for x in tensors()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.compute(self.batch)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for x in tensors():
                x.copy_(before[id(x)]) if id(x) in before else x.zero_()
        self.model.zero_grad()  # so that the graph's own memory will hold the gradients
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.values = self.compute(self.batch)


# ---------------------------------------------------------------------------------------------- scores

#: The scores of a task, by their names in files.
SCORES = {
    "discovery": ("ari", "fg_ari", "miou", "mbo", "mse"),
    "set-prediction": ("ap_inf", "ap_1", "ap_0.5", "ap_0.25", "ap_0.125", "loss"),
}

#: What tables show of them, in percent, under which headings; and, as they are, errors.
PERCENT = {"ari": "ARI", "fg_ari": "FG-ARI", "miou": "mIoU", "ap_inf": "AP", "ap_1": "AP 1", "ap_0.5": "AP 0.5",
           "ap_0.25": "AP 0.25", "ap_0.125": "AP 0.125"}  # fmt: skip
ERRORS = {"mse": "MSE", "loss": "loss"}


@torch.no_grad()
def evaluate(model: nn.Module, source: Scenes, indices: Tensor, draws: int, config: Config) -> dict:
    """The task's scores over scenes: {"ari": mean over draws of the noise, "ari_std": ..., "fg_ari": ...}.

    Set prediction scores all scenes together, and as "by_objects" those with each number of objects, of the first draw.
    Several processes share the scenes, 64 at a time or 16 larger ones, and know the scores of all.
    """
    score = score_masks if config.task == "discovery" else score_sets
    if num_ranks() > 1:  # each process's batch normalisation has averaged over its own share
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    each = []
    for draw in range(draws):
        batches = []
        for i, chunk in enumerate(indices.split(64 if max(source.size) <= 64 else 16)):
            if i % num_ranks() == rank():
                noise = draw_noise(config, len(chunk), model.noise_shape, -1, draw, i)
                batches.append((chunk, noise))
        each.append(score(model, source, batches, len(indices), config))
    columns = {name: torch.tensor([scored[name] for scored in each], dtype=torch.float64)
               for name in SCORES[config.task]}  # fmt: skip
    means = {name: column.mean().item() for name, column in columns.items()}
    deviations = {f"{name}_std": column.std(correction=0).item() for name, column in columns.items()}
    return each[0] | means | deviations


def score_masks(
    model: nn.Module, source: Scenes, batches: list[tuple[Tensor, Tensor]], total: int, config: Config
) -> dict[str, Any]:
    """Scores of the masks' argmax, mean over scenes."""
    sums = torch.zeros(len(SCORES["discovery"]), dtype=torch.float64)
    for indices, noise in batches:
        pixels, truth = source.batch(indices, device=config.device)
        scene, image = apply_model(model, pixels, noise, config)
        reconstruction, masks = scene.compose()
        sizes = dict(num_true=source.num_entities, num_pred=masks.shape[1])
        predicted = masks.argmax(1)
        each = {
            "ari": metrics.adjusted_rand_index(truth, predicted, **sizes),
            "fg_ari": metrics.adjusted_rand_index(truth, predicted, **sizes, ignore_background=True),
            "miou": metrics.mean_iou(truth, predicted, **sizes),
            "mbo": metrics.mean_best_overlap(truth, predicted, **sizes),
            "mse": metrics.mean_squared_error(reconstruction, image * 2 - 1),
        }
        sums += torch.stack([each[name].double().sum() for name in SCORES["discovery"]]).cpu()
    if num_ranks() > 1:
        dist.all_reduce(sums)
    return dict(zip(SCORES["discovery"], (sums / total).tolist(), strict=True))


def score_sets(
    model: nn.Module, source: Scenes, batches: list[tuple[Tensor, Tensor]], total: int, config: Config
) -> dict[str, Any]:
    """Average precision at each distance, over all scenes together, and of those with the same number of objects."""
    parts = []
    for indices, noise in batches:
        pixels, _ = source.batch(indices, device=config.device)
        predicted, _ = apply_model(model, pixels, noise, config)
        parts.append((predicted.cpu(), objects_of(config, source, indices).cpu()))
    if num_ranks() > 1:
        gathered: list[Any] = [None] * num_ranks()
        dist.all_gather_object(gathered, parts)
        in_order = itertools.zip_longest(*gathered)  # what is equally sure keeps its order
        parts = [part for row in in_order for part in row if part is not None]
    predicted, objects = (torch.cat(x) for x in zip(*parts, strict=True))
    distances = [(name, float(name.removeprefix("ap_"))) for name in SCORES["set-prediction"] if name != "loss"]
    scored = {name: metrics.average_precision(predicted, objects, distance) for name, distance in distances}
    scored["loss"] = set_loss(predicted, objects, config.coordinate_scale).item()
    counts = (objects[..., -1] > 0.5).sum(1)
    by_objects = {
        int(n): {name: metrics.average_precision(predicted[counts == n], objects[counts == n], distance)
                 for name, distance in distances}
        for n in counts.unique()
    }  # fmt: skip
    return scored | {"by_objects": by_objects}


#: What tables call the models.
NAMES = {"slot-attention": "Slot Attention", "slot-mlp": "Slot MLP", "iodine": "IODINE", "monet": "MONet",
         "dspn": "DSPN"}  # fmt: skip

#: And their fine-tuning.
FINE_TUNING = {"iio": "IIO", "reconstruction": "reconstruction"}


def row_name(key: str, config: Config, from_: str | None = None) -> str:
    """What a table calls the scores that a run keeps under `key`. The weights it began with were kept under `from_`."""
    steps, begun = phase_steps(config), NAMES[config.model]
    if key.startswith("step-"):
        return f"{begun}, {int(key.removeprefix('step-')):,} steps"
    if config.from_ is not None:
        begun = from_ or config.from_.stem
        if begun.startswith("step-"):
            begun = row_name(begun, config)
    if key == "before":
        more = "more " if config.from_ is not None else ""
        return f"{begun}, {steps['pre-training']:,} {more}steps" if steps["pre-training"] or not more else begun
    loss = FINE_TUNING[config.fine_tune]
    return f"{'' if steps['pre-training'] else begun} + {loss}, {steps['fine-tuning']:,} steps"


def table(rows: dict[str, dict]) -> str:
    """Scores as table 1 of the IIO paper prints them, in percent."""
    percent, errors = shown(rows)
    width = max(36, *map(len, rows))
    lines = [" " * width + "".join(f"{PERCENT[n]:>14}" for n in percent) + "".join(f"{ERRORS[n]:>10}" for n in errors)]
    for name, scored in rows.items():
        cells = [f"{100 * scored[n]:.2f} ± {100 * scored[n + '_std']:.2f}" for n in percent]
        lines.append(f"{name:{width}}" + "".join(f"{c:>14}" for c in cells)
                     + "".join(f"{scored[n]:>10.4f}" for n in errors))  # fmt: skip
    return "\n".join(lines)


def shown(rows: dict[str, dict]) -> tuple[list[str], list[str]]:
    """Which of `PERCENT` and which of `ERRORS` the scores of all rows have."""
    return tuple([n for n in names if all(n in scored for scored in rows.values())] for names in (PERCENT, ERRORS))


# ---------------------------------------------------------------------------------------------- the loop


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next step.

    By default it returns them to the kernel, which hands them out again zeroed, page by page: on two CPU cores that
    was 107 ms a step where 77 ms is the work itself.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mmap_max, trim_threshold, top_pad = -4, -1, -2  # as malloc.h numbers them
        mallopt(mmap_max, 0), mallopt(trim_threshold, 2**31 - 1), mallopt(top_pad, 64 << 20)


def waited() -> float:
    """Seconds in which this process's threads could have computed and had no core, in sum; 0 where no one tells."""
    total = 0
    for schedule in Path("/proc/self/task").glob("*/schedstat"):  # running, waiting, number of times; nanoseconds
        with suppress(OSError):
            total += int(schedule.read_text().split()[1])
    return total / 1e9


class Cores:
    """Tells, once, that other programs have the cores so often that the threads of this one wait for each other."""

    def __init__(self) -> None:
        self.at, self.waited, self.told = time.monotonic(), waited(), False

    def look(self, folder: Path) -> None:
        """Called between steps: looks every 10 seconds."""
        seconds, threads = time.monotonic() - self.at, torch.get_num_threads()
        if self.told or seconds < 10:
            return
        now = waited()
        share = (now - self.waited) / (seconds * threads)
        if share > 1 / 3:
            self.told = True
            fewer = f", or continue with fewer threads, whose sums round otherwise: OMP_NUM_THREADS={threads // 2} "
            warn(f"steps are slow: other programs, or a limit on this one, keep its {threads} threads from a core for "
                 f"{share:.0%} of the time, and each waits for all. Lower the others' priority (renice 19 PID)"
                 f"{fewer + resume_command(folder) if threads > 1 else ''}")  # fmt: skip
        self.at, self.waited = time.monotonic(), now


class Diverged(Exception):
    """The loss is no longer a number."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM came, and the run's state is saved."""

    def __init__(self, signum: int) -> None:
        self.exit_code = 128 + signum


@contextmanager
def deferred_signals() -> Iterator[Callable[[], int | None]]:
    """Ctrl-C and SIGTERM wait for the end of the step, where the state is whole; a second one does not wait.

    But torchrun passes on what its processes get from the terminal, too; it kills what does not stop.
    """
    received: list[int] = []

    def remember(signum: int, frame: Any) -> None:
        if received and num_ranks() == 1:
            raise KeyboardInterrupt
        received.append(signum)

    previous = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def stop_if_asked(signalled: Callable[[], int | None]) -> None:
    """Stop between steps, where all is saved, if any process was signalled: all of them together."""
    if interrupt := any_rank(signalled() or 0):
        raise Interrupted(interrupt)


class Run:
    """A run of all phases in its folder, from the last checkpoint if the folder holds one."""

    def __init__(self, config: Config, folder: Path, source: Scenes, signalled: Callable[[], int | None]) -> None:
        self.begun, self.signalled = time.monotonic(), signalled
        if config.from_ is not None:
            config, weights = load_weights(config.from_, config)
        self.config, self.folder, self.source, self.phases = config, folder, source, phase_steps(config)
        self.model, self.order = build_model(config, source.size), Order(config)
        if config.from_ is not None:
            restore(self.model, weights, config.from_)
        self.unseen = torch.arange(config.num_scenes, config.num_scenes + config.eval_scenes)
        state: dict[str, Any] = {"phase": 0, "step": 0, "seconds": 0.0, "results": "{}", "optimizer": None}
        if rank() == 0 and (folder / "checkpoint.pt").exists():
            state = load_checkpoint(folder / "checkpoint.pt", config)
            restore(self.model, state["model"], folder / "checkpoint.pt")
        state = same_on_all_ranks({name: value for name, value in state.items() if name != "model"})
        self.phase, self.step, self.optimizer_state = state["phase"], state["step"], state["optimizer"]
        self.seconds_before, self.results = state["seconds"], json.loads(state["results"])
        done = sum(list(self.phases.values())[: self.phase]) + self.step
        self.metrics = Metrics(folder, done) if rank() == 0 else None
        say(greeting(config, self.phases, done, self.model, source))
        # What is trained: with several processes, the model with its gradients averaged over them.
        self.trained: nn.Module = self.model
        if num_ranks() > 1:
            devices = [torch.cuda.current_device()] if torch.device(config.device).type == "cuda" else None
            # An implicit gradient leaves the initial slots out.
            unused = config.gradient == "implicit"
            self.trained = DistributedDataParallel(self.model, devices, find_unused_parameters=unused)

    @property
    def seconds(self) -> float:
        """What the run has taken, without the time in which it was interrupted."""
        return self.seconds_before + time.monotonic() - self.begun

    def train(self) -> None:
        """Train what is left of the phases; leave scores, weights and picture."""
        config = self.config
        for number in range(self.phase, len(self.phases)):
            self.train_phase(number)
            if number + 1 < len(self.phases):
                stop_if_asked(self.signalled)
        if rank() == 0:
            summary = {**self.results, "config": to_json(config), "versions": versions(),
                       "seconds": round(self.seconds, 1)}  # fmt: skip
            write(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
            draw(self.folder, config, self.source)
        rows = {row_name(key, config): scored for key, scored in self.results.items()}
        say(f"\nScores on {len(self.unseen):,} unseen scenes, mean ± std over {config.eval_draws} draws of the "
            f"noise, after {self.seconds / 60:.1f} min:\n{table(rows)}\n\n"
            f"Scores, weights and picture: {self.folder}/summary.json, *.safetensors, {PICTURES[config.task]}"
        )  # fmt: skip

    def train_phase(self, number: int) -> None:
        """Train one phase from `self.step` to its end, and score it."""
        config = self.config
        phase, steps = list(self.phases.items())[number]
        first = sum(list(self.phases.values())[:number])
        optimizer = build_optimizer(self.model, config)
        if self.optimizer_state is not None:
            optimizer.load_state_dict(self.optimizer_state)
        step_once = Step(self.trained, optimizer, phase, config, self.step)
        saved, good, latest, cores = time.monotonic(), self.step, {}, Cores()
        quiet = rank() > 0 or not sys.stderr.isatty()
        with tqdm(total=steps, initial=self.step, desc=phase, unit="step", disable=quiet) as bar:
            for step in range(self.step, steps):
                rate = learning_rate(step, phase, config)
                indices = self.order(first + step)
                pixels, _ = self.source.batch(indices, device=config.device)
                noise = share(draw_noise(config, config.batch_size, self.model.noise_shape, number, step))
                step_once(Batch(pixels, noise, objects_of(config, self.source, indices)), rate)
                bar.update()

                last = step + 1 == steps
                logs = (step + 1) % config.log_every == 0 or last
                interrupt = self.signalled()
                if num_ranks() > 1:  # all stop together, where they meet anyway
                    interrupt = (any_rank(interrupt or 0) or None) if logs else None
                saves = time.monotonic() - saved > config.checkpoint_every or last or interrupt is not None
                if logs or (saves and rank() == 0):
                    bad = int(step_once.bad)
                    bad = any_rank(bad) if logs else bad
                    if bad >= 0:
                        raise self.diverged(phase, bad + 1, good)
                if logs:
                    with bar.external_write_mode():
                        cores.look(self.folder)
                    values = {name: mean_over_ranks(value).item() for name, value in step_once.values.items()}
                    self.log(first + step + 1, phase, lr=rate, **values)
                    latest |= {name: value for name, value in values.items() if name != "gradient_norm"}
                    bar.set_postfix({name: f"{value:.4g}" for name, value in latest.items()})
                if phase == "pre-training" and step + 1 in config.score_steps and not last:
                    self.score(f"step-{step + 1}", phase, first + step + 1)
                if (step + 1) % config.eval_every == 0 and not last:
                    scored = evaluate(self.model, self.source, self.unseen[:128], 1, config)
                    self.log(first + step + 1, phase, **{f"eval_{n}": scored[n] for n in SCORES[config.task]})
                    first_two = [n for n in PERCENT if n in scored][:2]
                    latest |= {name: scored[name] for name in first_two}
                    if rank() == 0:
                        words = [f"{ERRORS[n]} {scored[n]:.4f}" for n in ERRORS if n in scored]
                        words += [f"{PERCENT[n]} {100 * scored[n]:.1f}" for n in first_two]
                        with bar.external_write_mode():
                            say(f"{phase} {step + 1:,}/{steps:,}  {self.seconds / 60:.1f} min  {'  '.join(words)}")
                if saves:
                    self.save(number, step + 1, optimizer)
                    saved, good = time.monotonic(), step + 1
                if interrupt is not None:
                    raise Interrupted(interrupt)

        self.score("before" if phase == "pre-training" else "after", phase, first + steps, number + 1)
        self.step, self.optimizer_state = 0, None

    def score(self, key: str, phase: str, step: int, next_phase: int | None = None) -> None:
        """Score the model on all scoring scenes; keep scores and weights under `key`. `next_phase` begins then."""
        scored = self.results[key] = evaluate(self.model, self.source, self.unseen, self.config.eval_draws, self.config)
        if rank() == 0:
            save_weights(self.folder / f"{key}.safetensors", self.model, self.config, scored)
        if next_phase is not None:
            self.save(next_phase, 0, None)
        self.log(step, phase, **{f"{key}_{n}": value for n, value in scored.items() if n != "by_objects"})
        when = f"{phase} at step {step:,}" if step else "at the start"
        say(f"{when} after {self.seconds / 60:.1f} min\n{table({row_name(key, self.config): scored})}")

    def log(self, step: int, phase: str, **values: Any) -> None:
        if self.metrics is not None:
            self.metrics.log(step, seconds=round(self.seconds, 1), phase=phase, **values)

    def save(self, phase: int, step: int, optimizer: Optimizer | None) -> None:
        if rank() == 0:
            save_checkpoint(self.folder, {
                "phase": phase, "step": step, "seconds": self.seconds, "results": json.dumps(self.results),
                "optimizer": None if optimizer is None else optimizer.state_dict(), "model": self.model.state_dict(),
            })  # fmt: skip

    def diverged(self, phase: str, step: int, good: int) -> Diverged:
        """What ends a run whose loss is no number at a step; its last checkpoint, if it has one, is of step `good`."""
        checkpoint, again = self.folder / "checkpoint.pt", "There is no checkpoint yet: start anew"
        if checkpoint.exists():
            again = (f"The last good checkpoint is {checkpoint}, of step {good}; continued from there the same would "
                     f"happen again: start anew in another --out")  # fmt: skip
        rate = "--lr" if phase == "pre-training" else "--fine-tune-lr"
        clip = "" if 0 < self.config.clip <= 1 else ", or with --clip 1"
        return Diverged(
            f"the loss is no longer a number at step {step} of {phase}. {again} with a smaller {rate}{clip}"
        )


def restore(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError:
        expected = model.state_dict()
        wrong = sorted(
            name for name in tensors.keys() | expected.keys()
            if name not in tensors or name not in expected or tensors[name].shape != expected[name].shape
        )  # fmt: skip
        raise UsageError(
            f"{path} holds another network's weights, perhaps an earlier version's: {len(wrong)} of "
            f"{len(expected)} tensors do not fit, such as {wrong[0]}"
        ) from None


def greeting(config: Config, phases: dict[str, int], done: int, model: nn.Module, source: Scenes) -> str:
    """What will run, and how long it should take: from three steps timed on a copy of the model."""
    trial, times = copy.deepcopy(model), {}
    optimizer = build_optimizer(trial, config)
    indices = share(torch.arange(config.batch_size) % config.num_scenes)
    pixels, _ = source.batch(indices, device=config.device)
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


def versions() -> dict[str, Any]:
    return {
        "iio_kernels": iio_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of this program, where it lies in a clone: IIO_KERNELS_COMMIT, or what Git says."""
    if named := os.environ.get("IIO_KERNELS_COMMIT"):
        return named
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------------------------------------- the pictures

#: What a task's is called.
PICTURES = {"discovery": "masks.png", "set-prediction": "objects.png"}

#: CLEVR's colours, in the order of their numbers.
COLORS = ["#575757", "#ad2323", "#2a4bd7", "#1d6914", "#814a19", "#8126c0", "#29d0d0", "#ffee33"]

#: Colours of background and objects; whatever has no counterpart in the truth takes one of the rest.
PALETTE = torch.tensor(
    [[38, 41, 48], [238, 119, 51], [0, 153, 136], [204, 51, 17], [51, 187, 238], [238, 51, 119], [187, 187, 187],
     [0, 119, 187], [221, 204, 119], [136, 34, 85], [153, 153, 51], [170, 68, 153], [68, 170, 153]]
) / 255  # fmt: skip


def draw(folder: Path, config: Config, source: Scenes) -> None:
    """The picture of a run, from its weights. Scores and weights are there already, so what stops it is a warning."""
    # The name of a backend that does not exist stops Matplotlib's import; the pictures need none.
    os.environ.pop("MPLBACKEND", None)
    draw_task = draw_masks if config.task == "discovery" else draw_objects
    unseen = torch.arange(config.num_scenes, config.num_scenes + config.eval_scenes)
    try:
        draw_task(folder, config, source, unseen[:6])
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip() or 'it says nothing'}".splitlines()[0]
        warn(f"{folder / PICTURES[config.task]} is not drawn ({reason}); to try again: {resume_command(folder)}")


@torch.no_grad()
def draw_masks(folder: Path, config: Config, source: Scenes, indices: Tensor) -> None:
    """masks.png: a column a scene; image, truth, masks after each phase, and the slots' own pictures."""
    from matplotlib.figure import Figure

    pixels, truth = source.batch(indices, device=config.device)
    panels: list[tuple[str, Tensor]] = [
        ("image", pixels.permute(0, 2, 3, 1) / 255),
        ("truth", PALETTE[truth.long().cpu()]),
    ]
    tuned = (folder / "after.safetensors").exists()
    for key, title in (
        ("before", "masks before" if tuned else "masks"),
        ("after", f"masks after {FINE_TUNING.get(config.fine_tune)}"),
    ):
        if not (folder / f"{key}.safetensors").exists():
            continue
        _, tensors = load_weights(folder / f"{key}.safetensors", config)
        model = build_model(config, source.size)
        restore(model, tensors, folder)
        noise = draw_noise(config, len(indices), model.noise_shape, -1, 0, 0)
        scene, _ = apply_model(model, pixels, noise, config)
        reconstruction, masks = scene.compose()
        colours = matched_colours(truth, masks.argmax(1), masks.shape[1])
        panels.append((title, torch.einsum("bkhw,bkc->bhwc", masks.cpu(), colours)))
    panels.append(("reconstruction", reconstruction.permute(0, 2, 3, 1) / 2 + 0.5))
    for k in range(masks.shape[1]):
        mask = masks[:, k, :, :, None]
        shown = mask * (scene.decoded[:, k, :3].permute(0, 2, 3, 1).float() / 2 + 0.5) + (1 - mask)
        panels.append((f"slot {k + 1}", shown))

    figure = Figure(figsize=(1.1 * len(indices) + 1, 1.1 * len(panels)))
    axes = figure.subplots(len(panels), len(indices), squeeze=False)
    for row, (title, images) in zip(axes, panels, strict=True):
        for axis, picture in zip(row, images.float().cpu().clamp(0, 1), strict=True):
            axis.imshow(picture.numpy())
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(title, rotation=0, ha="right", va="center")
    save_figure(figure, folder / PICTURES["discovery"])


def save_figure(figure: Any, path: Path) -> None:
    figure.tight_layout(pad=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write(path, content.getbuffer())


@torch.no_grad()
def draw_objects(folder: Path, config: Config, source: Scenes, indices: Tensor) -> None:
    """objects.png: a column a scene; the image, its objects seen from above, and those predicted.

    Colour, shape and size of a mark are the object's, its edge is thick where it is metal.
    """
    from matplotlib.figure import Figure

    pixels, _ = source.batch(indices, device=config.device)
    _, tensors = load_weights(folder / "before.safetensors", config)
    model = build_model(config, source.size)
    restore(model, tensors, folder)
    noise = draw_noise(config, len(indices), model.noise_shape, -1, 0, 0)
    predicted, _ = apply_model(model, pixels, noise, config)
    rows = {"truth": objects_of(config, source, indices).cpu(), "predicted": predicted.cpu()}

    figure = Figure(figsize=(1.6 * len(indices) + 1, 4.8))
    axes = figure.subplots(3, len(indices), squeeze=False)
    for axis, picture in zip(axes[0], pixels.cpu(), strict=True):
        axis.imshow(picture.permute(1, 2, 0).numpy())
    for row, (title, scenes) in zip(axes[1:], rows.items(), strict=True):
        row[0].set_ylabel(title, rotation=0, ha="right", va="center")
        for axis, objects in zip(row, scenes, strict=True):
            for thing in objects[objects[:, -1] > 0.5]:
                size, material, shape, color = kinds(thing)
                axis.plot(thing[0], thing[1], "so^"[shape], color=COLORS[color], markersize=(5, 9)[size],
                          markeredgecolor="black", markeredgewidth=(0.3, 1.2)[material])  # fmt: skip
            axis.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), aspect="equal")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    save_figure(figure, folder / PICTURES["set-prediction"])


def matched_colours(truth: Tensor, predicted: Tensor, num_slots: int) -> Tensor:
    """Each slot's colour (B, K, 3): that of the true entity it fits best, one to one."""
    from scipy.optimize import linear_sum_assignment

    colours = []
    for true, pred in zip(truth.long().flatten(1).cpu(), predicted.flatten(1).cpu(), strict=True):
        entities = max(int(true.max()) + 1, num_slots)
        overlap = torch.bincount(true * num_slots + pred, minlength=entities * num_slots).view(entities, num_slots)
        chosen, slots = linear_sum_assignment(overlap.numpy(), maximize=True)
        entity = torch.zeros(num_slots, dtype=torch.long)
        entity[torch.as_tensor(slots)] = torch.as_tensor(chosen)
        colours.append(PALETTE[entity % len(PALETTE)])
    return torch.stack(colours)


# ---------------------------------------------------------------------------------------------- several runs


def several(config: Config) -> bool:
    return config.seeds > 1 or config.table1


def members(config: Config, folder: Path) -> dict[str, Config]:
    """The runs that several seeds, or the paper's table 1, consist of, by their folders' names, in order."""
    alone = dataclasses.replace(config, seeds=1, table1=False, out=None)
    seeds = {f"seed{s}": dataclasses.replace(alone, seed=s) for s in range(config.seed, config.seed + config.seeds)}
    if not config.table1:
        return seeds
    steps = phase_steps(config)["pre-training"]
    length = dict(steps=4 * steps, score_steps=(steps,)) if config.long_row else dict(steps=steps)
    runs = {}
    for name, run in seeds.items():
        # One pre-training passes both lengths; both phases that follow start where it stood at the first.
        runs[f"{name}-plain"] = dataclasses.replace(run, fine_tune="none", epochs=None, **length)
        weights = folder / f"{name}-plain" / (f"step-{steps}.safetensors" if config.long_row else "before.safetensors")
        for loss in ("reconstruction", "iio"):
            runs[f"{name}-{loss}"] = dataclasses.replace(run, fine_tune=loss, steps=0, epochs=None, from_=weights)
    return runs


def run_several(
    config: Config, folder: Path, claims: ExitStack, source: Scenes, signalled: Callable[[], int | None]
) -> None:
    """Run all members one after the other, each in its folder; leave mean and standard deviation of their scores."""
    summaries, runs = {}, members(config, folder)
    for name, member in runs.items():
        within = folder / name
        if not any_rank(is_finished(within)):
            if rank() == 0 and not (within / "config.json").exists():
                open_run(dataclasses.replace(member, out=within), claims)
            say(f"\n{name}:")
            Run(member, within, source, signalled).train()
            stop_if_asked(signalled)
        if rank() == 0:
            summaries[name] = summary_of(within)
    if rank() > 0:
        return
    each: dict[str, list[dict]] = {}
    for name, summary in summaries.items():
        keys = [key for key in summary if key in KEPT or key.startswith("step-")]
        for key in keys if runs[name].steps or not config.table1 else ["after"]:
            from_ = f"step-{phase_steps(config)['pre-training']}" if config.table1 else None
            each.setdefault(row_name(key, runs[name], from_), []).append(summary[key])
    rows = {name: summed_up(scored) for name, scored in each.items()}
    over = f"{config.seeds} trainings" if config.seeds > 1 else f"{config.eval_draws} draws of the noise"
    about = {
        "config": to_json(config),
        "versions": versions(),
        "seconds": sum(s["seconds"] for s in summaries.values()),
    }
    caption = f"{config.eval_scenes:,} unseen scenes, mean ± standard deviation over {over}.\n\n"
    write(folder / "summary.md", caption + markdown(rows))
    write(folder / "summary.json", json.dumps({"rows": rows, **about}, indent=2) + "\n")
    say(f"\nScores on {config.eval_scenes:,} unseen scenes, mean ± std over {over}, after "
        f"{about['seconds'] / 60:.1f} min:\n{table(rows)}\n\n"
        f"The same, and each training's: {folder}/summary.json, summary.md")  # fmt: skip


def summary_of(folder: Path) -> dict[str, Any]:
    """The scores that a finished run left."""
    try:
        return json.loads((folder / "summary.json").read_text())
    except ValueError:
        raise UsageError(f"{folder / 'summary.json'} is damaged: delete it, and the run is scored again") from None


def summed_up(each: list[dict]) -> dict:
    """Mean and standard deviation of several trainings' scores, and each; a single one's deviation is over draws."""
    names = [name for name in each[0] if f"{name}_std" in each[0]]
    if len(each) == 1:
        return each[0] | {f"{n}_each": [each[0][n]] for n in names}
    means = {n: statistics.mean(scored[n] for scored in each) for n in names}
    deviations = {f"{n}_std": statistics.stdev(scored[n] for scored in each) for n in names}
    return means | deviations | {f"{n}_each": [scored[n] for scored in each] for n in names}


#: The names under which a run keeps the scores at the end of its phases.
KEPT = ("before", "after")


def markdown(rows: dict[str, dict]) -> str:
    """A table in Markdown, in percent but for errors; the mean squared one is that on [-1, 1]."""
    percent, errors = shown(rows)
    headings = [PERCENT[n] for n in percent] + [ERRORS[n] for n in errors]
    lines = [f"| | {' | '.join(headings)} |", "|---" * (1 + len(headings)) + "|"]
    for name, scored in rows.items():
        cells = [f"{100 * scored[n]:.1f} ± {100 * scored[f'{n}_std']:.1f}" for n in percent]
        cells += [f"{scored[n]:.4f}" for n in errors]
        lines.append(f"| {name.strip()} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------- main


def score_only(config: Config) -> None:
    """Score given weights on the scoring scenes, or, of a file they were not trained on and that is too short to have
    any, on its first.

    With --out the scores are left there, too, as scores.json.
    """
    if config.out is not None and rank() == 0:
        try:
            config.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=config.out).close()
        except OSError as error:
            raise UsageError(f"--out: cannot write to {config.out}: {error.strerror}") from None
    results = {}
    for path in pretrained(config) if str(config.eval_only) == "pretrained" else [config.eval_only]:
        config, tensors = load_weights(path, config)
        source = open_scenes(config)
        first = config.num_scenes
        if len(source) < first + config.eval_scenes:
            if scenes_seen(read_weights(path)[1], config):
                raise UsageError(
                    f"--eval-scenes {config.eval_scenes}: {config.data} holds {len(source):,} scenes, and "
                    f"{path.name} was trained on the first {first:,}; expected at most {len(source) - first}"
                )
            first = 0
        indices = torch.arange(first, min(first + config.eval_scenes, len(source)))
        model = build_model(config, source.size)
        restore(model, tensors, path)
        name = [path.name, NAMES[config.model], f"K {config.num_slots}"]
        name += [] if config.iterations is None else [f"T {config.iterations}"]
        results[", ".join(name)] = evaluate(model, source, indices, config.eval_draws, config)
    try:
        if config.out is not None and rank() == 0:
            kept = {"rows": results, "config": to_json(config), "versions": versions()}
            write(config.out / "scores.json", json.dumps(kept, indent=2) + "\n")
    finally:
        say(f"Scores on {len(indices):,} scenes from number {first:,} on, mean ± std over {config.eval_draws} draws of "
            f"the noise:\n{table(results)}")  # fmt: skip


def leave(words: str, exit_code: int) -> None:
    say(words, file=sys.stderr)
    if rank() > 0:
        time.sleep(3)  # torchrun kills the others as soon as one has left: let the first speak
    sys.exit(exit_code)


def main() -> None:
    open_standard_streams()
    given = tyro.cli(Config)
    keep_freed_memory()
    folder = None
    try:
        if given.resume is not None:
            config, folder = reopen_run(given)
        else:
            config = resolve(given)
        meet_other_ranks(config)
        if config.eval_only is not None:
            return score_only(config)
        # All that can be refused is refused before a new run's folder is made.
        if config.from_ is not None:
            load_weights(config.from_, config)
        with ExitStack() as claims:
            if folder is not None and rank() == 0 and not claim(folder, claims):
                raise UsageError(f"--resume: another process trains in {folder}")
            source = open_scenes(config)
            if folder is None:
                try:
                    folder = same_on_all_ranks(open_run(config, claims) if rank() == 0 else None)
                except OSError as error:
                    raise UsageError(f"--out: cannot write to {error.filename}: {error.strerror}") from None
            with deferred_signals() as signalled:
                if any_rank(is_finished(folder)):
                    if rank() == 0:
                        draw(folder, config, source)
                elif several(config):
                    run_several(config, folder, claims, source, signalled)
                else:
                    Run(config, folder, source, signalled).train()
        if dist.is_initialized():
            dist.destroy_process_group()
    except Interrupted as stop:
        say(f"\nInterrupted; all is saved. To continue: {resume_command(folder)}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        leave(f"\ntrain.py: interrupted{to_continue(folder)}", 130)
    except Diverged as error:
        leave(f"train.py: {error}", 1)
    except RuntimeError as error:
        if num_ranks() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason, going_on = str(error).splitlines()[0], "" if folder is None else (
            f" The last checkpoint is whole: continue with {resume_command(folder)}, on as many processes as you like"
        )  # fmt: skip
        print(f"train.py: process {rank()} of {num_ranks()} lost another one ({reason}).{going_on}", file=sys.stderr)
        sys.exit(1)
    except (UsageError, DataError) as error:
        leave(f"train.py: {error}", 2)
    except OSError as error:  # the disk is full, for one
        leave(f"train.py: {error}{to_continue(folder)}", 2)


if __name__ == "__main__":
    main()
