"""`train.py` from the command line, as the tests beside this file call it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train import main

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT.parent / "shared" / "data" / "tetrominoes_sample.tfrecords"
PLAIN = ["--preset", "smoke", "--device", "cpu", "--steps", "8", "--num-scenes", "40", "--eval-scenes", "6"]
PLAIN += ["--eval-draws", "2", "--log-every", "2", "--eval-every", "5"]
TINY = [*PLAIN, "--fine-tune", "iio", "--fine-tune-steps", "5"]
SCORE = ["--device", "cpu", "--eval-scenes", "6", "--eval-draws", "2", "--eval-only"]


def call(monkeypatch, *arguments):
    """Run train.py's main in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return stop.code
    return 0


def start(*arguments):
    """Run train.py in a process of its own, with as many threads as this one."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "train.py", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def assert_refused_before_any_work(arguments, words, folder, monkeypatch, capsys):
    """train.py says so, and leaves nothing in the empty folder where it is run."""
    monkeypatch.chdir(folder)
    assert call(monkeypatch, *arguments) == 2
    assert words in capsys.readouterr().err
    assert not list(folder.iterdir()), "nothing was begun"


class Killed(BaseException):
    """Nothing catches it."""


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate(timeout=10)
        assert time.monotonic() < end, "the run did not get there"
        time.sleep(0.002)


def assert_same_tensors(file, other):
    ours, theirs = load_file(file), load_file(other)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def assert_same_weights(run, other):
    for name in ("before.safetensors", "after.safetensors"):
        assert_same_tensors(run / name, other / name)
        assert (run / name).read_bytes() == (other / name).read_bytes()


#: A short run: what comes after training is as in a long one.
SHORT = [*PLAIN, "--steps", "2", "--eval-draws", "1"]


#: What a file's name may be on Linux, and no UTF-8.
NAME = "caf\udce9"


needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is always full")


def shell(command, **environment):
    """A shell command, with `train` for the program."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        ["bash", "-c", command.replace("train", f"exec {sys.executable} train.py", 1)],
        cwd=ROOT, env=environment, capture_output=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def assert_finished(run, whole):
    """All is there that the run leaves whose surroundings are in order, and nothing half written."""
    assert "ari" in json.loads((run / "summary.json").read_text())["before"]
    assert (run / "before.safetensors").read_bytes() == (whole / "before.safetensors").read_bytes()
    assert (run / "masks.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.glob("*.tmp"))
