"""No interruption costs anything."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from commands import SHORT, TINY, Killed, assert_same_weights, call, start, wait_for

import training.run
from training.config import Config
from training.run_folder import reopen_run


@pytest.mark.parametrize("at", [3, 11], ids=["in pre-training", "in fine-tuning"])
def test_kill_9_then_resume_gives_the_same_weights(finished, tmp_path, monkeypatch, capsys, at):
    out = tmp_path / "killed"
    # As often as it can checkpoint: the kill falls at any moment of a step or of the writing itself.
    process = start(*TINY, "--checkpoint-every", 0, "--log-every", 1, "--out", out)
    metrics = out / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("gradient_norm") >= at, process)
    process.kill()
    assert process.wait(timeout=120) == -signal.SIGKILL
    process.communicate(timeout=120)
    assert not (out / "summary.json").exists()
    assert call(monkeypatch, "--resume", out) == 0
    assert "from step" in capsys.readouterr().out
    assert_same_weights(finished, out)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if "gradient_norm" in line]
    assert steps == list(range(1, 14)), "each step is logged once"
    ours, whole = (json.loads((run / "summary.json").read_text()) for run in (out, finished))
    assert ours["before"] == whole["before"]
    assert ours["after"] == whole["after"]


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_other_optimizers_resume_exactly(tmp_path, monkeypatch, optimizer):
    options = [*TINY, "--optimizer", optimizer]
    assert call(monkeypatch, *options, "--out", tmp_path / "whole") == 0
    process = start(*options, "--checkpoint-every", 0, "--log-every", 1, "--out", tmp_path / "killed")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("gradient_norm") >= 3, process)
    process.kill()
    process.communicate(timeout=120)
    assert call(monkeypatch, "--resume", tmp_path / "killed") == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_saved_and_says_how_to_go_on(finished, tmp_path, monkeypatch, number):
    out = tmp_path / "interrupted"
    process = start(*TINY, "--out", out)
    metrics = out / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and "gradient_norm" in metrics.read_text(), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert f"train.py --resume {out}" in errors
    assert call(monkeypatch, "--resume", out) == 0
    assert_same_weights(finished, out)


def test_a_kill_between_a_phases_weights_and_its_checkpoint_logs_its_scores_once(tmp_path, monkeypatch):
    out, save_weights = tmp_path / "killed", training.run.save_weights

    def killed(*arguments):
        save_weights(*arguments)
        raise Killed

    monkeypatch.setattr(training.run, "save_weights", killed)
    with pytest.raises(Killed):
        call(monkeypatch, *TINY, "--out", out)
    monkeypatch.setattr(training.run, "save_weights", save_weights)
    assert call(monkeypatch, "--resume", out) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum("before_ari" in line for line in lines) == 1
    assert sum("after_ari" in line for line in lines) == 1


def test_a_run_begun_before_fine_tuning_had_its_own_warm_up_resumes_with_what_it_had(finished, tmp_path):
    saved = json.loads((finished / "config.json").read_text()) | {"warmup_steps": 3}
    del saved["fine_tune_warmup_steps"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config, _ = reopen_run(Config(resume=tmp_path))
    assert config.fine_tune_warmup_steps == 3


def test_a_run_of_which_an_option_had_another_name_resumes(finished, tmp_path):
    saved = json.loads((finished / "config.json").read_text())
    saved |= {"taps": 7, "network_of": None}
    del saved["iio_kernel_size"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config, _ = reopen_run(Config(resume=tmp_path))
    assert (config.iio_kernel_size, config.network_of) == (7, "tetrominoes")


@pytest.mark.parametrize("moved", [False, True], ids=["from another folder", "with all of it moved"])
def test_relative_names_are_found_again(moved, scenes, whole, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    shutil.move(scenes, first / "scenes.npz")
    shutil.copy(whole / "before.safetensors", first / "start.safetensors")
    monkeypatch.chdir(first)
    assert call(monkeypatch, *SHORT, "--data", "scenes.npz", "--from", "start.safetensors", "--out", "run") == 0
    Path("run", "summary.json").unlink()
    if moved:
        first.rename(second)
    else:
        second.mkdir()
    monkeypatch.chdir(second)
    assert call(monkeypatch, "--resume", "run" if moved else "../first/run") == 0
