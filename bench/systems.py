"""Every system of this repository, trained by one command each: python3 -m bench.systems FOLDER [NAME...]

Each is trained at the preset of this machine (quick on a CPU, at most 20 minutes on two cores) and scored on unseen
scenes beside the same model untrained. Each run has its folder; finished ones are not run again. FOLDER/systems.json
and systems.md hold those that are finished. Without names, all.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from bench.runs import folder_of, summary_of, train_once, usage
from training.files import write
from training.run_folder import from_json
from training.schedule import phase_steps
from training.tables import PERCENT

SETS = "--task set-prediction --dataset clevr-like"


class System(NamedTuple):
    """A row: the options of train.py, the score that is compared, and what its paper reports of it."""

    options: str
    score: str
    published: float | None
    about: str


#: Published figures in percent: Locatello et al. 2020, tables 1 and 4 and figure 3; Greff et al. 2019; the IIO paper's
#: table 1. They are of the published data and of many times as many steps.
SYSTEMS: dict[str, System] = {
    "Slot Attention": System("", "fg_ari", 99.5, "Tetrominoes"),
    "Slot MLP": System("--model slot-mlp", "fg_ari", 25.1, "Tetrominoes"),
    "IODINE": System("--model iodine", "fg_ari", 99.2, "Tetrominoes"),
    "MONet": System("--model monet --dataset multi-dsprites", "fg_ari", 90.4, "Multi-dSprites"),
    "Slot Attention, set prediction": System(SETS, "ap_inf", 94.3, "CLEVR10"),
    "Slot MLP, set prediction": System(f"{SETS} --model slot-mlp", "ap_inf", None, "CLEVR10"),
    "DSPN, set prediction": System(f"{SETS} --model dspn", "ap_inf", 85.2, "CLEVR10, 30 steps of descent"),
}


def main(out: Path, *names: str) -> None:
    for name in names or SYSTEMS:
        options = SYSTEMS[name].options.split()
        train_once(folder_of(out, name), *options)
        train_once(folder_of(out, f"{name}, untrained"), *options, "--steps", "0")
        summarise(out)


def summarise(out: Path) -> None:
    rows = {}
    for name, system in SYSTEMS.items():
        trained, untrained = (summary_of(folder_of(out, run)) for run in (name, f"{name}, untrained"))
        if trained is not None and untrained is not None:
            config = {key: value for key, value in trained["config"].items() if key not in ("out", "from_", "data")}
            rows[name] = {
                "command": shlex.join(["python", "train.py", *system.options.split()]),
                "published": system._asdict(),
                "untrained": untrained["before"],
                "trained": trained["before"],
                "minutes": round(trained["seconds"] / 60, 1),
                "steps": phase_steps(from_json(config)),
                "config": config,
                "versions": trained["versions"],
            }
    write(out / "systems.json", json.dumps({"rows": rows}, indent=2) + "\n")
    write(out / "systems.md", markdown(rows))


def markdown(rows: dict[str, dict]) -> str:
    lines = ["| | published | untrained | ours | steps, minutes | command |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        of, key = row["published"], row["published"]["score"]
        published = "" if of["published"] is None else f"{of['published']} ({of['about']})"
        trained = f"{100 * row['trained'][key]:.1f} ± {100 * row['trained'][f'{key}_std']:.1f}"
        steps = " + ".join(f"{number:,}" for number in row["steps"].values() if number)
        lines.append(
            f"| {name}: {PERCENT[key]} | {published} | {100 * row['untrained'][key]:.1f} | "
            f"{trained} | {steps} of {row['config']['batch_size']}, {row['minutes']} | "
            f"`{row['command']}` |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        usage(__doc__)
    if unknown := [name for name in sys.argv[2:] if name not in SYSTEMS]:
        sys.exit(f"bench.systems: expected names of {'; '.join(SYSTEMS)}, got {unknown[0]}")
    main(Path(sys.argv[1]).resolve(), *sys.argv[2:])
