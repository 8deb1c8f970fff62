"""Several processes, as torchrun starts them, train as one does: two of them on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from ranks import one_step_each
from safetensors.torch import load_file

from training.processes import num_ranks, rank

ROOT = Path(__file__).parents[2]
# Adam: Muon's iteration makes of the last bits of a small gradient something visible within a few steps.
TINY = ["--preset", "smoke", "--device", "cpu", "--precision", "fp32", "--optimizer", "adam", "--fine-tune", "iio"]
TINY += ["--steps", "6", "--fine-tune-steps", "4", "--num-scenes", "40", "--eval-scenes", "130", "--eval-draws", "2"]
TINY += ["--log-every", "1", "--eval-every", "3"]


#: A variable of the environment of all processes of a job, by which they are found.
JOB = "IIO_KERNELS_TEST_JOB"
JOBS: list[subprocess.Popen] = []


def torchrun(script: str, *arguments: object, ranks: int = 2) -> subprocess.Popen:
    """Start a job, in a session of its own; it is over when the test is."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", JOB: str(uuid.uuid4())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        [*command, *map(str, arguments)], cwd=ROOT, env=environment, start_new_session=True, **pipes
    )
    process.job = environment[JOB]
    JOBS.append(process)
    return process


@pytest.fixture(autouse=True)
def _no_job_outlives_its_test():
    yield
    while JOBS:
        kill(JOBS.pop())


def kill(process: subprocess.Popen) -> None:
    """Kill torchrun and the ranks, which have sessions of their own and outlive it."""
    members = processes(f"{JOB}={process.job}")
    if process.poll() is None:
        members.append(process.pid)
    for member in members:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(os.getpgid(member), signal.SIGKILL)
    process.wait(timeout=10)


def finish(process: subprocess.Popen, seconds: float = 180) -> tuple[str, str]:
    """Output and errors of a job that ends in time."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        raise AssertionError(f"still running after {seconds} s: {process.communicate(timeout=10)}") from None


def processes(*variables: str) -> list[int]:
    """The process ids of those whose environment has these variables."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if set(variables) <= set((folder / "environ").read_bytes().decode(errors="replace").split("\0")):
                found.append(int(folder.name))
    return found


def worker(process: subprocess.Popen, rank: int) -> int:
    """The process id of one rank."""
    found = processes(f"{JOB}={process.job}", f"RANK={rank}")
    assert found, f"torchrun has no process of rank {rank}"
    return found[0]


def wait_for_steps(metrics: Path, count: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("gradient_norm") < count:
        assert process.poll() is None, finish(process, 10)
        assert time.monotonic() < end, "the run did not get there"
        time.sleep(0.02)


def assert_same_to_rounding(run: Path, other: Path) -> None:
    for name in ("before.safetensors", "after.safetensors"):
        ours, theirs = load_file(run / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4, msg=f"{name}: {key}")
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run, other))
    for phase in ("before", "after"):
        assert ours[phase] == pytest.approx(theirs[phase], abs=2e-3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A whole tiny run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, "train.py", *TINY, "--out", str(out)]
    subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=180
    )
    return out


@pytest.mark.parametrize("hinge", ["on", "off", "between the shares' errors"])
def test_gradients_are_those_of_one_process(tmp_path, hinge):
    margin = {"on": 0.0, "off": 10.0}.get(hinge)
    if margin is None:
        # A little under the error of all: one share's own error is over the margin and the other's under it.
        margin = 0.9999 * float(one_step_each(0.0)["fine-tuning"]["mse"])
    process = torchrun("tests/training/ranks.py", margin, tmp_path / "two.pt")
    output = finish(process)
    assert process.returncode == 0, output
    two, one = torch.load(tmp_path / "two.pt"), one_step_each(margin)
    shares = two["fine-tuning"]["errors of shares"]
    assert shares[0] != shares[1], "each process has scenes of its own"
    if hinge == "between the shares' errors":
        assert shares.min() < margin < shares.max()
    for phase, expected in one.items():
        norm = expected["gradient_norm"].item()
        for name, value in expected.items():
            # What all slots share has no gradient but rounding: hence the second term.
            atol = 2e-5 * value.abs().max().item() + 1e-7 * norm
            torch.testing.assert_close(two[phase][name], value, rtol=1e-4, atol=atol, msg=f"{phase}, {name}")


