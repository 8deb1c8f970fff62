"""Trainings in folders of their own, for the tables that this directory makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from training.config import option
from training.files import write
from training.tables import markdown


def usage(words: str) -> None:
    """Print what a benchmark is called with, and end."""
    print(words)
    sys.exit(0 if {"-h", "--help"} & set(sys.argv[1:]) else 2)


def folder_of(out: Path, name: str) -> Path:
    return out / name.lower().replace(",", "").replace(" ", "-")


def summary_of(folder: Path) -> dict[str, Any] | None:
    """What a run left; None before its end."""
    file = folder / "summary.json"
    return json.loads(file.read_text()) if file.exists() else None


def train_once(folder: Path, *options: str) -> None:
    """Train with these options of train.py in `folder`: not again if that is done, on from where it was interrupted."""
    if summary_of(folder) is not None:
        return
    arguments = ["--resume", str(folder)] if (folder / "checkpoint.pt").exists() else [*options, "--out", str(folder)]
    done = subprocess.run([sys.executable, "train.py", *arguments], cwd=Path(__file__).parents[1])
    if done.returncode:
        sys.exit(done.returncode)


def compare(out: Path, table: str, variants: dict[str, dict[str, float | str]], options: list[str], phase: str) -> None:
    """Train once with `options` and each of the `variants` of them; leave the scores after a phase in `out`.

    TABLE.json and TABLE.md hold those that are finished, anew after each.
    """
    for name, changed in variants.items():
        differing = [part for key, value in changed.items() for part in (option(key), str(value))]
        train_once(folder_of(out, name), *options, *differing)
        summaries = {name: summary_of(folder_of(out, name)) for name in variants}
        summaries = {name: summary for name, summary in summaries.items() if summary is not None}
        first = next(iter(summaries.values()))
        rows = {"before fine-tuning": first["before"]} if phase == "after" else {}
        rows |= {name: summary[phase] for name, summary in summaries.items()}
        config = {key: value for key, value in first["config"].items() if key not in ("out", "from_")}
        about = {"options": options, "versions": first["versions"], "config of the first": config}
        write(out / f"{table}.json", json.dumps({"rows": rows, **about}, indent=2) + "\n")
        write(out / f"{table}.md", markdown(rows))
