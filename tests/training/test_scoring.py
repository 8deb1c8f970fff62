"""Scoring given weights."""

import json
import re

import numpy as np
import pytest
import torch
from commands import PLAIN, SAMPLE, SCORE, call, needs_dev_full

import training.scoring
from data import DATASETS
from training.config import Config
from training.evaluation import evaluate
from training.resolve import resolve
from training.weights import PRETRAINED, read_weights


def test_eval_only_scores_as_the_run_did(finished, monkeypatch, capsys):
    assert call(monkeypatch, *SCORE, finished / "after.safetensors") == 0
    scored = json.loads((finished / "summary.json").read_text())["after"]
    assert f"{100 * scored['ari']:.2f} ± {100 * scored['ari_std']:.2f}" in capsys.readouterr().out


@pytest.mark.skipif(not SAMPLE.exists(), reason="needs a file of the published data set")
def test_eval_only_on_the_published_file(finished, monkeypatch, capsys):
    arguments = ["--eval-only", finished / "after.safetensors", "--data", SAMPLE, "--device", "cpu"]
    assert call(monkeypatch, *arguments) == 0
    assert "Scores on 6 scenes from number 0 on" in capsys.readouterr().out


@pytest.mark.long
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


def test_set_prediction_is_scored_by_number_of_objects():
    """All scenes together, and those of one number of objects alone."""
    config = resolve(Config(task="set-prediction", dataset="clevr-like", preset="smoke", device="cpu"))
    objects = torch.zeros(2, 10, 19)
    objects[0, :3, 18] = objects[1, :5, 18] = 1
    objects[:, :, [3, 5, 7, 10]] = 1
    objects[:, :, 0] = torch.arange(10) / 10

    class Source:
        size = (8, 8)

        def images(self, indices, device):
            return torch.zeros(len(indices), 3, *self.size, dtype=torch.uint8)

        def properties(self, indices, device):
            return objects[indices]

    class Model(torch.nn.Module):
        noise_shape = (0,)

        def forward(self, image, noise):
            return objects[: len(image)] * torch.tensor([1.0, 0.0]).view(2, 1, 1)  # knows the first scene alone

    scored = evaluate(Model(), Source(), torch.arange(2), 1, config)
    assert scored["by_objects"][3]["ap_inf"] == 1
    assert scored["by_objects"][5]["ap_inf"] < 1
    assert scored["by_objects"][5]["ap_inf"] < scored["ap_inf"] < 1


def test_other_numbers_of_slots_and_iterations_than_in_training(finished, tmp_path, monkeypatch, capsys):
    scores = []
    for options, name in ([], "K 4, T 3"), (["--num-slots", "6"], "K 6, T 3"), (["--iterations", "1"], "K 4, T 1"):
        weights, out = finished / "before.safetensors", tmp_path / name
        assert call(monkeypatch, *SCORE, weights, *options, "--out", out) == 0
        assert f"before.safetensors, Slot Attention, {name}" in capsys.readouterr().out
        scores.append(json.loads((out / "scores.json").read_text())["rows"].popitem()[1]["ari"])
    assert len(set(scores)) == 3


def test_the_weights_that_come_with_this_score_as_they_say(monkeypatch, capsys):
    """As the file says of all 320 scenes, to what fewer scenes and another machine's rounding allow."""
    options = ["--device", "cpu", "--preset", "quick", "--eval-scenes", "64", "--eval-draws", "1"]
    assert call(monkeypatch, "--eval-only", "pretrained", *options) == 0
    printed = capsys.readouterr().out
    for name in ("before", "after"):
        _, about = read_weights(PRETRAINED / f"tetrominoes-{name}.safetensors")
        said = about["scores"]
        shown = re.search(rf"tetrominoes-{name}.safetensors, .* T 3 +(\S+) ± \S+ +(\S+)", printed)
        assert float(shown[1]) == pytest.approx(100 * said["ari"], abs=5)
        assert float(shown[2]) == pytest.approx(100 * said["fg_ari"], abs=5)


def test_no_room_for_scores_is_told_before_scoring(whole, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(training.scoring, "evaluate", None)
    assert call(monkeypatch, *SCORE, whole / "before.safetensors", "--out", tmp_path / "file") == 2
    assert "--out: cannot write to" in capsys.readouterr().err


@needs_dev_full
def test_scores_that_cannot_be_kept_are_printed(whole, tmp_path, monkeypatch, capsys):
    (tmp_path / "scores.json.tmp").symlink_to("/dev/full")
    assert call(monkeypatch, *SCORE, whole / "before.safetensors", "--out", tmp_path) == 2
    printed = capsys.readouterr()
    assert "No space left on device" in printed.err
    assert "Scores on 6 scenes" in printed.out
    assert not list(tmp_path.iterdir())