@pytest.mark.long
def test_two_processes_train_as_one_does(alone, tmp_path):
    process = torchrun("train.py", *TINY, "--out", tmp_path / "two")
    out, err = finish(process)
    assert process.returncode == 0, err
    assert out.count("Scores on 130 unseen scenes") == 1, "one process speaks"
    assert "2 x cpu" in out
    assert_same_to_rounding(tmp_path / "two", alone)
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "gradient_norm" in line] == list(range(1, 11)), "one process writes"
    theirs = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    for line, other in zip(lines, theirs, strict=True):
        for name in ("mse", "iio", "gradient_norm", "eval_mse"):
            assert (name in line) == (name in other)
            if name in line:
                assert line[name] == pytest.approx(other[name], rel=1e-3), f"{name} at step {line['step']}"


@pytest.mark.long
def test_an_interrupted_run_goes_on_with_another_number_of_processes(alone, tmp_path):
    out = tmp_path / "run"
    process = torchrun("train.py", *TINY, "--out", out)
    wait_for_steps(out / "metrics.jsonl", 2, process)
    process.send_signal(signal.SIGTERM)
    _, err = finish(process)
    assert process.returncode != 0
    assert "torchrun --nproc-per-node 2 train.py --resume" in err
    assert not (out / "summary.json").exists()
    resumed = subprocess.run(
        [sys.executable, "train.py", "--resume", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=180,
    )
    assert "from step" in resumed.stdout
    assert_same_to_rounding(out, alone)


@pytest.mark.long
def test_a_run_is_not_resumed_by_processes_that_cannot_share_its_batch(tmp_path):
    out = tmp_path / "run"
    process = torchrun("train.py", *TINY, "--out", out)
    wait_for_steps(out / "metrics.jsonl", 2, process)
    process.send_signal(signal.SIGTERM)
    finish(process)
    again = torchrun("train.py", "--resume", out, ranks=3)
    _, err = finish(again)
    assert again.returncode != 0
    assert "--batch-size 8: expected a multiple of the 3 processes" in err


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process in /proc")
def test_a_killed_process_ends_the_job_and_its_checkpoint_serves(alone, tmp_path):
    out = tmp_path / "run"
    process = torchrun("train.py", *TINY, "--checkpoint-every", 0, "--out", out)
    wait_for_steps(out / "metrics.jsonl", 2, process)
    os.kill(worker(process, 1), signal.SIGKILL)
    _, err = finish(process, 60)
    assert process.returncode != 0
    assert re.search(r"process 0 of 2 lost another one \(.+\)\. The last checkpoint is whole", err)
    assert f"--resume {out}" in err
    again = torchrun("train.py", "--resume", out)
    _, err = finish(again)
    assert again.returncode == 0, err
    assert_same_to_rounding(out, alone)


@pytest.mark.long
def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    process = torchrun("train.py", *TINY, "--batch-size", 7, "--out", tmp_path / "run")
    _, err = finish(process)
    assert process.returncode != 0
    assert err.count("--batch-size 7: expected a multiple of the 2 processes") == 1
    assert not (tmp_path / "run").exists()


def test_without_torchrun_a_process_is_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # as some schedulers set it
    monkeypatch.setenv("RANK", "3")
    assert (rank(), num_ranks()) == (0, 1)


@pytest.mark.long
def test_an_implicit_gradient_leaves_the_initial_slots_out(tmp_path):
    """Each process waits for gradients of all weights unless it is told that some have none."""
    short = ["--preset", "smoke", "--device", "cpu", "--precision", "fp32", "--optimizer", "adam", "--eval-draws", "1"]
    short += ["--steps", "3", "--num-scenes", "16", "--eval-scenes", "2", "--gradient", "implicit"]
    process = torchrun("train.py", *short, "--out", tmp_path / "two")
    _, errors = finish(process)
    assert process.returncode == 0, errors
