"""What the IIO paper leaves open, one choice at a time: python3 -m bench.sweep FOLDER [train.py's options...]

Fine-tunes the weights that come with this, short (1,500 steps of the quick preset with its rate halved every 750), once
as train.py does by default and once for each other value below. Each run has its folder; finished ones are not run
again. FOLDER/sweep.json and sweep.md hold the scores on unseen scenes of those that are finished.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.runs import compare, usage

SHORT = ["--preset", "quick", "--from-pretrained", "--fine-tune", "iio", "--fine-tune-steps", "1500"]
SHORT += ["--half-life", "750", "--eval-draws", "2", "--eval-every", "100000"]

#: The options that differ from train.py's, by the name of the run.
VARIANTS: dict[str, dict[str, float | str]] = {
    "as by default": {},
    "sigma 2.5": {"sigma": 2.5},
    "sigma 2.5, 5 taps": {"sigma": 2.5, "iio_kernel_size": 5},
    "sigma 10": {"sigma": 10.0},
    "sigma 10, 21 taps": {"sigma": 10.0, "iio_kernel_size": 21},
    "applied once": {"repeats": 1},
    "rate 2.5e-4": {"fine_tune_lr": 2.5e-4},
    "rate 1e-3": {"fine_tune_lr": 1e-3},
    "margin 0.01": {"margin": 0.01},
    "margin 0.02": {"margin": 0.02},
    "scale 300": {"hinge_scale": 300.0},
    "scale 2000": {"hinge_scale": 2000.0},
    "mean of terms, scale 143": {"terms": "mean", "hinge_scale": 142.85714},
}


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        usage(__doc__)
    compare(Path(sys.argv[1]).resolve(), "sweep", VARIANTS, [*SHORT, *sys.argv[2:]], "after")
