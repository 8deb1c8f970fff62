"""bench/gpu.sh, at toy sizes in Triton's interpreter: no minute of a GPU is to be lost to a typo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from iio_kernels.runtime.backends import OPERATIONS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run it on")


def run(folder: Path, *parts: str, **environment: str) -> subprocess.CompletedProcess:
    script = Path(__file__).parents[2] / "bench" / "gpu.sh"
    # Not for pytest to take itself for one of pytest-xdist's processes.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHON": sys.executable}
    command = ["bash", script, "--dry-run", folder, *parts]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=own | environment)


@pytest.mark.long
def test_dry_run(tmp_path):
    pytest.importorskip("triton")
    done = run(tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    parts = "accuracy", "benchmarks", "launch_settings", "machine", "repeats", "summary", "training"
    assert sorted(results) == sorted(parts)
    assert results["machine"]["torch"] == torch.__version__
    assert all(worst <= 1 for worst in results["accuracy"].values())
    assert {f"{operation}, triton" for operation in OPERATIONS} == set(results["repeats"])
    assert not any(result["differed"] for result in results["repeats"].values())
    names = {benchmark["name"] for benchmark in results["benchmarks"]["benchmarks"]}
    assert names - {"ours, bf16"} == {"literal", "einsums", "eager", "split", "torch.compile", "ours"}
    assert all(isinstance(x, float) for times in results["launch_settings"].values() for x in times.values())
    assert results["summary"]["tests"]["failures"] == results["summary"]["tests"]["errors"] == 0
    assert results["summary"]["tests"]["tests"] > 10
    assert results["summary"]["benchmarks without time"] == 0
    assert results["summary"]["build"]["backends"]["triton"] is None
    assert len(results["summary"]["sanitize"]["ran"]) > 10
    assert (tmp_path / "out" / "log.txt").stat().st_size > 1000
    assert results["training"]["finished"]
    assert len(results["training"]["rows"]) == 4


@pytest.mark.long
def test_training_goes_on_from_the_archive_of_an_earlier_call(tmp_path):
    assert run(tmp_path / "first", "training").returncode == 0
    table = tmp_path / "table1"
    with tarfile.open(tmp_path / "first" / "training.tar.gz") as file:
        file.extractall(tmp_path, filter="data")
    weights = load((table / "seed0-iio" / "after.safetensors").read_bytes())
    shutil.rmtree(table / "seed0-iio")  # as if it had been stopped before
    (table / "summary.json").unlink()
    with tarfile.open(tmp_path / "half.tar.gz", "w:gz") as file:
        file.add(table, "table1")
    assert run(tmp_path / "second", "training", IIO_KERNELS_TRAINING=str(tmp_path / "half.tar.gz")).returncode == 0
    assert json.loads((tmp_path / "second" / "training.json").read_text())["finished"]
    with tarfile.open(tmp_path / "second" / "training.tar.gz") as file:
        again = load(file.extractfile("table1/seed0-iio/after.safetensors").read())
    assert all(torch.equal(again[key], weights[key]) for key in weights)


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
