"""What a training is asked for: the options of `train.py`, in the groups in which `--help` shows them."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from data import DATASETS
from models import MODELS, Task
from models.slot_attention import ABLATIONS
from training.networks import NETWORKS

T = TypeVar("T")
#: An option that the preset sets where it is left out.
ByPreset = Annotated[T | None, tyro.conf.arg(help_behavior_hint="(default: the preset's)")]


class UsageError(Exception):
    """The run cannot start as asked, for a reason the user can mend: one line, no traceback."""


@dataclass(frozen=True)
class TaskOptions:
    """What is learnt, how long, and whether it is."""

    task: Task = "discovery"
    """discovery: segment scenes by reconstructing them from slots, without labels. set-prediction: learn the properties
    of all objects of a scene from labels, and nothing of their order."""
    fine_tune: Literal["none", "iio", "reconstruction"] = "none"
    """What follows the pre-training on the reconstruction error: nothing; the IIO loss plus --hinge-scale times the
    reconstruction error while that is over --margin; or, to compare that with, the reconstruction error alone, with
    the same fresh optimizer, rate and warm-up."""
    preset: Literal["auto", "paper", "quick", "smoke"] = "auto"
    """paper: the published model and schedule (of Slot Attention on Tetrominoes 60,000 scenes, 50 + 5 epochs). quick: a
    smaller one in small batches, most with Muon, at most 20 minutes on two CPU cores with bfloat16 products. smoke:
    every phase within a minute, to test the program; it learns nothing. auto: paper on a GPU, quick on a CPU. The
    model's file in models/ has each."""
    epochs: ByPreset[float] = None
    """Passes over the training scenes in pre-training."""
    fine_tune_epochs: ByPreset[float] = None
    """Passes over the training scenes in fine-tuning."""
    steps: ByPreset[int] = None
    """Steps of pre-training, instead of --epochs."""
    fine_tune_steps: ByPreset[int] = None
    """Steps of fine-tuning, instead of --fine-tune-epochs."""
    seed: int = 0
    """Of the order of the scenes, the initial weights and the noise. The scenes are the same for every seed."""
    seeds: int = 1
    """Train this many times, with --seed and the seeds after it, and give mean and standard deviation of the scores."""
    table1: bool = False
    """Train what table 1 of the IIO paper compares, from the same pre-training: the preset's fine-tuning (50 + 5
    epochs), as many steps of --fine-tune reconstruction instead (55 epochs), and pre-training 4 times as long (200)."""
    long_row: bool = True
    """Of --table1: the pre-training 4 times as long, three quarters of its time; --no-long-row leaves it out."""
    eval_only: Path | None = None
    """Score these weights (.safetensors) and train nothing; `pretrained`: those that come with this. They know task,
    model and sizes; --dataset is to be given."""


@dataclass(frozen=True)
class DataOptions:
    """Which scenes."""

    dataset: Literal[tuple(DATASETS)] = "tetrominoes"
    """What to train on. Without --data the scenes are generated, where they can be."""
    data: Path | None = None
    """A file of the data set: DeepMind's .tfrecords as published, or .npz with `image` and `mask`. Of clevr the folder
    with its images and scenes."""
    num_scenes: ByPreset[int] = None
    """Scenes to train on: the first of the data set."""
    eval_scenes: ByPreset[int] = None
    """Scenes to score: those that follow the training scenes."""
    eval_draws: int = 5
    """Scores are mean and standard deviation over this many draws of the noise, that is of the initial slots or latent
    variables."""


@dataclass(frozen=True)
class ModelOptions:
    """Which network, and from which weights it starts. A model takes the options that it has and refuses the others."""

    model: Annotated[
        Literal[tuple(MODELS)] | None, tyro.conf.arg(help_behavior_hint="(default: the weights', or slot-attention)")
    ] = None
    """slot-attention: Locatello et al. 2020. slot-mlp: their baseline, an MLP in place of Slot Attention. iodine: Greff
    et al. 2019, and monet: Burgess et al. 2019, both for discovery alone. dspn: Zhang et al. 2019, for set
    prediction. models/ has a file for each."""
    network_of: Annotated[
        Literal[NETWORKS] | None, tyro.conf.arg(help_behavior_hint="(default: what fits the data set)")
    ] = None
    """Discovery: the network as it is published for this data set. clevr6's decoder of Slot Attention and Slot MLP
    makes 128 x 128 pixels."""
    num_slots: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: the data set's)")] = None
    """K, the number of slots: as many as a scene of the data set can have entities, or for set prediction objects.
    With --eval-only, another number than in training."""
    iterations: ByPreset[int] = None
    """T, the rounds of Slot Attention or of IODINE's inference, or DSPN's steps of descent. With --eval-only, another
    number than in training."""
    slot_size: ByPreset[int] = None
    """D, the width of slots, or of a slot's latent variable; of DSPN's representation of a set."""
    channels: ByPreset[int] = None
    """Width of the convolutions; of DSPN's ResNet, the first stage."""
    kernel_size: ByPreset[int] = None
    """Size of the convolutions, odd; IODINE's refinement network has its own."""
    input_size: ByPreset[int] = None
    """Width of the encoder's MLP, which makes the inputs to Slot Attention or Slot MLP; of the convolutions of IODINE's
    refinement network."""
    pixel_sigma: ByPreset[float] = None
    """IODINE and MONet: standard deviation of a pixel, for images in [0, 1]; of MONet's first slot --background-sigma.
    IODINE's paper compares with a MONet of 0.1 and 0.06."""
    background_sigma: ByPreset[float] = None
    """MONet: standard deviation of a pixel under the first slot."""
    iodine_source: ByPreset[Literal["text", "program"]] = None
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
    downsample: ByPreset[int] = None
    """Set prediction: the image has this many times as many rows as the features, 1, 2, 4 or 8."""
    initial_weights: ByPreset[Literal["own", "keras", "sonnet"]] = None
    """By which rule weights are drawn: as models/ has it (He's in Slot Attention's encoder, Glorot's in DSPN, otherwise
    PyTorch's), or the default of Keras or Sonnet, in which the papers' programs are written; see
    models/initial_weights.py."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Start from these weights (.safetensors) instead of from scratch, with their architecture."""
    from_pretrained: bool = False
    """Start from the weights that come with this, pre-trained on the data set, instead of pre-training."""


