"""Train a slot model, fine-tune its masks with the IIO loss, score it on unseen scenes.

    python train.py --dataset tetrominoes --fine-tune iio            # the preset fits the machine
    python train.py --resume runs/tetrominoes-quick-iio-seed0        # continue an interrupted run
    python train.py --eval-only runs/.../after.safetensors --data tetrominoes_train.tfrecords

The file reads top to bottom: configuration, the run's folder, the model and its losses, the scores, the loop, the
picture, and `main`, which calls them in that order. Every random number of a run is a function of its seed and the
step, so a resumed run ends with the weights of one that was never interrupted.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import pickle
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from tqdm import tqdm

import iio_kernels
from data import DataError, Scenes, TetrominoesGenerator, load, scores
from models.slot_attention import Scene, SlotAttentionAutoEncoder

# ---------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config:
    """Train Slot Attention on scenes of several objects; fine-tune it with Interaction Information Optimization.

    Options left out are set by the preset, which `--preset auto` (the default) chooses by the device. An interrupted
    run prints the command that resumes it.
    """

    dataset: Literal["tetrominoes"] = "tetrominoes"
    """What to train on. Without --data the scenes are generated, alike in kind to the published ones."""
    data: Path | None = None
    """A file of the data set: DeepMind's .tfrecords as published, or .npz with `image` and `mask`."""
    fine_tune: Literal["none", "iio"] = "none"
    """What follows the pre-training on the reconstruction error: nothing, or the IIO loss plus --hinge-scale times the
    reconstruction error while that is over --margin."""
    preset: Literal["auto", "paper", "quick", "smoke"] = "auto"
    """paper: the published model and schedule (60,000 scenes, 50 + 5 epochs). quick: 3x3 convolutions, small batches
    and Muon, at most 20 minutes on two CPU cores with bfloat16 products. smoke: every phase within a minute, to test
    the program; it learns nothing. auto: paper on a GPU, quick on a CPU."""

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
    """Scores are mean and standard deviation over this many draws of the initial slots."""

    num_slots: int = 4
    """K, the number of slots."""
    iterations: int = 3
    """T, the rounds of Slot Attention."""
    channels: int | None = None
    """Width of the convolutions."""
    kernel_size: int | None = None
    """Size of the convolutions, odd."""
    input_size: int | None = None
    """Width of the encoder's MLP, which makes the inputs to Slot Attention."""

    batch_size: int | None = None
    """Scenes in a step."""
    optimizer: Literal["adam", "muon"] | None = None
    """adam, as published; or muon: Muon for hidden matrices and convolutions, Adam for the rest, at one rate."""
    lr: float | None = None
    """Peak learning rate in pre-training."""
    half_life: int | None = None
    """Steps in which the learning rate of each phase falls by half."""
    warmup_steps: int | None = None
    """Steps over which the learning rate of each phase rises linearly from 0."""
    fine_tune_lr: float | None = None
    """Peak learning rate in fine-tuning."""
    clip: float | None = None
    """Largest norm of the gradient of a step; 0 does not clip."""
    margin: float | None = None
    """Fine-tuning leaves the reconstruction error (mean over batch, pixels and channels on [-1, 1]) alone while it is
    at most this."""
    hinge_scale: float | None = None
    """Factor on the reconstruction error in fine-tuning while it is over the margin."""

    seed: int = 0
    """Of the order of the scenes, the initial weights and the initial slots. The scenes are the same for every seed."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of convolutions and linear layers; attention, losses and weights are float32 always. auto: bf16 in quick and
    smoke where the hardware multiplies it, otherwise fp32."""

    out: Path | None = None
    """Folder of the run, by default runs/DATASET-PRESET[-iio]-seedSEED."""
    resume: Path | None = None
    """Folder of an interrupted run, to continue with its own options."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Start from these weights (.safetensors) instead of from scratch, with their architecture."""
    eval_only: Path | None = None
    """Score these weights (.safetensors) and train nothing."""

    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 1000
    """Steps between scores on the first 128 scoring scenes, in the course of training."""
    checkpoint_every: float = 60.0
    """Seconds between checkpoints."""


