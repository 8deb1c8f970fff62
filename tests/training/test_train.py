"""`train.py` from the command line: what it leaves, what it refuses, and that no interruption costs anything."""

import contextlib
import dataclasses
import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train
from data import DATASETS
from models.slot_attention import Scene

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
        train.main()
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
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the run did not get there"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole tiny run, never interrupted."""
    out = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, *TINY, "--out", out) == 0
    return out


def assert_same_tensors(file, other):
    ours, theirs = load_file(file), load_file(other)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def assert_same_weights(run, other):
    for name in ("before.safetensors", "after.safetensors"):
        assert_same_tensors(run / name, other / name)
        assert (run / name).read_bytes() == (other / name).read_bytes()


def test_what_a_run_leaves(finished):
    summary = json.loads((finished / "summary.json").read_text())
    for when in ("before", "after"):
        assert {"ari", "fg_ari", "miou", "mse"} <= summary[when].keys()
        assert -1 <= summary[when]["ari"] <= 1
        assert summary[when]["mse"] > 0
    assert summary["config"]["steps"] == 8
    assert summary["config"]["lr"] == train.PRESETS["slot-attention"]["smoke"]["lr"]
    assert summary["seconds"] > 0
    assert summary["versions"]["torch"] == torch.__version__
    assert (finished / "masks.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.glob("*.tmp"))
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "lr" in line]
    assert [line["step"] for line in trained] == [2, 4, 6, 8, 10, 12, 13]
    assert all(("iio" in line) == (line["phase"] == "fine-tuning") for line in trained)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert 0 < seconds[-1] <= summary["seconds"]


def test_fine_tuning_changes_the_weights(finished):
    before, after = (load_file(finished / f"{name}.safetensors") for name in ("before", "after"))
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(finished, tmp_path, monkeypatch):
    assert call(monkeypatch, *TINY, "--out", tmp_path / "again") == 0
    assert_same_weights(finished, tmp_path / "again")
    assert call(monkeypatch, *TINY, "--seed", 1, "--out", tmp_path / "other") == 0
    assert not torch.equal(
        load_file(finished / "after.safetensors")["slot_attention.mu"],
        load_file(tmp_path / "other" / "after.safetensors")["slot_attention.mu"],
    )


@pytest.mark.parametrize("at", [3, 11], ids=["in pre-training", "in fine-tuning"])
def test_kill_9_then_resume_gives_the_same_weights(finished, tmp_path, monkeypatch, capsys, at):
    out = tmp_path / "killed"
    # As often as it can checkpoint: the kill falls at any moment of a step or of the writing itself.
    process = start(*TINY, "--checkpoint-every", 0, "--log-every", 1, "--out", out)
    metrics = out / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("gradient_norm") >= at, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert not (out / "summary.json").exists()
    assert call(monkeypatch, "--resume", out) == 0
    assert "from step" in capsys.readouterr().out
    assert_same_weights(finished, out)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if "gradient_norm" in line]
    assert steps == list(range(1, 14)), "each step is logged once"
    ours, whole = (json.loads((run / "summary.json").read_text()) for run in (out, finished))
    assert ours["before"] == whole["before"]
    assert ours["after"] == whole["after"]


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_other_optimizers_resume_exactly(tmp_path, monkeypatch, optimizer):
    options = [*TINY, "--optimizer", optimizer]
    assert call(monkeypatch, *options, "--out", tmp_path / "whole") == 0
    process = start(*options, "--checkpoint-every", 0, "--log-every", 1, "--out", tmp_path / "killed")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("gradient_norm") >= 3, process)
    process.kill()
    process.communicate()
    assert call(monkeypatch, "--resume", tmp_path / "killed") == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


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


@pytest.mark.parametrize(
    ("rate", "phase", "kept"),
    [
        ("--lr", "pre-training", "There is no checkpoint yet: start anew with a smaller --lr"),
        (
            "--fine-tune-lr",
            "fine-tuning",
            r"The last good checkpoint is \S+/checkpoint.pt, of step 0; .* another --out with a smaller --fine-tune-lr",
        ),
    ],
)
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch, capsys, rate, phase, kept):
    arguments = [*TINY, rate, "1e30", "--clip", "0", "--warmup-steps", "0", "--out", tmp_path / "nan"]
    assert call(monkeypatch, *arguments) == 1
    message = capsys.readouterr().err
    assert re.search(rf"no longer a number at step [1-5] of {phase}\. {kept}", message)
    if phase == "fine-tuning":
        model = torch.load(tmp_path / "nan" / "checkpoint.pt", weights_only=True)["model"]
        assert all(x.isfinite().all() for x in model.values())


