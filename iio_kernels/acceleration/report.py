"""What `accelerate` replaced, what it left alone, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass
class Entry:
    """What became of one module that takes a softmax."""

    path: str
    kind: str
    """The name of its class."""
    accelerated: bool
    what: str
    """The calls that replace its own steps, or why it was left alone."""
    difference: float | None = None
    """The largest deviation of an output or gradient on the example, of what changing the last bits of its inputs and
    parameters makes; below 1 it is rounding."""

    @property
    def status(self) -> str:
        """One of `STATUSES`."""
        if self.accelerated:
            return "accelerated"
        others = all(reason.startswith(NO_PRODUCT) for reason in self.what.split("; "))
        return "other softmax" if others else "left alone"


#: What becomes of modules, in the order of a report. Other softmaxes are of no queries and keys, such as a decoder's
#: over its masks.
STATUSES = ("accelerated", "left alone", "other softmax")


#: What is said of other softmaxes.
NO_PRODUCT = "its logits are not a product"


@dataclass
class Report:
    """What `accelerate` replaced, what it left alone, and why: an `Entry` each. It prints as a table, in this order."""

    entries: list[Entry] = field(default_factory=list)
    pending: bool = False
    """Whether the model has yet to be called for the first time."""

    @property
    def accelerated(self) -> list[str]:
        """The paths of the modules that were replaced."""
        return [entry.path for entry in self.entries if entry.accelerated]

    def __str__(self) -> str:
        if self.pending:
            return "accelerate: waits for the model's first call"
        if not self.entries:
            return "accelerate: no module of the model takes a softmax"
        rows = [
            (entry.path or "(the model)", entry.kind, entry.status, entry.what)
            for entry in sorted(self.entries, key=lambda entry: STATUSES.index(entry.status))
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join("  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows)


class Reason(NamedTuple):
    """Why a softmax is left alone, and the file and line that take it."""

    text: str
    place: tuple[str, int] | None


#: Why a softmax is left alone that nothing more is known of.
ESCAPES = "what it weights is not summed over the inputs here"


#: What is said of normalising that is no softmax at all, Sinkhorn's say.
OTHERWISE = "it normalises by other means than a softmax"
