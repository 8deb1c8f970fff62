"""bench/gpu.sh, at toy sizes in Triton's interpreter: no minute of a GPU is to be lost to a typo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run it on")


def run(folder: Path, *parts: str, **environment: str) -> subprocess.CompletedProcess:
    script = Path(__file__).parents[1] / "bench" / "gpu.sh"
    # Not for pytest to take itself for one of pytest-xdist's processes.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHON": sys.executable}
    command = ["bash", script, "--dry-run", folder, *parts]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=own | environment)


def test_dry_run(tmp_path):
    pytest.importorskip("triton")
    done = run(tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    parts = "accuracy", "benchmarks", "launch_settings", "machine", "repeats", "summary"
    assert sorted(results) == sorted(parts)
    assert results["machine"]["torch"] == torch.__version__
    assert all(worst <= 1 for worst in results["accuracy"].values())
    assert {"slot_attention, triton", "inpainting, triton", "composition, triton", "iterations, triton"} == set(
        results["repeats"]
    )
    assert not any(result["differed"] for result in results["repeats"].values())
    names = {benchmark["name"] for benchmark in results["benchmarks"]["benchmarks"]}
    assert names == {"literal", "einsums", "eager", "torch.compile", "ours"}
    assert all(isinstance(x, float) for times in results["launch_settings"].values() for x in times.values())
    assert results["summary"]["tests"]["failures"] == results["summary"]["tests"]["errors"] == 0
    assert results["summary"]["tests"]["tests"] > 10
    assert results["summary"]["benchmarks without time"] == 0
    assert results["summary"]["build"]["backends"]["triton"] is None
    assert len(results["summary"]["sanitize"]["ran"]) > 10
    assert (tmp_path / "out" / "log.txt").stat().st_size > 1000


def test_parts_that_fail_or_have_no_time_left_are_told(tmp_path):
    done = run(tmp_path / "out", "machine", "repeats", IIO_KERNELS_GPU_SECONDS="4")
    assert done.returncode == 1
    parts = json.loads((tmp_path / "out" / "summary.json").read_text())["parts"]
    assert [(part["part"], part["status"]) for part in parts] == [("machine", 124), ("repeats", 124)]


def test_what_it_does_not_know_is_refused(tmp_path):
    for arguments, words in ((["machin"], "there is no part machin, only: machine build"), (["--help"], "FOLDER")):
        done = run(*([tmp_path / "out"] if words != "FOLDER" else []), *arguments)
        assert done.returncode == 2
        assert words in done.stderr
