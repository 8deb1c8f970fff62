"""The folder of a run: made, claimed, found again; files in it are written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from models import MODELS
from training.config import Config, UsageError, changed_fields, option, several, to_json
from training.files import quoted, write
from training.processes import num_ranks, rank, same_on_all_ranks
from training.weights import completed

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes out of one folder
    fcntl = None


#: What a task's is called.
PICTURES = {"discovery": "masks.png", "set-prediction": "objects.png"}


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


def claim_again(folder: Path, claims: ExitStack) -> None:
    """Claim the folder of a run that is resumed."""
    if rank() == 0 and not claim(folder, claims):
        raise UsageError(f"--resume: another process trains in {folder}")


def open_run(config: Config, claims: ExitStack) -> Path:
    """The folder of a new run, which process number 0 makes for all."""
    try:
        return same_on_all_ranks(make_folder(config, claims) if rank() == 0 else None)
    except OSError as error:
        raise UsageError(f"--out: cannot write to {error.filename}: {error.strerror}") from None


def make_folder(config: Config, claims: ExitStack) -> Path:
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
    model = "" if config.model == next(iter(MODELS)) else f"{config.model}-"
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
        started_in = saved.pop("started_in", "")  # earlier runs did not keep it
        config = from_json(saved)
        found = {name: Path(started_in, path) for name in ("data", "from_") if (path := getattr(config, name))}
        config = dataclasses.replace(config, **{name: path for name, path in found.items() if path.exists()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"--resume: {folder} holds no run ({error})") from None
    if is_finished(folder) and (several(config) or (folder / PICTURES[config.task]).exists()):
        raise UsageError(f"--resume: {folder} is finished; its scores are in {folder / 'summary.json'}")
    return config, folder


def from_json(saved: dict[str, Any]) -> Config:
    """The configuration that a run saved, perhaps an earlier version's.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is none.
    """
    saved = {"initial_weights": "own", **saved}
    saved.setdefault("fine_tune_warmup_steps", saved["warmup_steps"])  # one option set both once
    if "taps" in saved:  # its name once
        saved["iio_kernel_size"] = saved.pop("taps")
    saved = completed(saved, saved["dataset"])
    saved |= {name: Path(saved[name]) for name in ("data", "out", "from_") if saved.get(name) is not None}
    return Config(**saved | {"score_steps": tuple(saved["score_steps"])})


def is_finished(folder: Path) -> bool:
    """Whether a run has all scores and weights. Its picture may lack, which `--resume` then draws."""
    return (folder / "summary.json").exists()


def resume_command(folder: Path) -> str:
    program = "python"
    if num_ranks() > 1:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        program = f"torchrun --nproc-per-node {here}" if here == num_ranks() else "torchrun [its options as before]"
    return f"{program} {quoted(sys.argv[0])} --resume {quoted(str(folder))}"


def to_continue(folder: Path | None) -> str:
    """How to go on with the run in a folder, where one was begun and is not finished."""
    begun = folder is not None and (folder / "config.json").exists() and not is_finished(folder)
    return f"; to continue: {resume_command(folder)}" if begun else ""
