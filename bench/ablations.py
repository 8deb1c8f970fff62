"""What each part of Slot Attention is worth, one at a time: python3 -m bench.ablations FOLDER [train.py's options...]

Trains the quick preset's model (`--steps N` for another number of steps), once as it is and once with each change
below: those of the Slot Attention paper's supplement, soft k-means among them, and gradients that pass iterations by.
Each run has its folder; finished ones are not run again, interrupted ones go on. FOLDER/ablations.json and ablations.md
hold the scores on unseen scenes of those that are finished.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.runs import compare, usage
from models.slot_attention import ABLATIONS

QUICK = ["--preset", "quick", "--eval-draws", "2", "--eval-every", "100000"]

#: The options that differ from train.py's, by the name of the run.
VARIANTS: dict[str, dict[str, float | str]] = {
    "as published": {},
    **{name.replace("-", " "): {"ablation": name} for name in ABLATIONS},
    "1 iteration": {"iterations": 1},
    "2 iterations": {"iterations": 2},
    "5 iterations": {"iterations": 5},
    "6 slots": {"num_slots": 6},
    "8 slots": {"num_slots": 8},
    "no warm-up": {"warmup_steps": 0},
    "implicit gradient": {"gradient": "implicit"},
    "bilevel gradient": {"gradient": "bilevel"},
    # The rate falls by 0.003% in quick's 5,000 steps.
    "no decay": {"half_life": 10**8},
}


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        usage(__doc__)
    compare(Path(sys.argv[1]).resolve(), "ablations", VARIANTS, [*QUICK, *sys.argv[2:]], "before")