PRESETS: dict[str, dict[str, Any]] = {
    # Slot Attention's supplement, section E, and the IIO paper.
    "paper": dict(
        epochs=50, fine_tune_epochs=5, num_scenes=60_000, eval_scenes=1000,
        channels=32, kernel_size=5, input_size=32, batch_size=64,
        optimizer="adam", lr=4e-4, fine_tune_lr=4e-4, warmup_steps=10_000, half_life=100_000, clip=0.0,
        margin=4e-4, hinge_scale=1e3,
    ),
    # The lowest error in 20 minutes of what was tried (bench/README.md). The loss and its hinge are the paper's.
    "quick": dict(
        steps=5000, fine_tune_steps=4500, num_scenes=60_000, eval_scenes=320,
        channels=32, kernel_size=3, input_size=64, batch_size=16,
        optimizer="muon", lr=1e-3, fine_tune_lr=5e-4, warmup_steps=100, half_life=2500, clip=1.0,
        margin=4e-4, hinge_scale=1e3,
    ),
    "smoke": dict(
        steps=20, fine_tune_steps=10, num_scenes=256, eval_scenes=32,
        channels=8, kernel_size=3, input_size=8, batch_size=8,
        optimizer="muon", lr=1e-3, fine_tune_lr=5e-4, warmup_steps=5, half_life=20, clip=1.0,
        margin=4e-4, hinge_scale=1e3,
    ),
}  # fmt: skip


class UsageError(Exception):
    """The run cannot start as asked, for a reason the user can mend: one line, no traceback."""


