"""The log of a run: metrics.jsonl, and TensorBoard's events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.console import warn
from training.files import write


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
