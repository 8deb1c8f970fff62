"""Checkpoints: all that an interrupted run needs to go on."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from training.config import Config, UsageError
from training.files import write


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
