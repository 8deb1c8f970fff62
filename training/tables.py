"""Scores as tables, for terminals and in Markdown."""

from __future__ import annotations

from data.metrics import METRICS
from training.building import recipe_of
from training.config import Config
from training.schedule import phase_steps

#: What tables show of the scores, in percent, under which headings; and, as they are, errors.
SHOWN = {name: metric for name, metric in METRICS.items() if metric.in_tables}
PERCENT = {name: metric.label for name, metric in SHOWN.items() if metric.unit == "%"}
ERRORS = {name: metric.label for name, metric in SHOWN.items() if metric.unit == ""} | {"loss": "loss"}

#: What tables call the fine-tunings.
FINE_TUNING = {"iio": "IIO", "reconstruction": "reconstruction"}


def row_name(key: str, config: Config, from_: str | None = None) -> str:
    """What a table calls the scores that a run keeps under `key`. The weights it began with were kept under `from_`."""
    steps, begun = phase_steps(config), recipe_of(config).title
    if key.startswith("step-"):
        return f"{begun}, {int(key.removeprefix('step-')):,} steps"
    if config.from_ is not None:
        begun = from_ or config.from_.stem
        if begun.startswith("step-"):
            begun = row_name(begun, config)
    if key == "before":
        more = "more " if config.from_ is not None else ""
        return f"{begun}, {steps['pre-training']:,} {more}steps" if steps["pre-training"] or not more else begun
    loss = FINE_TUNING[config.fine_tune]
    return f"{'' if steps['pre-training'] else begun} + {loss}, {steps['fine-tuning']:,} steps"


def table(rows: dict[str, dict]) -> str:
    """Scores as table 1 of the IIO paper prints them, in percent."""
    percent, errors = shown(rows)
    width = max(36, *map(len, rows))
    lines = [" " * width + "".join(f"{PERCENT[n]:>14}" for n in percent) + "".join(f"{ERRORS[n]:>10}" for n in errors)]
    for name, scored in rows.items():
        cells = [f"{100 * scored[n]:.2f} ± {100 * scored[n + '_std']:.2f}" for n in percent]
        lines.append(f"{name:{width}}" + "".join(f"{c:>14}" for c in cells)
                     + "".join(f"{scored[n]:>10.4f}" for n in errors))  # fmt: skip
    return "\n".join(lines)


def shown(rows: dict[str, dict]) -> tuple[list[str], list[str]]:
    """Which of `PERCENT` and which of `ERRORS` the scores of all rows have."""
    return tuple([n for n in names if all(n in scored for scored in rows.values())] for names in (PERCENT, ERRORS))


def markdown(rows: dict[str, dict]) -> str:
    """A table in Markdown, in percent but for errors; the mean squared one is that on [-1, 1]."""
    percent, errors = shown(rows)
    headings = [PERCENT[n] for n in percent] + [ERRORS[n] for n in errors]
    lines = [f"| | {' | '.join(headings)} |", "|---" * (1 + len(headings)) + "|"]
    for name, scored in rows.items():
        cells = [f"{100 * scored[n]:.1f} ± {100 * scored[f'{n}_std']:.1f}" for n in percent]
        cells += [f"{scored[n]:.4f}" for n in errors]
        lines.append(f"| {name.strip()} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
