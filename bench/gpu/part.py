"""What every part has: the device, its time, and where it leaves its results."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Of the benchmarks.
SIZES = "cuda" if DEVICE == "cuda" else "toy"
#: Seconds that this part has.
LIMIT = float(os.environ.get("LIMIT", "60"))
BEGUN = time.monotonic()


def elapsed() -> float:
    """Seconds since this part began."""
    return time.monotonic() - BEGUN


def folder() -> Path:
    """Where the results go."""
    return Path(sys.argv[2])


def write(part: str, result: dict[str, Any]) -> None:
    """Leave a part's results, whole or not at all."""
    path = folder() / f"{part}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def median_seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Of one call among many, with events on a GPU: calls queue behind each other."""
    call()
    synchronize()
    if DEVICE == "cpu":
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in events)[repeats // 2] / 1e3