@dataclass(frozen=True)
class OptimizationOptions:
    """How the weights are found."""

    batch_size: ByPreset[int] = None
    """Scenes in a step, over all processes."""
    optimizer: ByPreset[Literal["adam", "rmsprop", "muon"]] = None
    """adam or, of MONet, rmsprop, as published; or muon: Muon for hidden matrices and convolutions, Adam for the rest,
    at one rate."""
    lr: ByPreset[float] = None
    """Peak learning rate in pre-training."""
    half_life: ByPreset[int] = None
    """Steps in which the learning rate of each phase falls by half."""
    warmup_steps: ByPreset[int] = None
    """Steps over which the learning rate of pre-training rises linearly from 0, while it decays, too."""
    fine_tune_lr: ByPreset[float] = None
    """Peak learning rate in fine-tuning."""
    fine_tune_warmup_steps: ByPreset[int] = None
    """The same of fine-tuning, which begins with a fresh optimizer; short, since fine-tuning is."""
    clip: ByPreset[float] = None
    """Largest norm of the gradient of a step; 0 does not clip."""
    stepwise_loss: bool = False
    """Set prediction: the loss after every iteration, not the last alone."""
    coordinate_scale: float = 1.0
    """Set prediction: factor on coordinates in the loss; a larger one asks for more exact places."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of convolutions and linear layers; attention, losses and weights are float32 always. auto: bf16 in quick and
    smoke where the hardware multiplies it, otherwise fp32."""
    cuda_graph: bool = True
    """On a GPU, with one process: capture the whole step as a CUDA graph and replay it. --no-cuda-graph launches each
    kernel, to find out where something goes wrong."""


@dataclass(frozen=True)
class IIOOptions:
    """The loss of --fine-tune iio."""

    margin: ByPreset[float] = None
    """Fine-tuning leaves the reconstruction error (mean over batch, pixels and channels on [-1, 1]) alone while it is
    at most this."""
    hinge_scale: ByPreset[float] = None
    """Factor on the reconstruction error in fine-tuning while it is over the margin."""
    sigma: float = 5.0
    """Standard deviation of the IIO loss's Gaussian, in pixels."""
    iio_kernel_size: int = 11
    """How many pixels wide that Gaussian is cut off, odd."""
    repeats: int = 2
    """How often it is applied."""
    terms: Literal["sum", "mean"] = "sum"
    """Each mask's terms of the IIO loss, one for every set of others: their sum, as published, or their mean."""


@dataclass(frozen=True)
class OutputOptions:
    """What is kept, where and how often."""

    out: Path | None = None
    """Folder of the run, by default one in runs/ that is named by model, data set, preset and seed. With --eval-only,
    where to leave scores.json."""
    resume: Path | None = None
    """Folder of an interrupted run, to continue with its own options."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 1000
    """Steps between scores on the first 128 scoring scenes, in the course of training."""
    checkpoint_every: float = 60.0
    """Seconds between checkpoints."""
    score_steps: tuple[int, ...] = ()
    """Steps of pre-training after which it is scored and its weights are kept, besides its end."""


@dataclass(frozen=True)
class Config(TaskOptions, DataOptions, ModelOptions, OptimizationOptions, IIOOptions, OutputOptions):
    """Train a slot model on scenes of several objects; fine-tune its masks with Interaction Information Optimization.

    Options left out are set by the preset, which `--preset auto` (the default) chooses by the device. An interrupted
    run prints the command that resumes it.
    """


def from_command_line(args: list[str] | None = None) -> Config:
    """The options that the program is called with, or those given."""
    groups = {base.__name__.removesuffix("Options"): base for base in Config.__bases__}
    fields = [(name, group, dataclasses.field(default=group())) for name, group in groups.items()]
    grouped = dataclasses.make_dataclass("grouped", fields)
    description = inspect.cleandoc(Config.__doc__)
    given = tyro.cli(grouped, args=args, description=description, config=(tyro.conf.OmitArgPrefixes,))
    return Config(**{name: value for group in groups for name, value in vars(getattr(given, group)).items()})


def changed_fields(config: Config) -> list[str]:
    """The fields that are not at their defaults, in the order of the groups."""
    fields = [field for group in Config.__bases__ for field in dataclasses.fields(group)]
    return [field.name for field in fields if getattr(config, field.name) != field.default]


def option(field: str) -> str:
    """The command-line option of a field of `Config`."""
    return "--" + field.rstrip("_").replace("_", "-")


def to_json(config: Config) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def several(config: Config) -> bool:
    """Whether a configuration is one of several runs."""
    return config.seeds > 1 or config.table1