def test_a_checkpoint_of_another_version_is_refused(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "old"
    out.mkdir()
    (out / "config.json").write_bytes((finished / "config.json").read_bytes())
    for state in (
        {"step": 3},
        torch.load(finished / "checkpoint.pt", weights_only=True) | {"optimizer": {"state": {}}},
    ):
        torch.save(state, out / "checkpoint.pt")
        assert call(monkeypatch, "--resume", out) == 2
        assert "another version of train.py" in capsys.readouterr().err


def test_a_kill_between_a_phases_weights_and_its_checkpoint_logs_its_scores_once(tmp_path, monkeypatch):
    out, save_weights = tmp_path / "killed", train.save_weights

    def killed(*arguments):
        save_weights(*arguments)
        raise Killed

    monkeypatch.setattr(train, "save_weights", killed)
    with pytest.raises(Killed):
        call(monkeypatch, *TINY, "--out", out)
    monkeypatch.setattr(train, "save_weights", save_weights)
    assert call(monkeypatch, "--resume", out) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum("before_ari" in line for line in lines) == 1
    assert sum("after_ari" in line for line in lines) == 1


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
    config = train.resolve(train.Config(preset="smoke", device="cpu"))
    (mine / "config.json").write_text(json.dumps(train.to_json(config)))
    with contextlib.ExitStack() as claims:
        assert train.claim(mine, claims)
        assert train.claim(name, claims)
        assert call(monkeypatch, *PLAIN, "--out", mine) == 2
        assert "another process trains in" in capsys.readouterr().err
        assert call(monkeypatch, "--resume", mine) == 2
        assert "another process trains in" in capsys.readouterr().err
        assert call(monkeypatch, *PLAIN, "--steps", "0") == 0
    assert list(name.iterdir()) == []
    assert (Path("runs", "tetrominoes-smoke-seed0-2") / "summary.json").exists()
    assert call(monkeypatch, *PLAIN, "--steps", "0", "--out", mine) == 0, "the claims have ended"


def test_a_checkpoint_from_a_stranger_cannot_run_code(finished, tmp_path, monkeypatch, capsys):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text((finished / "config.json").read_text())
    torch.save({"model": Attack()}, run / "checkpoint.pt")
    assert call(monkeypatch, "--resume", run) == 2
    (run / "checkpoint.pt").write_bytes(pickle.dumps(Attack(), protocol=2))
    assert call(monkeypatch, "--resume", run) == 2
    assert "is not a checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "attacked").exists()


def test_from_starts_with_given_weights_and_their_architecture(finished, tmp_path, monkeypatch):
    arguments = [*PLAIN, "--steps", "0"]
    arguments += ["--from", finished / "after.safetensors", "--out", tmp_path / "run"]
    assert call(monkeypatch, *arguments) == 0
    assert_same_tensors(tmp_path / "run" / "before.safetensors", finished / "after.safetensors")


def test_eval_only_scores_as_the_run_did(finished, monkeypatch, capsys):
    assert call(monkeypatch, *SCORE, finished / "after.safetensors") == 0
    scored = json.loads((finished / "summary.json").read_text())["after"]
    assert f"{100 * scored['ari']:.2f} ± {100 * scored['ari_std']:.2f}" in capsys.readouterr().out


@pytest.mark.skipif(not SAMPLE.exists(), reason="needs a file of the published data set")
def test_eval_only_on_the_published_file(finished, monkeypatch, capsys):
    arguments = ["--eval-only", finished / "after.safetensors", "--data", SAMPLE, "--device", "cpu"]
    assert call(monkeypatch, *arguments) == 0
    assert "Scores on 6 scenes from number 0 on" in capsys.readouterr().out


def test_eval_only_scores_no_scene_that_was_trained_on(finished, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, *SCORE, finished / "after.safetensors") == 0
    assert "Scores on 6 scenes from number 40 on" in capsys.readouterr().out
    image, labels = DATASETS["tetrominoes"].generator(30).batch(torch.arange(30))
    masks = torch.stack([labels == k for k in range(4)], 1)
    for name in ("mine", "other"):
        np.savez(tmp_path / f"{name}.npz", image=image.permute(0, 2, 3, 1).numpy(), mask=masks.numpy())
    out, sizes = tmp_path / "run", ["--num-scenes", "24", "--eval-scenes", "6"]
    assert call(monkeypatch, *PLAIN, *sizes, "--steps", "0", "--data", tmp_path / "mine.npz", "--out", out) == 0
    capsys.readouterr()
    score = ["--eval-only", out / "before.safetensors", "--device", "cpu", "--data"]
    assert call(monkeypatch, *score, tmp_path / "mine.npz", "--eval-scenes", 6) == 0
    assert "Scores on 6 scenes from number 24 on" in capsys.readouterr().out
    assert call(monkeypatch, *score, tmp_path / "mine.npz", "--eval-scenes", 7) == 2
    assert "was trained on the first 24; expected at most 6" in capsys.readouterr().err
    assert call(monkeypatch, *score, tmp_path / "mine.npz", "--num-scenes", 10) == 2
    assert "expected at least 24" in capsys.readouterr().err
    assert call(monkeypatch, *score, tmp_path / "other.npz", "--eval-scenes", 30) == 0
    assert "Scores on 30 scenes from number 0 on" in capsys.readouterr().out


REFUSED = {
    "an unknown option": (["--learning-rate", "1"], "learning-rate"),
    "a value of another type": (["--seed", "one"], "seed"),
    "an unknown preset": (["--preset", "fast"], "preset"),
    "steps and epochs": (["--steps", "1", "--epochs", "1"], "exclude each other"),
    "no scenes": (["--num-scenes", "0"], "--num-scenes: expected at least 1, got 0"),
    "a negative rate": (["--lr", "-1"], "--lr: expected a number >= 0, got -1"),
    "a rate that is no number": (["--lr", "nan"], "--lr: expected a number >= 0, got nan"),
    "an even kernel": (["--kernel-size", "4"], "--kernel-size: expected an odd number, got 4"),
    "an even Gaussian": (["--taps", "4"], "--taps: expected an odd number, got 4"),
    "a Gaussian without width": (["--sigma", "0"], "--sigma: expected a number > 0, got 0"),
    "one slot under IIO": (["--fine-tune", "iio", "--num-slots", "1"], "--num-slots"),
    "a device that does not exist": (["--device", "tpu"], "--device: expected cpu, cuda or cuda:N, got 'tpu'"),
    "a device that is not here": (["--device", "cuda:99"], "--device cuda:99"),
    "a file that is not there": (["--data", "no-such-file.tfrecords"], "no-such-file.tfrecords"),
    "weights that are not there": (["--from", "no-such-file.safetensors"], "no-such-file.safetensors"),
    "no run to resume": (["--resume", "no-such-run"], "no-such-run"),
    "fine-tuning without saying so": (["--fine-tune-steps", "5"], "--fine-tune-steps: there is no fine-tuning without"),
    "another architecture than the weights'": (["--from-pretrained", "--channels", "16"], "--channels: weights bring"),
    "nothing to train": (["--from-pretrained"], "--from-pretrained: nothing to train without"),
    "table 1 without fine-tuning": (["--table1"], "--table1 takes --fine-tune iio"),
    "table 1 of another fine-tuning": (["--table1", "--fine-tune", "reconstruction"], "--table1 takes --fine-tune iio"),
    "a row of no table": (["--no-long-row"], "--no-long-row is for --table1"),
    "scenes that the weights have seen": (
        ["--from-pretrained", "--fine-tune", "iio", "--num-scenes", "400", "--device", "cpu"],
        "--num-scenes 400: tetrominoes-before.safetensors was trained on the first 60,000 scenes",
    ),
    "two kinds of weights": (["--from", "x.safetensors", "--from-pretrained"], "exclude each other"),
    "a score past the end": (["--steps", "5", "--score-steps", "6"], "--score-steps: expected steps in 1..5, got 6"),
    "scores of several trainings": (["--eval-only", "pretrained", "--seeds", "2"], "leave out --seeds"),
    "scores of a training": (["--eval-only", "pretrained", "--steps", "2"], "trains nothing: leave out --steps"),
    "a folder for weights": (["--eval-only", "."], "give the weights in it, such as before.safetensors"),
    "a file for a run": (["--resume", __file__], "is a file: give the run's folder, "),
    "no trainings": (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
    "resume with other options": (["--resume", "no-such-run", "--lr", "1"], "leave out --lr"),
    "sets from a model of masks": (
        ["--task", "set-prediction", "--model", "monet"],
        "takes slot-attention, slot-mlp, dspn",
    ),
    "masks from a model of sets": (["--model", "dspn"], "--model dspn predicts sets: add --task set-prediction"),
    "sets of unknown objects": (["--task", "set-prediction"], "--dataset tetrominoes does not tell its objects'"),
    "masks of a set": (
        ["--task", "set-prediction", "--dataset", "clevr-like", "--fine-tune", "iio"],
        "--fine-tune iio fine-tunes masks; set prediction has none",
    ),
    "a loss of sets for masks": (["--stepwise-loss"], "--stepwise-loss and --coordinate-scale are for --task set-"),
    "a size that the model has not": (
        ["--model", "slot-mlp", "--iterations", "2"],
        "--iterations: slot-mlp has no such",
    ),
    "one slot of IODINE": (["--model", "iodine", "--num-slots", "1"], "--num-slots: IODINE takes at least 2, got 1"),
    "a size of another task": (["--downsample", "2"], "--downsample: slot-attention has no such size"),
    "what cannot be generated": (["--dataset", "clevr6"], "--dataset clevr6 cannot be generated: give its file"),
    "what has no file": (["--dataset", "clevr-like", "--data", "x.npz"], "--data: clevr-like has no file"),
    "weights that do not come with this": (
        ["--eval-only", "pretrained", "--dataset", "clevr-like"],
        "--dataset clevr-like: weights come with this for tetrominoes alone",
    ),
    "the model of weights": (["--from-pretrained", "--model", "slot-mlp"], "--model: weights bring their own"),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_run_is_refused_before_any_work(arguments, words, tmp_path, monkeypatch, capsys):
    assert_refused_before_any_work(arguments, words, tmp_path, monkeypatch, capsys)


#: What there is besides Slot Attention that discovers the objects of Tetrominoes, at toy sizes.
OTHERS = {
    "slot-mlp": ["--model", "slot-mlp"],
    "iodine": ["--model", "iodine"],
    "monet": ["--model", "monet"],
    "set prediction": ["--task", "set-prediction", "--dataset", "clevr-like", "--stepwise-loss"],
    "sets by dspn": ["--task", "set-prediction", "--dataset", "clevr-like", "--model", "dspn"],
    "sets by slot-mlp": ["--task", "set-prediction", "--dataset", "clevr-like", "--model", "slot-mlp"],
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_model_trains_and_resumes_exactly(name, tmp_path, monkeypatch, capsys):
    options = [*PLAIN, *OTHERS[name], "--steps", "6", "--eval-draws", "1"]
    if "--task" not in options:
        options += ["--fine-tune", "iio", "--fine-tune-steps", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call(monkeypatch, *options, "--out", whole) == 0
    log = train.Metrics.log

    def log_and_interrupt(self, step, **values):
        log(self, step, **values)
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train.Metrics, "log", log_and_interrupt)
        assert call(patch, *options, "--out", cut) == 128 + signal.SIGINT
    assert call(monkeypatch, "--resume", cut) == 0
    for file in whole.glob("*.safetensors"):
        assert_same_tensors(file, cut / file.name)
    first, second = (json.loads((run / "summary.json").read_text())["before"] for run in (whole, cut))
    assert first == second
    assert (whole / train.PICTURES["set-prediction" if "--task" in options else "discovery"]).exists()
    capsys.readouterr()
    assert call(monkeypatch, *SCORE, whole / "before.safetensors", "--dataset", first_dataset(options),
                "--eval-draws", "1", "--preset", "smoke") == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert all(f"{100 * value:.2f} ± 0.00" in printed for key, value in first.items() if key in train.PERCENT)


def first_dataset(options):
    return options[options.index("--dataset") + 1] if "--dataset" in options else "tetrominoes"


def test_set_prediction_is_scored_by_number_of_objects():
    """All scenes together, and those of one number of objects alone."""
    config = train.resolve(train.Config(task="set-prediction", dataset="clevr-like", preset="smoke", device="cpu"))
    objects = torch.zeros(2, 10, 19)
    objects[0, :3, 18] = objects[1, :5, 18] = 1
    objects[:, :, [3, 5, 7, 10]] = 1
    objects[:, :, 0] = torch.arange(10) / 10

    class Source:
        size = (8, 8)

        def batch(self, indices, device):
            return torch.zeros(len(indices), 3, *self.size, dtype=torch.uint8), None

        def properties(self, indices, device):
            return objects[indices]

    class Model(torch.nn.Module):
        noise_shape = (0,)

        def forward(self, image, noise):
            return objects[: len(image)] * torch.tensor([1.0, 0.0]).view(2, 1, 1)  # knows the first scene alone

    scored = train.evaluate(Model(), Source(), torch.arange(2), 1, config)
    assert scored["by_objects"][3]["ap_inf"] == 1
    assert scored["by_objects"][5]["ap_inf"] < 1
    assert scored["by_objects"][5]["ap_inf"] < scored["ap_inf"] < 1


def test_a_model_has_the_same_sizes_in_every_preset():
    """By a preset's sizes those are refused that the model has not."""
    for recipe, presets in train.PRESETS.items():
        assert len({frozenset(values.keys() & train.ARCHITECTURE) for values in presets.values()}) == 1, recipe


def test_iterations_of_weights_that_have_none_are_refused(tmp_path):
    config = train.resolve(train.Config(model="slot-mlp", preset="smoke", device="cpu"))
    train.save_weights(tmp_path / "x.safetensors", torch.nn.Linear(1, 1), config, {})
    scored = train.Config(eval_only=tmp_path / "x.safetensors", preset="smoke", device="cpu")
    assert train.resolve(scored).model == "slot-mlp"
    with pytest.raises(train.UsageError, match="--iterations: slot-mlp has no such size"):
        train.resolve(train.dataclasses.replace(scored, iterations=5))
    with pytest.raises(train.UsageError, match="--num-slots: slot-mlp has as many slots as it was trained with"):
        train.resolve(train.dataclasses.replace(scored, num_slots=9))
    sets = dict(task="set-prediction", dataset="clevr-like", preset="smoke", device="cpu")
    config = train.resolve(train.Config(model="dspn", **sets))
    train.save_weights(tmp_path / "x.safetensors", torch.nn.Linear(1, 1), config, {})
    with pytest.raises(train.UsageError, match="--num-slots: dspn has as many slots as it was trained with"):
        train.resolve(train.dataclasses.replace(scored, dataset="clevr-like", num_slots=9))


def test_fewer_slots_than_objects_are_told(capsys):
    train.resolve(train.Config(task="set-prediction", dataset="clevr-like", device="cpu", num_slots=10))
    assert capsys.readouterr().out == ""
    train.resolve(train.Config(task="set-prediction", dataset="clevr-like", device="cpu", num_slots=9))
    assert "K 9 is fewer than the 10 objects" in capsys.readouterr().out


def test_ctrl_c_before_and_after_a_training_ends_in_a_line(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "open_scenes", interrupt)
    for options in (PLAIN, [*SCORE, "pretrained"]):
        assert call(monkeypatch, *options) == 130
        assert capsys.readouterr().err == "\ntrain.py: interrupted\n"


def test_weights_say_what_they_were_trained_on(finished):
    weights = finished / "before.safetensors"
    with pytest.raises(train.UsageError, match="trained on tetrominoes, whose images have another"):
        train.resolve(train.Config(eval_only=weights, dataset="shapes", preset="smoke", device="cpu"))


def test_other_numbers_of_slots_and_iterations_than_in_training(finished, tmp_path, monkeypatch, capsys):
    scores = []
    for options, name in ([], "K 4, T 3"), (["--num-slots", "6"], "K 6, T 3"), (["--iterations", "1"], "K 4, T 1"):
        weights, out = finished / "before.safetensors", tmp_path / name
        assert call(monkeypatch, *SCORE, weights, *options, "--out", out) == 0
        assert f"before.safetensors, Slot Attention, {name}" in capsys.readouterr().out
        scores.append(json.loads((out / "scores.json").read_text())["rows"].popitem()[1]["ari"])
    assert len(set(scores)) == 3


def test_the_learning_rate_warms_up_and_halves():
    config = train.Config(lr=1.0, warmup_steps=100, fine_tune_lr=0.1, fine_tune_warmup_steps=10, half_life=100_000)
    assert train.learning_rate(49, "pre-training", config) == pytest.approx(0.5, rel=1e-3)
    assert train.learning_rate(99_999, "pre-training", config) == pytest.approx(0.5, rel=1e-3)
    assert train.learning_rate(199_999, "pre-training", config) == pytest.approx(0.25, rel=1e-3)
    assert train.learning_rate(4, "fine-tuning", config) == pytest.approx(0.05, rel=1e-3)
    assert train.learning_rate(99_999, "fine-tuning", config) == pytest.approx(0.05, rel=1e-3)


def recipes():
    """What can be trained at each preset, as options: every task, model and data set that go together."""
    for task, model, dataset, preset in itertools.product(
        *(typing.get_args(typing.get_type_hints(train.Config)[name]) for name in ("task", "model", "dataset")),
        ("paper", "quick", "smoke"),
    ):
        if DATASETS[dataset].num_entities == 1:
            continue  # an empty room is for scoring alone
        fine_tune = "iio" if task == "discovery" else "none"
        config = train.Config(task=task, model=model, dataset=dataset, preset=preset, fine_tune=fine_tune, device="cpu")
        if DATASETS[dataset].file is not None:
            config = dataclasses.replace(config, data=Path("scenes.tfrecords"))
        with contextlib.suppress(train.UsageError):
            train.refuse_impossible(config)
            yield pytest.param(config, id=f"{model} {task} {dataset} {preset}")


@pytest.mark.parametrize("config", list(recipes()))
def test_every_phase_reaches_its_learning_rate(config):
    """A warm-up that outlasts a phase, or decay before its end, would keep it from the rate that is stated."""
    config = train.resolve(config)
    for phase, steps in train.phase_steps(config).items():
        peak, warming = train.warm_up(phase, config)
        reached = train.learning_rate(max(1, min(steps, warming)) - 1, phase, config)
        assert reached >= 0.85 * peak > 0, phase


def test_a_warm_up_that_outlasts_its_phase_is_told(capsys):
    train.resolve(train.Config(preset="quick", device="cpu", steps=50, warmup_steps=100, lr=1e-3))
    assert "climbs to 0.00049, not to the 0.001 asked for" in capsys.readouterr().out


def test_a_run_begun_before_fine_tuning_had_its_own_warm_up_resumes_with_what_it_had(finished, tmp_path):
    saved = json.loads((finished / "config.json").read_text()) | {"warmup_steps": 3}
    del saved["fine_tune_warmup_steps"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config, _ = train.reopen_run(train.Config(resume=tmp_path))
    assert config.fine_tune_warmup_steps == 3


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"warmup_steps": 3}'])
def test_a_folder_without_a_runs_options_is_refused(tmp_path, monkeypatch, capsys, content):
    (tmp_path / "config.json").write_text(content)
    assert call(monkeypatch, "--resume", tmp_path) == 2
    assert f"{tmp_path} holds no run" in capsys.readouterr().err


def test_another_networks_weights_are_refused_in_a_line(finished, tmp_path, monkeypatch, capsys):
    weights = load_file(finished / "before.safetensors")
    weights["slot_attention.mu"] = weights["slot_attention.mu"][..., :-1].contiguous()
    with safe_open(finished / "before.safetensors", "pt") as file:
        save_file(weights, tmp_path / "other.safetensors", file.metadata())
    assert call(monkeypatch, *SCORE, tmp_path / "other.safetensors") == 2
    message = capsys.readouterr().err
    assert re.search(
        r"other.safetensors holds another network's .* 1 of \d+ .* such as slot_attention.mu$", message.strip()
    )


def test_every_epoch_sees_every_scene_once():
    order = train.Order(train.Config(num_scenes=10, batch_size=4, seed=3, device="cpu"))
    seen = torch.cat([order(step) for step in range(10)]).view(4, 10)
    assert all(torch.equal(epoch.sort().values, torch.arange(10)) for epoch in seen)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(order(2), torch.cat([seen[0, 8:], seen[1, :2]])), "going back gives the same scenes"


def test_the_hinge_lets_go_at_the_margin():
    config = train.Config(margin=0.5, hinge_scale=10.0)
    image, masks = torch.rand(2, 3, 11, 11), torch.rand(2, 4, 11, 11).softmax(1)
    unused = torch.empty(0)
    for reconstruction, active in ((image * 2 - 1 + 0.1, False), (image * 2 - 1 + 1.0, True)):
        # One picture for all slots: the masks do not change it.
        decoded = torch.cat([reconstruction[:, None].expand(-1, 4, -1, -1, -1), masks.log()[:, :, None]], 2)
        scene = Scene(decoded, unused, unused)
        loss, parts = train.losses(scene, image, "fine-tuning", config)
        torch.testing.assert_close(loss - parts["iio"], 10 * parts["mse"] * active, rtol=1e-5, atol=1e-5)


def test_muon_on_hidden_matrices_and_adam_on_the_rest():
    """Several steps against both optimizers written out: no weight decay, Nesterov momentum 0.95, Adam's step size."""
    config = train.resolve(train.Config(preset="smoke", device="cpu"))
    model = train.build_model(config, (12, 12))
    optimizer = train.build_optimizer(model, config)
    adams = {"slot_attention.mu", "slot_attention.log_sigma", "decoder.to_rgba.weight"}
    adams |= {f"{part}.position.dense.weight" for part in ("encoder", "decoder")}
    adams |= {name for name, p in model.named_parameters() if p.ndim < 2}
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    first, second = ({name: torch.zeros_like(p) for name, p in expected.items()} for _ in range(2))
    for step in range(1, 4):
        torch.manual_seed(step)
        for name, p in model.named_parameters():
            g = p.grad = torch.randn_like(p)
            g = g.double()
            if name in adams:
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g * g
                size = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
                expected[name] -= 1e-2 * first[name] / (1 - 0.9**step) / size
            else:
                first[name] = 0.95 * first[name] + 0.05 * g
                update = (0.05 * g + 0.95 * first[name]).flatten(1)
                expected[name] -= 1e-2 * 0.2 * max(update.shape) ** 0.5 * semi_orthogonal(update).view_as(p)
        optimizer.set_rate(1e-2)
        optimizer.step()
    for name, p in model.named_parameters():
        error = (p.detach() - expected[name]).abs().max() / (1e-2 * 3)
        assert error < 1e-4, f"{name}: {error}"


def semi_orthogonal(matrix):
    """Five rounds of Newton and Schulz's iteration with Jordan's coefficients."""
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("adam", lambda parameters: torch.optim.Adam(parameters, 1e-3, eps=1e-8, fused=True)),
        ("rmsprop", lambda parameters: torch.optim.RMSprop(parameters, 1e-3, alpha=0.9, eps=1e-5)),
    ],
)
def test_adam_and_rmsprop_are_torchs_own(name, alone):
    config = train.resolve(train.Config(preset="smoke", optimizer=name, device="cpu"))
    ours, theirs = (train.build_model(config, (12, 12)) for _ in range(2))
    optimizer, expected = train.build_optimizer(ours, config), alone(theirs.parameters())
    for seed in range(2):
        torch.manual_seed(seed)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.set_rate(1e-3)
        optimizer.step()
        expected.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


def test_scores_and_weights_on_the_way(tmp_path, monkeypatch):
    assert call(monkeypatch, *TINY, "--score-steps", 3, 5, "--out", tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for steps in (3, 5):
        short = tmp_path / str(steps)
        # The learning rate does not depend on the number of steps, so a shorter run is the beginning of a longer one.
        assert call(monkeypatch, *PLAIN, "--steps", steps, "--out", short) == 0
        assert_same_tensors(tmp_path / "run" / f"step-{steps}.safetensors", short / "before.safetensors")
        assert summary[f"step-{steps}"] == json.loads((short / "summary.json").read_text())["before"]


def test_several_seeds_resume_and_are_summed_up(finished, tmp_path, monkeypatch, capsys):
    out, train_phase = tmp_path / "both", train.Run.train_phase

    def interrupted(run, number):
        if run.config.seed == 1 and number == 1:
            raise train.Interrupted(signal.SIGTERM)
        train_phase(run, number)

    monkeypatch.setattr(train.Run, "train_phase", interrupted)
    assert call(monkeypatch, *TINY, "--seeds", 2, "--out", out) == 128 + signal.SIGTERM
    assert f"--resume {out}" in capsys.readouterr().err
    assert call(monkeypatch, *TINY, "--seeds", 2, "--out", out) == 2
    assert "holds an unfinished run" in capsys.readouterr().err
    monkeypatch.setattr(train.Run, "train_phase", train_phase)
    assert call(monkeypatch, "--resume", out) == 0
    printed = capsys.readouterr().out
    assert "seed0" not in printed, "the first is finished"
    assert_same_weights(finished, out / "seed0")
    runs = [json.loads((out / f"seed{seed}" / "summary.json").read_text()) for seed in (0, 1)]
    assert runs[0]["before"] != runs[1]["before"]
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert [name.strip() for name in rows] == ["Slot Attention, 8 steps", "+ IIO, 5 steps"]
    for row, key in zip(rows.values(), ("before", "after"), strict=True):
        a, b = (run[key]["ari"] for run in runs)
        assert row["ari_each"] == [a, b]
        assert row["ari"] == pytest.approx((a + b) / 2)
        assert row["ari_std"] == pytest.approx(abs(a - b) / 2**0.5)
        assert f"{100 * row['ari']:.2f} ± {100 * row['ari_std']:.2f}" in printed
    assert (out / "summary.md").read_text().count("\n| ") == 3
    assert call(monkeypatch, *TINY, "--seeds", 2, "--out", out) == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_table_1_compares_what_the_paper_does(tmp_path, monkeypatch):
    out = tmp_path / "table"
    assert call(monkeypatch, *TINY, "--table1", "--out", out) == 0
    rows = json.loads((out / "summary.json").read_text())["rows"]
    short = "Slot Attention, 8 steps"
    longer = [f"{short} + reconstruction, 5 steps", f"{short} + IIO, 5 steps"]
    assert list(rows) == [short, "Slot Attention, 32 steps", *longer]
    assert all(row["ari_std"] > 0 for row in rows.values()), "of one training, that over draws"
    # What is fine-tuned is what was pre-trained as long: the same as one run of both phases.
    assert call(monkeypatch, *TINY, "--out", tmp_path / "one") == 0
    assert_same_tensors(out / "seed0-plain" / "step-8.safetensors", tmp_path / "one" / "before.safetensors")
    runs = ("plain", "iio", "reconstruction")
    plain, tuned, longer = (json.loads((out / f"seed0-{run}" / "summary.json").read_text()) for run in runs)
    assert plain["step-8"] == tuned["before"] == longer["before"]
    # The baseline takes the same steps, of the same scenes at the same rates, on another loss.
    logs = [
        [json.loads(line) for line in (out / f"seed0-{run}" / "metrics.jsonl").read_text().splitlines()]
        for run in runs[1:]
    ]
    steps, longer_steps = ([(line["step"], line["lr"]) for line in log if "lr" in line] for log in logs)
    assert steps == longer_steps
    assert steps[-1][0] == 5
    assert [("iio" in line) for log in logs for line in log if "lr" in line] == [True] * 3 + [False] * 3
    assert len({line["gradient_norm"] for log in logs for line in log if line.get("step") == 2}) == 2


def test_table_1_without_its_longest_row(tmp_path, monkeypatch):
    out = tmp_path / "table"
    assert call(monkeypatch, *TINY, "--table1", "--no-long-row", "--seeds", 2, "--out", out) == 0
    rows = json.loads((out / "summary.json").read_text())["rows"]
    short = "Slot Attention, 8 steps"
    assert list(rows) == [short, f"{short} + reconstruction, 5 steps", f"{short} + IIO, 5 steps"]
    assert all(len(row["ari_each"]) == 2 for row in rows.values())


def test_a_signal_while_a_run_is_scored_stops_the_next(tmp_path, monkeypatch, capsys):
    out, score = tmp_path / "both", train.Run.score

    def signal_then_score(run, key, *arguments):
        if key == "after":
            signal.raise_signal(signal.SIGTERM)
        score(run, key, *arguments)

    monkeypatch.setattr(train.Run, "score", signal_then_score)
    assert call(monkeypatch, *TINY, "--seeds", 2, "--out", out) == 128 + signal.SIGTERM
    assert (out / "seed0" / "summary.json").exists(), "what was done is kept"
    assert not (out / "seed1").exists()


@pytest.mark.parametrize(
    "options",
    [["--score-steps", "1"], ["--from", "x.safetensors"], ["--steps", "0"]],
    ids=" ".join,
)
def test_table_1_refuses_what_would_make_it_another(tmp_path, monkeypatch, capsys, options):
    assert call(monkeypatch, *TINY, "--table1", *options, "--out", tmp_path / "run") == 2
    assert re.search("--table1 (takes|pre-trains)", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_fine_tuning_starts_from_the_weights_that_come_with_this(tmp_path, monkeypatch, capsys):
    options = ["--device", "cpu", "--fine-tune", "iio", "--fine-tune-steps", "1", "--eval-scenes", "6"]
    assert call(monkeypatch, "--from-pretrained", "--preset", "quick", *options, "--out", tmp_path / "run") == 0
    assert_same_tensors(tmp_path / "run" / "before.safetensors", train.PRETRAINED / "tetrominoes-before.safetensors")
    printed = capsys.readouterr().out
    assert "0 steps of pre-training, then 1 steps of fine-tuning" in printed
    assert "tetrominoes-before + IIO, 1 steps" in printed


def test_the_weights_that_come_with_this_score_as_they_say(monkeypatch, capsys):
    """As the file says of all 320 scenes, to what fewer scenes and another machine's rounding allow."""
    options = ["--device", "cpu", "--preset", "quick", "--eval-scenes", "64", "--eval-draws", "1"]
    assert call(monkeypatch, "--eval-only", "pretrained", *options) == 0
    printed = capsys.readouterr().out
    for name in ("before", "after"):
        _, about = train.read_weights(train.PRETRAINED / f"tetrominoes-{name}.safetensors")
        said = about["scores"]
        shown = re.search(rf"tetrominoes-{name}.safetensors, .* T 3 +(\S+) ± \S+ +(\S+)", printed)
        assert float(shown[1]) == pytest.approx(100 * said["ari"], abs=5)
        assert float(shown[2]) == pytest.approx(100 * said["fg_ari"], abs=5)
