"""Files of weights: what they tell, and training from them."""

import dataclasses
import json
import re

import pytest
import torch
from commands import PLAIN, SCORE, assert_same_tensors, call
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from training.config import Config, UsageError
from training.resolve import resolve
from training.weights import PRETRAINED, read_weights, save_weights


@pytest.mark.long
def test_from_starts_with_given_weights_and_their_architecture(finished, tmp_path, monkeypatch):
    arguments = [*PLAIN, "--steps", "0"]
    arguments += ["--from", finished / "after.safetensors", "--out", tmp_path / "run"]
    assert call(monkeypatch, *arguments) == 0
    assert_same_tensors(tmp_path / "run" / "before.safetensors", finished / "after.safetensors")


def test_iterations_of_weights_that_have_none_are_refused(tmp_path):
    config = resolve(Config(model="slot-mlp", preset="smoke", device="cpu"))
    save_weights(tmp_path / "x.safetensors", torch.nn.Linear(1, 1), config, {})
    scored = Config(eval_only=tmp_path / "x.safetensors", preset="smoke", device="cpu")
    assert resolve(scored).model == "slot-mlp"
    with pytest.raises(UsageError, match="--iterations: slot-mlp has no such size"):
        resolve(dataclasses.replace(scored, iterations=5))
    with pytest.raises(UsageError, match="--num-slots: slot-mlp has as many slots as it was trained with"):
        resolve(dataclasses.replace(scored, num_slots=9))
    sets = dict(task="set-prediction", dataset="clevr-like", preset="smoke", device="cpu")
    config = resolve(Config(model="dspn", **sets))
    save_weights(tmp_path / "x.safetensors", torch.nn.Linear(1, 1), config, {})
    with pytest.raises(UsageError, match="--num-slots: dspn has as many slots as it was trained with"):
        resolve(dataclasses.replace(scored, dataset="clevr-like", num_slots=9))


def test_weights_say_what_they_were_trained_on(finished):
    weights = finished / "before.safetensors"
    with pytest.raises(UsageError, match="trained on tetrominoes, whose images have another"):
        resolve(Config(eval_only=weights, dataset="shapes", preset="smoke", device="cpu"))


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


@pytest.mark.long
def test_fine_tuning_starts_from_the_weights_that_come_with_this(tmp_path, monkeypatch, capsys):
    options = ["--device", "cpu", "--fine-tune", "iio", "--fine-tune-steps", "1", "--eval-scenes", "6"]
    assert call(monkeypatch, "--from-pretrained", "--preset", "quick", *options, "--out", tmp_path / "run") == 0
    assert_same_tensors(tmp_path / "run" / "before.safetensors", PRETRAINED / "tetrominoes-before.safetensors")
    printed = capsys.readouterr().out
    assert "0 steps of pre-training, then 1 steps of fine-tuning" in printed
    assert "tetrominoes-before + IIO, 1 steps" in printed


def test_what_weights_carry_in_the_form_of_earlier_versions(whole, tmp_path, monkeypatch, capsys):
    tensors, carried = read_weights(whole / "before.safetensors")
    old = {"architecture": json.dumps(carried["architecture"]), "scores": json.dumps(carried["scores"])}
    old |= {"num_scenes": str(carried["num_scenes"]), "dataset": carried["dataset"], "data": "", "format": "pt"}
    save_file(tensors, tmp_path / "before.safetensors", old)
    printed = []
    for weights in (whole / "before.safetensors", tmp_path / "before.safetensors"):
        assert call(monkeypatch, *SCORE, weights) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "from number 40 on" in printed[0]
