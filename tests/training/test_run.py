"""What a run leaves, from every model, and that equal runs are equal."""

import json
import os
import re
import signal

import pytest
import torch
from commands import PLAIN, SCORE, SHORT, TINY, assert_same_tensors, assert_same_weights, call
from safetensors.torch import load_file

import train
import training.scoring
from models import MODELS
from models.slot_attention import PRESETS
from training.config import Config
from training.metrics_log import Metrics
from training.run_folder import PICTURES
from training.tables import PERCENT
from training.weights import save_weights


def test_what_a_run_leaves(finished):
    summary = json.loads((finished / "summary.json").read_text())
    for when in ("before", "after"):
        assert {"ari", "fg_ari", "miou", "mse"} <= summary[when].keys()
        assert -1 <= summary[when]["ari"] <= 1
        assert summary[when]["mse"] > 0
    assert summary["config"]["steps"] == 8
    assert summary["config"]["lr"] == PRESETS["smoke"]["lr"]
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


@pytest.mark.long
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(finished, tmp_path, monkeypatch):
    assert call(monkeypatch, *TINY, "--out", tmp_path / "again") == 0
    assert_same_weights(finished, tmp_path / "again")
    assert call(monkeypatch, *TINY, "--seed", 1, "--out", tmp_path / "other") == 0
    assert not torch.equal(
        load_file(finished / "after.safetensors")["slot_attention.mu"],
        load_file(tmp_path / "other" / "after.safetensors")["slot_attention.mu"],
    )


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


SETS = ["--task", "set-prediction", "--dataset", "clevr-like"]
#: What can be trained besides Slot Attention that discovers objects.
OTHERS = {
    f"{model}, {task}": ["--model", model, *(SETS if task == "set-prediction" else [])]
    for model, recipes in MODELS.items()
    for task in recipes
    if (model, task) != ("slot-attention", "discovery")
}
OTHERS["slot-attention, set-prediction"] += ["--stepwise-loss"]


@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS)
def test_every_model_trains_and_resumes_exactly(name, tmp_path, monkeypatch, capsys):
    options = [*PLAIN, *OTHERS[name], "--steps", "6", "--eval-draws", "1"]
    if "--task" not in options:
        options += ["--fine-tune", "iio", "--fine-tune-steps", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call(monkeypatch, *options, "--out", whole) == 0
    log = Metrics.log

    def log_and_interrupt(self, step, **values):
        log(self, step, **values)
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "log", log_and_interrupt)
        assert call(patch, *options, "--out", cut) == 128 + signal.SIGINT
    assert call(monkeypatch, "--resume", cut) == 0
    for file in whole.glob("*.safetensors"):
        assert_same_tensors(file, cut / file.name)
    first, second = (json.loads((run / "summary.json").read_text())["before"] for run in (whole, cut))
    assert first == second
    assert (whole / PICTURES["set-prediction" if "--task" in options else "discovery"]).exists()
    capsys.readouterr()
    assert call(monkeypatch, *SCORE, whole / "before.safetensors", "--dataset", first_dataset(options),
                "--eval-draws", "1", "--preset", "smoke") == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert all(f"{100 * value:.2f} ± 0.00" in printed for key, value in first.items() if key in PERCENT)


def first_dataset(options):
    return options[options.index("--dataset") + 1] if "--dataset" in options else "tetrominoes"


def test_ctrl_c_before_and_after_a_training_ends_in_a_line(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "open_scenes", interrupt)
    monkeypatch.setattr(training.scoring, "open_scenes", interrupt)
    for options in (PLAIN, [*SCORE, "pretrained"]):
        assert call(monkeypatch, *options) == 130
        assert capsys.readouterr().err == "\ntrain.py: interrupted\n"


@pytest.mark.long
def test_scores_and_weights_on_the_way(tmp_path, monkeypatch):
    assert call(monkeypatch, *TINY, "--score-steps", 3, 5, "--out", tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for steps in (3, 5):
        short = tmp_path / str(steps)
        # The learning rate does not depend on the number of steps, so a shorter run is the beginning of a longer one.
        assert call(monkeypatch, *PLAIN, "--steps", steps, "--out", short) == 0
        assert_same_tensors(tmp_path / "run" / f"step-{steps}.safetensors", short / "before.safetensors")
        assert summary[f"step-{steps}"] == json.loads((short / "summary.json").read_text())["before"]


def test_equal_runs_leave_equal_files(whole, tmp_path, monkeypatch):
    assert call(monkeypatch, *SHORT, "--out", tmp_path / "again") == 0
    for name in ("before.safetensors", "masks.png"):
        assert (whole / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    layer = torch.nn.Linear(1, 1)
    for number in range(10):
        save_weights(tmp_path / f"{number}.safetensors", layer, Config(), {"ari": 0.5})
    assert len({file.read_bytes() for file in tmp_path.glob("*.safetensors")}) == 1
