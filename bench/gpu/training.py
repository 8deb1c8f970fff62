"""The paper's table 1, trained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from bench.gpu.part import DEVICE, LIMIT, folder


def training() -> dict[str, Any]:
    """The paper's table 1, three seeds, as far as the time goes. It goes on from the archive named in
    IIO_KERNELS_TRAINING, if there is one, and leaves FOLDER/training.tar.gz, from which a later call goes on."""
    out = folder()
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "table1"
        archive = os.environ.get("IIO_KERNELS_TRAINING")
        if archive:
            with tarfile.open(archive) as file:
                file.extractall(scratch, filter="data")
        if (run / "config.json").exists():
            arguments = ["--resume", str(run)]
        else:
            arguments = ["--table1", "--fine-tune", "iio", "--out", str(run), "--device", DEVICE]
            if DEVICE == "cuda":
                arguments += ["--preset", "paper", "--seeds", "3", "--log-every", "250", "--eval-every", "10000"]
            else:
                arguments += ["--preset", "smoke", "--steps", "4", "--fine-tune-steps", "2", "--num-scenes", "40"]
        process = subprocess.Popen([sys.executable, "train.py", *arguments])
        for seconds, number in ((max(5.0, LIMIT - 45), signal.SIGINT), (20, signal.SIGKILL)):
            try:
                process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(number)  # the first has it save all, and say so
        process.wait()
        run.mkdir(exist_ok=True)
        with tarfile.open(out / "training.tar.gz", "w:gz") as file:
            file.add(run, "table1", filter=lambda member: None if "tfevents" in member.name else member)
        finished = (run / "summary.json").exists()
        rows = json.loads((run / "summary.json").read_text())["rows"] if finished else None
        said = {name: json.loads((run / name / "summary.json").read_text()) for name in sorted(os.listdir(run))
                if (run / name / "summary.json").exists()}  # fmt: skip
    failed = process.returncode not in (0, 128 + signal.SIGINT)
    return {"finished": finished, "rows": rows, "runs": said, "status": process.returncode, "failed": failed}
