"""Whether other programs have the cores that a run counts on."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import torch

from training.console import warn
from training.run_folder import resume_command


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
        waiting = (now - self.waited) / (seconds * threads)
        if waiting > 1 / 3:
            self.told = True
            fewer = f", or continue with fewer threads, whose sums round otherwise: OMP_NUM_THREADS={threads // 2} "
            warn(f"steps are slow: other programs, or a limit on this one, keep its {threads} threads from a core for "
                 f"{waiting:.0%} of the time, and each waits for all. Lower the others' priority (renice 19 PID)"
                 f"{fewer + resume_command(folder) if threads > 1 else ''}")  # fmt: skip
        self.at, self.waited = time.monotonic(), now
