"""What a preset fills in, and what cannot run."""

import pytest
import torch
from commands import assert_refused_before_any_work, call

from data import DATASETS
from models import MODELS
from training.building import build_model
from training.config import Config, UsageError
from training.networks import NETWORK_OF, NETWORKS
from training.resolve import resolve
from training.weights import ARCHITECTURE, save_weights

REFUSED = {
    "an unknown option": (["--learning-rate", "1"], "learning-rate"),
    "a value of another type": (["--seed", "one"], "seed"),
    "an unknown preset": (["--preset", "fast"], "preset"),
    "steps and epochs": (["--steps", "1", "--epochs", "1"], "exclude each other"),
    "no scenes": (["--num-scenes", "0"], "--num-scenes: expected at least 1, got 0"),
    "a negative rate": (["--lr", "-1"], "--lr: expected a number >= 0, got -1"),
    "a rate that is no number": (["--lr", "nan"], "--lr: expected a number >= 0, got nan"),
    "an even kernel": (["--kernel-size", "4"], "--kernel-size: expected an odd number, got 4"),
    "an even Gaussian": (["--iio-kernel-size", "4"], "--iio-kernel-size: expected an odd number, got 4"),
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
    "the task of weights": (["--from-pretrained", "--task", "set-prediction"], "--task: weights bring their own"),
    "a network for other images": (
        ["--network-of", "clevr6"],
        "--model slot-attention: resolution: the strided decoder makes (128, 128) images, got (35, 35)",
    ),
    "a network of a model that has one": (
        ["--model", "monet", "--network-of", "clevr6"],
        "--network-of: monet has no such size",
    ),
    "the model of weights": (
        ["--from-pretrained", "--model", "slot-mlp"],
        "--model slot-mlp: tetrominoes-before.safetensors has weights of slot-attention",
    ),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_run_is_refused_before_any_work(arguments, words, tmp_path, monkeypatch, capsys):
    assert_refused_before_any_work(arguments, words, tmp_path, monkeypatch, capsys)


def test_a_model_has_the_same_sizes_in_every_preset():
    """The preset leaves none of them open, and sets none that the network has not."""
    for recipe in (recipe for recipes in MODELS.values() for recipe in recipes.values()):
        sizes = set(recipe.options) & set(ARCHITECTURE) - {"ablation", "network_of", "num_slots"}
        for name, values in (*recipe.presets.items(), *recipe.published.items()):
            set_by_it = values.keys() & ARCHITECTURE
            assert set_by_it == sizes if name in recipe.presets else set_by_it <= sizes, (recipe.model, name)


def test_fewer_slots_than_objects_are_told(capsys):
    resolve(Config(task="set-prediction", dataset="clevr-like", device="cpu", num_slots=10))
    assert capsys.readouterr().out == ""
    resolve(Config(task="set-prediction", dataset="clevr-like", device="cpu", num_slots=9))
    assert "K 9 is fewer than the 10 objects" in capsys.readouterr().out


def test_every_data_set_names_the_network_it_takes():
    assert NETWORK_OF.keys() <= DATASETS.keys()  # others take the first, and say so
    assert set(NETWORK_OF.values()) == set(NETWORKS)


def test_a_data_set_that_names_no_network_takes_that_of_any_size_and_says_so(monkeypatch, capsys):
    """Not that of the data set whose images are as large."""
    monkeypatch.delitem(NETWORK_OF, "clevr6-like")
    options = dict(dataset="clevr6-like", device="cpu", preset="smoke")
    config = resolve(Config(**options))
    assert config.network_of == "tetrominoes"
    assert not build_model(config, DATASETS["clevr6-like"].size).decoder.strided
    assert "No network is published for clevr6-like: this one is tetrominoes's" in capsys.readouterr().out
    config = resolve(Config(**options, network_of="clevr6"))
    assert build_model(config, DATASETS["clevr6-like"].size).decoder.strided


@pytest.mark.parametrize("model", [None, "slot-mlp", "slot-attention"])
def test_the_model_of_weights_may_be_said_but_not_another(model, tmp_path):
    weights, config = tmp_path / "x.safetensors", resolve(Config(model="slot-mlp", preset="smoke", device="cpu"))
    save_weights(weights, torch.nn.Linear(1, 1), config, {})
    given = Config(model=model, from_=weights, preset="smoke", device="cpu", num_scenes=256)
    if model == "slot-attention":
        with pytest.raises(UsageError, match=r"--model slot-attention: x\.safetensors has weights of slot-mlp"):
            resolve(given)
    else:
        assert resolve(given).model == "slot-mlp"


def test_options_are_shown_in_groups(monkeypatch, capsys):
    assert call(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    places = [shown.index(f" {group} options ") for group in ("Task", "Data", "Model", "Optimization", "IIO", "Output")]
    assert places == sorted(places)
    assert shown.index("--iio-kernel-size") > places[4]