def resolve(config: Config) -> Config:
    """Fill in what the preset decides, and refuse what cannot run before any work starts."""
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else (
            torch.device(config.device)
        )  # fmt: skip
    except RuntimeError:
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, got {config.device!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, got {config.device!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")

    preset = config.preset if config.preset != "auto" else ("paper" if device.type == "cuda" else "quick")
    defaults = dict(PRESETS[preset])
    for epochs, steps in (("epochs", "steps"), ("fine_tune_epochs", "fine_tune_steps")):
        given = [name for name in (epochs, steps) if getattr(config, name) is not None]
        if len(given) == 2:
            raise UsageError(f"{option(steps)} and {option(epochs)} exclude each other")
        if given:
            defaults.pop(epochs, None), defaults.pop(steps, None)
    defaults = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if preset != "paper" and multiplies_bfloat16(device) else "fp32"
    config = dataclasses.replace(config, **defaults, preset=preset, device=str(device), precision=precision)

    for name in ("num_scenes", "eval_scenes", "eval_draws", *ARCHITECTURE, "batch_size", "half_life",
                  "log_every", "eval_every"):  # fmt: skip
        if not getattr(config, name) >= 1:
            raise UsageError(f"{option(name)}: expected at least 1, got {getattr(config, name)}")
    for name in ("epochs", "fine_tune_epochs", "steps", "fine_tune_steps", "lr", "fine_tune_lr", "warmup_steps",
                 "clip", "margin", "hinge_scale", "checkpoint_every"):  # fmt: skip
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{option(name)}: expected a number >= 0, got {value}")
    if config.kernel_size % 2 == 0 or config.kernel_size < 1:
        raise UsageError(f"--kernel-size: expected an odd number, got {config.kernel_size}")
    if config.fine_tune == "iio" and not 2 <= config.num_slots <= 16:
        raise UsageError(f"--num-slots: the IIO loss takes 2 to 16 masks, got {config.num_slots}")
    if not 0 <= config.seed < 2**31:
        raise UsageError(f"--seed: expected a number in [0, 2**31), got {config.seed}")
    if precision == "bf16" and not multiplies_bfloat16(device):
        raise UsageError(f"--precision bf16: {device.type} has no bfloat16 arithmetic here; use fp32")
    return config


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
    if config.fine_tune == "iio":
        phases["fine-tuning"] = steps(config.fine_tune_steps, config.fine_tune_epochs)
    return phases


# ---------------------------------------------------------------------------------------------- the run's folder


def write(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all: a reader, or a kill at any moment, never meets half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def to_json(config: Config) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def open_run(config: Config) -> Path:
    """Make the run's folder. Results that are there are never overwritten."""
    folder = config.out
    if folder is None:
        name = f"{config.dataset}-{config.preset}{'-iio' if config.fine_tune == 'iio' else ''}-seed{config.seed}"
        folder, number = Path("runs", name), 2
        while (folder / "summary.json").exists():
            folder, number = Path("runs", f"{name}-{number}"), number + 1
    if (folder / "checkpoint.pt").exists() and not (folder / "summary.json").exists():
        raise UsageError(f"{folder} holds an unfinished run: continue it with {resume_command(folder)}, "
                         f"or choose another --out")  # fmt: skip
    if (folder / "summary.json").exists():
        raise UsageError(f"{folder} holds a finished run: choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "config.json", json.dumps(to_json(config), indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"--out: cannot write to {folder}: {error.strerror}") from None
    return folder


def reopen_run(given: Config) -> tuple[Config, Path]:
    """The configuration and folder of the run that --resume names."""
    folder = given.resume
    others = [f.name for f in dataclasses.fields(Config) if getattr(given, f.name) != f.default and f.name != "resume"]
    if others:
        raise UsageError(f"--resume continues a run with its own options: leave out {', '.join(map(option, others))}")
    if (folder / "summary.json").exists():
        raise UsageError(f"--resume: {folder} is finished; its scores are in {folder / 'summary.json'}")
    try:
        saved = json.loads((folder / "config.json").read_text())
        saved |= {name: Path(saved[name]) for name in ("data", "out", "from_") if saved[name] is not None}
        return Config(**saved), folder
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"--resume: {folder} holds no run ({error})") from None


def resume_command(folder: Path) -> str:
    return f"python train.py --resume {shlex.quote(str(folder))}"


def save_weights(path: Path, model: SlotAttentionAutoEncoder, config: Config, results: dict) -> None:
    """Weights as safetensors, with what is needed to build the model again."""
    about = {"architecture": json.dumps(architecture(config)), "scores": json.dumps(results)}
    write(path, to_safetensors({k: v.contiguous() for k, v in model.state_dict().items()}, about))


def load_weights(path: Path, config: Config) -> tuple[Config, dict[str, Tensor]]:
    """Weights, and the configuration with their architecture in it."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        shape = json.loads(about["architecture"])
        return dataclasses.replace(config, **{name: int(shape[name]) for name in ARCHITECTURE}), tensors
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{path} holds no weights of a run ({error})") from None


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    temporary = folder / "checkpoint.pt.tmp"
    torch.save(state, temporary)
    os.replace(temporary, folder / "checkpoint.pt")


def load_checkpoint(path: Path, config: Config) -> dict[str, Any]:
    try:
        # weights_only: a checkpoint is data, and one from a stranger cannot run code.
        state = torch.load(path, map_location=config.device, weights_only=True)
    except (EOFError, RuntimeError, pickle.UnpicklingError):
        raise UsageError(f"{path} is not a checkpoint of a run: it is damaged, or holds more than tensors") from None
    if not state.keys() >= {"phase", "step", "seconds", "results", "optimizer", "model"} or (
        state["optimizer"] is not None and "adam" not in state["optimizer"]
    ):
        raise UsageError(f"{path} was written by another version of train.py: continue the run with that version")
    return state


class Metrics:
    """metrics.jsonl, one line a logged step, and TensorBoard's event file where TensorBoard is installed."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            # What a killed run logged after its last checkpoint is about to be logged again.
            lines = [line for line in self.path.read_text().splitlines(True) if line.endswith("}\n")]
            write(self.path, "".join(line for line in lines if json.loads(line)["step"] <= step))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.board = None
        else:
            self.board = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, step: int, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                if not isinstance(value, str):
                    self.board.add_scalar(name, value, step)


# ---------------------------------------------------------------------------------------------- data, model, losses


def open_scenes(config: Config) -> Scenes:
    """The data set: training scenes first, scoring scenes behind them."""
    if config.data is None:
        return TetrominoesGenerator(config.num_scenes + config.eval_scenes)
    try:
        source = load(config.data, dataset=config.dataset)
    except OSError as error:
        raise UsageError(f"--data: {error}") from None
    needed = config.num_scenes + config.eval_scenes
    if config.eval_only is None and len(source) < needed:
        raise UsageError(
            f"--data: {config.data} holds {len(source):,} scenes, and --num-scenes {config.num_scenes} with "
            f"--eval-scenes {config.eval_scenes} take {needed:,}: lower them"
        )
    return source


class Order:
    """Which scenes each step sees: a fresh permutation every epoch, by seed and step alone."""

    def __init__(self, config: Config) -> None:
        self.seed, self.length, self.batch_size = config.seed, config.num_scenes, config.batch_size
        self.epoch, self.permutation = -1, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return torch.stack([self._scene(position) for position in positions])

    def _scene(self, position: int) -> Tensor:
        epoch, place = divmod(position, self.length)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(hash_seed(self.seed, epoch))
            self.epoch, self.permutation = epoch, torch.randperm(self.length, generator=generator)
        return self.permutation[place]


def hash_seed(*numbers: int) -> int:
    """One seed for several numbers: neighbouring seeds and steps must not give related random streams."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")


#: What `SlotAttentionAutoEncoder` takes from a `Config`, and weights carry with them.
ARCHITECTURE = ("channels", "kernel_size", "input_size", "num_slots", "iterations")


def architecture(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ARCHITECTURE}


def build_model(config: Config, resolution: tuple[int, int]) -> SlotAttentionAutoEncoder:
    torch.manual_seed(hash_seed(config.seed, 0))
    model = SlotAttentionAutoEncoder(resolution, **architecture(config))
    return model.to(config.device, memory_format=torch.channels_last)


def apply_model(model: SlotAttentionAutoEncoder, pixels: Tensor, config: Config, *seed: int) -> tuple[Scene, Tensor]:
    """What the model makes of images (uint8, B 3 H W), and those images in [0, 1]. `seed` draws the initial slots."""
    generator = torch.Generator(config.device).manual_seed(hash_seed(config.seed, *seed))
    image = pixels / 255
    with torch.autocast(image.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        return model(image * 2 - 1, generator=generator), image


def losses(scene: Scene, image: Tensor, phase: str, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a phase, and its parts for the log."""
    error = F.mse_loss(scene.reconstruction, image * 2 - 1)
    if phase == "pre-training":
        return error, {"mse": error}
    iio = iio_kernels.iio_loss(image, scene.masks)
    # The IIO loss alone would let go of the image: the hinge brings the error back whenever it leaves the margin.
    hinge = torch.where(error > config.margin, config.hinge_scale * error, 0.0)
    return iio + hinge, {"mse": error, "iio": iio}


class Optimizer:
    """Adam for all parameters; or Muon for the hidden matrices, and Adam for the rest.

    Muon (Jordan et al. 2024) replaces a matrix's averaged gradient by roughly the nearest semi-orthogonal one, so that
    directions in which the gradient is small are learnt as fast as others; it does so in bfloat16 always. A
    convolution's weight is the matrix (out, k * k * in). Each step is scaled to the size of one of Adam's (Liu et al.
    2025), so both take the same learning rate.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        muon = [p for p in model.parameters() if config.optimizer == "muon" and self.is_hidden_matrix(p)]
        adam = [p for p in model.parameters() if not any(p is matrix for matrix in muon)]
        self.matrices = [(p, nn.Parameter(self.as_matrix(p.detach()))) for p in muon]
        self.parts: dict[str, torch.optim.Optimizer] = {
            "adam": torch.optim.Adam(adam, betas=(0.9, 0.999), eps=1e-8, fused=True)
        }
        if muon:
            matrices = [matrix for _, matrix in self.matrices]
            self.parts["muon"] = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @staticmethod
    def is_hidden_matrix(parameter: Tensor) -> bool:
        """More than 4 rows and columns: no vector, nor a map from the 4 coordinates, nor that to RGB and alpha."""
        return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) > 4

    @staticmethod
    def as_matrix(tensor: Tensor) -> Tensor:
        """A view (out, in), or (out, k * k * in) of a convolution's weight, which must be channels last."""
        return tensor if tensor.ndim == 2 else tensor.permute(0, 2, 3, 1).view(tensor.shape[0], -1)

    def step(self, rate: float) -> None:
        for parameter, matrix in self.matrices:
            matrix.grad = None if parameter.grad is None else self.as_matrix(parameter.grad)
        for part in self.parts.values():
            for group in part.param_groups:
                group["lr"] = rate
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def learning_rate(step: int, peak: float, config: Config) -> float:
    """Linear warm-up times exponential decay."""
    return peak * min(1.0, (step + 1) / max(1, config.warmup_steps)) * 0.5 ** (step / config.half_life)


# ---------------------------------------------------------------------------------------------- scores

SCORES = ("ari", "fg_ari", "miou", "mbo", "mse")


@torch.no_grad()
def evaluate(model: SlotAttentionAutoEncoder, source: Scenes, indices: Tensor, draws: int, config: Config) -> dict:
    """Scores of the masks' argmax, mean over scenes: {"ari": mean over draws, "ari_std": ..., "fg_ari": ...}."""
    results: dict[str, list[float]] = {name: [] for name in SCORES}
    for draw in range(draws):
        parts: dict[str, list[Tensor]] = {name: [] for name in SCORES}
        for i, chunk in enumerate(indices.split(64)):
            pixels, truth = source.batch(chunk, device=config.device)
            scene, image = apply_model(model, pixels, config, -1, draw, i)
            sizes = dict(num_true=source.num_entities, num_pred=scene.masks.shape[1])
            predicted = scene.masks.argmax(1)
            parts["ari"].append(scores.adjusted_rand_index(truth, predicted, **sizes))
            parts["fg_ari"].append(scores.adjusted_rand_index(truth, predicted, **sizes, ignore_background=True))
            parts["miou"].append(scores.mean_iou(truth, predicted, **sizes))
            parts["mbo"].append(scores.mean_best_overlap(truth, predicted, **sizes))
            parts["mse"].append(scores.mean_squared_error(scene.reconstruction, image * 2 - 1))
        for name, values in parts.items():
            results[name].append(torch.cat(values).double().mean().item())
    summary = {}
    for name, values in results.items():
        mean = sum(values) / draws
        summary[name] = mean
        summary[name + "_std"] = math.sqrt(sum((v - mean) ** 2 for v in values) / draws)
    return summary


def table(results: dict[str, dict], config: Config) -> str:
    """The scores as table 1 of the IIO paper prints them, in percent."""
    phases = phase_steps(config)
    names = {"before": f"Slot Attention, {phases['pre-training']:,} steps",
             "after": f"  + IIO, {phases.get('fine-tuning', 0):,} steps"}  # fmt: skip
    lines = [f"{'':36}{'ARI':>14}{'FG-ARI':>14}{'mIoU':>14}{'MSE':>10}"]
    for key, scored in results.items():
        cells = [f"{100 * scored[n]:.2f} ± {100 * scored[n + '_std']:.2f}" for n in ("ari", "fg_ari", "miou")]
        lines.append(f"{names.get(key, key):36}" + "".join(f"{c:>14}" for c in cells) + f"{scored['mse']:>10.4f}")
    return "\n".join(lines)


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


class Diverged(Exception):
    """The loss is no longer a number."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM came, and the run's state is saved."""

    def __init__(self, signum: int) -> None:
        self.exit_code = 128 + signum


@contextmanager
def deferred_signals() -> Iterator[Callable[[], int | None]]:
    """Ctrl-C and SIGTERM wait for the end of the step, where the state is whole; a second one does not wait."""
    received: list[int] = []

    def remember(signum: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signum)

    previous = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class Run:
    """A run of all phases in its folder, from the last checkpoint if the folder holds one."""

    def __init__(self, config: Config, folder: Path, source: Scenes, weights: dict[str, Tensor] | None) -> None:
        self.begun = time.monotonic()
        self.config, self.folder, self.source, self.phases = config, folder, source, phase_steps(config)
        self.model, self.order = build_model(config, source.size), Order(config)
        if weights is not None:
            restore(self.model, weights, config.from_)
        self.unseen = torch.arange(config.num_scenes, config.num_scenes + config.eval_scenes)
        state: dict[str, Any] = {"phase": 0, "step": 0, "seconds": 0.0, "results": "{}", "optimizer": None}
        if (folder / "checkpoint.pt").exists():
            state = load_checkpoint(folder / "checkpoint.pt", config)
            restore(self.model, state["model"], folder / "checkpoint.pt")
        self.phase, self.step, self.optimizer_state = state["phase"], state["step"], state["optimizer"]
        self.seconds_before, self.results = state["seconds"], json.loads(state["results"])
        done = sum(list(self.phases.values())[: self.phase]) + self.step
        self.metrics = Metrics(folder, done)
        print(greeting(config, self.phases, done, self.model, source), flush=True)

    @property
    def seconds(self) -> float:
        """What the run has taken, without the time in which it was interrupted."""
        return self.seconds_before + time.monotonic() - self.begun

    def train(self) -> None:
        """Train what is left of the phases; leave scores, weights and picture."""
        with deferred_signals() as signalled:
            for number in range(self.phase, len(self.phases)):
                self.train_phase(number, signalled)
                if (interrupt := signalled()) is not None and number + 1 < len(self.phases):
                    raise Interrupted(interrupt)
        draw_masks(self.folder, self.config, self.source, self.unseen[:6])
        summary = {**self.results, "config": to_json(self.config), "versions": versions(),
                   "seconds": round(self.seconds, 1)}  # fmt: skip
        write(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        print(f"\nScores on {len(self.unseen):,} unseen scenes, mean ± std over {self.config.eval_draws} draws of the "
              f"initial slots, after {self.seconds / 60:.1f} min:\n{table(self.results, self.config)}\n\n"
              f"Picture, scores and weights: {self.folder}/masks.png, summary.json, *.safetensors")  # fmt: skip

    def train_phase(self, number: int, signalled: Callable[[], int | None]) -> None:
        """Train one phase from `self.step` to its end, and score it."""
        config, model = self.config, self.model
        phase, steps = list(self.phases.items())[number]
        first = sum(list(self.phases.values())[:number])
        peak = config.lr if phase == "pre-training" else config.fine_tune_lr
        optimizer = Optimizer(model, config)
        if self.optimizer_state is not None:
            optimizer.load_state_dict(self.optimizer_state)
        # The first step whose loss or gradient was no number, kept on the device: looking would wait for it.
        bad = torch.full((), -1, device=config.device)
        saved, good, shown = time.monotonic(), self.step, {}
        with tqdm(total=steps, initial=self.step, desc=phase, unit="step", disable=not sys.stderr.isatty()) as bar:
            for step in range(self.step, steps):
                rate = learning_rate(step, peak, config)
                pixels, _ = self.source.batch(self.order(first + step), device=config.device)
                scene, image = apply_model(model, pixels, config, number, step)
                loss, parts = losses(scene, image, phase, config)
                model.zero_grad()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
                optimizer.step(rate)
                bad = torch.where((bad < 0) & ~(loss + norm).isfinite(), step, bad)
                bar.update()

                interrupt, last = signalled(), step + 1 == steps
                logs = (step + 1) % config.log_every == 0 or last
                saves = time.monotonic() - saved > config.checkpoint_every or last or interrupt is not None
                if (logs or saves) and bad >= 0:
                    checkpoint = self.folder / "checkpoint.pt"
                    kept = f"The last good checkpoint is {checkpoint}, of step {good}" if checkpoint.exists() else (
                        "No checkpoint is saved yet"
                    )  # fmt: skip
                    raise Diverged(
                        f"the loss is no longer a number at step {bad.item() + 1} of {phase}. {kept}; continued from "
                        f"there the same would happen again: start anew with a smaller --lr, or with --clip 1"
                    )
                if logs:
                    values = {name: part.item() for name, part in parts.items()}
                    self.log(first + step + 1, phase, lr=rate, gradient_norm=norm.item(), **values)
                    shown |= values
                    bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()})
                if (step + 1) % config.eval_every == 0 and not last:
                    scored = evaluate(model, self.source, self.unseen[:128], 1, config)
                    self.log(first + step + 1, phase, **{f"eval_{n}": scored[n] for n in SCORES})
                    shown |= {name: scored[name] for name in ("ari", "fg_ari")}
                    bar.write(
                        f"{phase} {step + 1:,}/{steps:,}  {self.seconds / 60:.1f} min  MSE {scored['mse']:.4f}  "
                        f"ARI {100 * scored['ari']:.1f}  FG-ARI {100 * scored['fg_ari']:.1f}"
                    )
                if saves:
                    self.save(number, step + 1, optimizer)
                    saved, good = time.monotonic(), step + 1
                if interrupt is not None:
                    raise Interrupted(interrupt)

        key = "before" if phase == "pre-training" else "after"
        self.results[key] = evaluate(model, self.source, self.unseen, config.eval_draws, config)
        print(f"{phase} done after {self.seconds / 60:.1f} min\n{table({key: self.results[key]}, config)}", flush=True)
        save_weights(self.folder / f"{key}.safetensors", model, config, self.results[key])
        self.save(number + 1, 0, None)
        self.log(first + steps, phase, **{f"{key}_{n}": value for n, value in self.results[key].items()})
        self.step, self.optimizer_state = 0, None

    def log(self, step: int, phase: str, **values: Any) -> None:
        self.metrics.log(step, seconds=round(self.seconds, 1), phase=phase, **values)

    def save(self, phase: int, step: int, optimizer: Optimizer | None) -> None:
        save_checkpoint(self.folder, {
            "phase": phase, "step": step, "seconds": self.seconds, "results": json.dumps(self.results),
            "optimizer": None if optimizer is None else optimizer.state_dict(), "model": self.model.state_dict(),
        })  # fmt: skip


def restore(model: SlotAttentionAutoEncoder, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UsageError(f"{path} does not fit this model: {error}") from None


def greeting(config: Config, phases: dict[str, int], done: int, model: SlotAttentionAutoEncoder, source: Scenes) -> str:
    """What will run, and how long it should take: from three steps timed on a copy of the model."""
    trial, times = copy.deepcopy(model), {}
    optimizer = Optimizer(trial, config)
    pixels, _ = source.batch(torch.arange(config.batch_size) % config.num_scenes, device=config.device)
    for phase in phases:
        for _ in range(3):
            begun = time.monotonic()
            loss, _ = losses(*apply_model(trial, pixels, config, 0), phase, config)
            loss.backward()
            optimizer.step(0.0)
            loss.item()
            times[phase] = time.monotonic() - begun
    total = sum(phases.values())
    minutes = sum(times[phase] * steps for phase, steps in phases.items()) * (1 - done / max(1, total)) / 60
    length = "a minute" if minutes < 1.5 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    plan = ", then ".join(f"{steps:,} steps of {phase}" for phase, steps in phases.items())
    where = f"from step {done:,} " if done else ""
    return f"Preset {config.preset} on {config.device}, {config.precision}: {plan}; {where}about {length}."


def versions() -> dict[str, Any]:
    return {
        "iio_kernels": iio_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
    }


# ---------------------------------------------------------------------------------------------- the picture

#: Colours of background and objects; whatever has no counterpart in the truth takes one of the rest.
PALETTE = torch.tensor(
    [[38, 41, 48], [238, 119, 51], [0, 153, 136], [204, 51, 17], [51, 187, 238], [238, 51, 119], [187, 187, 187],
     [0, 119, 187], [221, 204, 119], [136, 34, 85], [153, 153, 51], [170, 68, 153], [68, 170, 153]]
) / 255  # fmt: skip


@torch.no_grad()
def draw_masks(folder: Path, config: Config, source: Scenes, indices: Tensor) -> None:
    """masks.png: a column a scene; image, truth, masks after each phase, and the slots' own pictures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pixels, truth = source.batch(indices, device=config.device)
    panels: list[tuple[str, Tensor]] = [
        ("image", pixels.permute(0, 2, 3, 1) / 255),
        ("truth", PALETTE[truth.long().cpu()]),
    ]
    for key, title in (("before", "masks before"), ("after", "masks after IIO")):
        if not (folder / f"{key}.safetensors").exists():
            continue
        _, tensors = load_weights(folder / f"{key}.safetensors", config)
        model = build_model(config, source.size)
        restore(model, tensors, folder)
        scene, _ = apply_model(model, pixels, config, -1, 0, 0)
        colours = matched_colours(truth, scene.masks.argmax(1), scene.masks.shape[1])
        panels.append((title, torch.einsum("bkhw,bkc->bhwc", scene.masks.float().cpu(), colours)))
    panels.append(("reconstruction", scene.reconstruction.permute(0, 2, 3, 1) / 2 + 0.5))
    for k in range(scene.masks.shape[1]):
        mask = scene.masks[:, k, :, :, None].float()
        shown = mask * (scene.components[:, k].permute(0, 2, 3, 1) / 2 + 0.5) + (1 - mask)
        panels.append((f"slot {k + 1}", shown))

    figure, axes = plt.subplots(
        len(panels), len(indices), figsize=(1.1 * len(indices) + 1, 1.1 * len(panels)), squeeze=False
    )
    for row, (title, images) in zip(axes, panels, strict=True):
        for axis, picture in zip(row, images.float().cpu().clamp(0, 1), strict=True):
            axis.imshow(picture.numpy())
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(title, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.3)
    figure.savefig(folder / "masks.png.tmp", format="png", dpi=110)
    plt.close(figure)
    os.replace(folder / "masks.png.tmp", folder / "masks.png")


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


# ---------------------------------------------------------------------------------------------- main


def score_only(config: Config) -> None:
    """Score given weights on the scoring scenes, or on all scenes of a file too short to have any."""
    config, tensors = load_weights(config.eval_only, config)
    source = open_scenes(config)
    first = config.num_scenes if len(source) >= config.num_scenes + config.eval_scenes else 0
    indices = torch.arange(first, min(first + config.eval_scenes, len(source)))
    model = build_model(config, source.size)
    restore(model, tensors, config.eval_only)
    results = {config.eval_only.name: evaluate(model, source, indices, config.eval_draws, config)}
    print(f"Scores on {len(indices):,} scenes, mean ± std over {config.eval_draws} draws of the initial slots:\n"
          f"{table(results, config)}")  # fmt: skip


def main() -> None:
    given = tyro.cli(Config)
    keep_freed_memory()
    try:
        if given.resume is not None:
            config, folder = reopen_run(given)
        else:
            config, folder = resolve(given), None
            if config.eval_only is not None:
                return score_only(config)
        # All that can be refused is refused before a new run's folder is made.
        config, weights = (config, None) if config.from_ is None else load_weights(config.from_, config)
        source = open_scenes(config)
        folder = folder or open_run(config)
        Run(config, folder, source, weights).train()
    except Interrupted as stop:
        print(f"\nInterrupted; all is saved. To continue: {resume_command(folder)}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except Diverged as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(1)
    except (UsageError, DataError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
