"""The folder of a run: whose it is, what it holds, whatever its name."""

import contextlib
import json
import os
import subprocess
from pathlib import Path

import pytest
from commands import NAME, PLAIN, SCORE, SHORT, TINY, call

from training.config import Config, to_json
from training.files import quoted
from training.resolve import resolve
from training.run_folder import claim


def test_a_finished_or_unfinished_run_is_never_overwritten(finished, tmp_path, monkeypatch, capsys):
    weights = (finished / "after.safetensors").read_bytes()
    assert call(monkeypatch, *TINY, "--out", finished) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert call(monkeypatch, "--resume", finished) == 2
    assert "is finished" in capsys.readouterr().err
    assert (finished / "after.safetensors").read_bytes() == weights
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "checkpoint.pt").write_bytes(b"")
    assert call(monkeypatch, *TINY, "--out", tmp_path / "half") == 2
    assert "holds an unfinished run" in capsys.readouterr().err


def test_two_processes_never_train_in_one_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mine, name = tmp_path / "mine", Path("runs", "tetrominoes-smoke-seed0")
    mine.mkdir()
    config = resolve(Config(preset="smoke", device="cpu"))
    (mine / "config.json").write_text(json.dumps(to_json(config)))
    with contextlib.ExitStack() as claims:
        assert claim(mine, claims)
        assert claim(name, claims)
        assert call(monkeypatch, *PLAIN, "--out", mine) == 2
        assert "another process trains in" in capsys.readouterr().err
        assert call(monkeypatch, "--resume", mine) == 2
        assert "another process trains in" in capsys.readouterr().err
        assert call(monkeypatch, *PLAIN, "--steps", "0") == 0
    assert list(name.iterdir()) == []
    assert (Path("runs", "tetrominoes-smoke-seed0-2") / "summary.json").exists()
    assert call(monkeypatch, *PLAIN, "--steps", "0", "--out", mine) == 0, "the claims have ended"


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"warmup_steps": 3}'])
def test_a_folder_without_a_runs_options_is_refused(tmp_path, monkeypatch, capsys, content):
    (tmp_path / "config.json").write_text(content)
    assert call(monkeypatch, "--resume", tmp_path) == 2
    assert f"{tmp_path} holds no run" in capsys.readouterr().err


@pytest.mark.long
def test_scenes_and_weights_whose_names_are_no_utf8(scenes, tmp_path, monkeypatch, capsys):
    run = tmp_path / f"run-{NAME}"
    assert call(monkeypatch, *SHORT, "--data", scenes, "--out", run) == 0
    (run / "summary.json").unlink()
    assert call(monkeypatch, "--resume", run) == 0
    weights = (run / "before.safetensors").rename(run / f"{NAME}.safetensors")
    assert call(monkeypatch, *SCORE, weights, "--data", scenes, "--out", tmp_path / f"scores-{NAME}") == 0
    assert "from number 40 on" in capsys.readouterr().out, "it knows that it has seen the first 40 of this file"
    assert call(monkeypatch, *SHORT, "--from", weights, "--seeds", 2, "--out", tmp_path / "both") == 0
    assert "caf\\udce9, 2 more steps" in (tmp_path / "both" / "summary.md").read_text()


def test_the_command_to_resume_can_be_pasted_whatever_the_name(tmp_path):
    for name in ("plain", "two words", "it's", NAME, f"\\ '{NAME} ü\n"):
        echoed = subprocess.run(["bash", "-c", f"printf %s {quoted(name)}"], capture_output=True).stdout
        assert os.fsdecode(echoed) == name
        assert quoted(name).isprintable() or name.isprintable() or "\n" in name


def test_damaged_lines_of_the_log_are_left_out(unfinished, monkeypatch, capsys):
    log = unfinished / "metrics.jsonl"
    lines = log.read_bytes().splitlines(True)
    assert len(lines) == 2
    log.write_bytes(b"".join([lines[0], b'{"step": 1, "l\n', b"\xff\xfe\n", b"null\n", b"{}\n", *lines[1:], b'{"st']))
    assert call(monkeypatch, "--resume", unfinished) == 0
    assert capsys.readouterr().err == f"train.py: warning: {log}: damaged lines are left out\n"
    assert log.read_bytes().splitlines(True) == lines
