"""Cores that other programs have, and how threads wait."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ROOT

import training.cores
from training.cores import Cores
from training.run_folder import resume_command


@pytest.mark.parametrize(("share", "told"), [(0.5, True), (0.2, False)])
def test_cores_that_others_have_are_told_once(share, told, monkeypatch, capsys):
    now = [0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(training.cores, "waited", lambda: share * 2 * now[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cores = Cores()
    for now[0] in range(40):
        cores.look(Path("runs/x"))
    errors = capsys.readouterr().err
    assert errors.count("\n") == told
    if told:
        assert "keep its 2 threads from a core for 50% of the time" in errors
        assert f"OMP_NUM_THREADS=1 {resume_command(Path('runs/x'))}\n" in errors


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not tell")
def test_how_long_threads_waited_for_a_core():
    """Two programs on one core: of two seconds this one waits for about one."""
    code = """
import os, subprocess, sys, time
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
from training.cores import waited
other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
before, end = waited(), time.monotonic() + 2
while time.monotonic() < end:
    pass
other.kill()
print(waited() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert 0.4 < float(done.stdout) < 3, done.stderr


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch comes with libgomp on Linux alone")
@pytest.mark.parametrize("policy", [None, "passive"])
def test_openmp_is_told_how_to_wait_before_it_is_loaded(policy):
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= {"OMP_DISPLAY_ENV": "verbose"} | ({"OMP_WAIT_POLICY": policy} if policy else {})
    done = subprocess.run([sys.executable, "-c", "import train"], cwd=ROOT, env=environment, capture_output=True)
    assert (b"GOMP_SPINCOUNT = '10000'" in done.stderr) == (policy is None)
