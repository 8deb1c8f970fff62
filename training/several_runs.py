"""Several runs, of several seeds or for table 1 of the IIO paper, and the mean of their scores."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data import Scenes
from training.config import Config, UsageError, to_json
from training.console import say
from training.files import write
from training.processes import any_rank, rank
from training.run_folder import is_finished, make_folder
from training.schedule import phase_steps
from training.signals import stop_if_asked
from training.tables import markdown, row_name, table
from training.versions import versions
from training.weights import KEPT


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
    train: Callable[[Config, Path, Scenes, Callable[[], int | None]], None],
    config: Config,
    folder: Path,
    claims: ExitStack,
    source: Scenes,
    signalled: Callable[[], int | None],
) -> None:
    """Train all members one after the other, each in its folder; leave mean and standard deviation of their scores."""
    summaries, runs = {}, members(config, folder)
    for name, member in runs.items():
        within = folder / name
        if not any_rank(is_finished(within)):
            if rank() == 0 and not (within / "config.json").exists():
                make_folder(dataclasses.replace(member, out=within), claims)
            say(f"\n{name}:")
            train(member, within, source, signalled)
            stop_if_asked(signalled)
        if rank() == 0:
            summaries[name] = summary_of(within)
    if rank() > 0:
        return
    each: dict[str, list[dict]] = {}
    for name, summary in summaries.items():
        keys = [key for key in summary if key in KEPT.values() or key.startswith("step-")]
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
