"""The preset `paper` is what each paper prints; what else papers compare can be asked for, and weights say it."""

import dataclasses
import json
import signal
from pathlib import Path

import clevr_folder
import pytest
import torch
from commands import PLAIN, SCORE, assert_refused_before_any_work, assert_same_tensors, call
from safetensors.torch import save as to_safetensors

from data import DATASETS
from iio_kernels.nn import SlotAttention
from models.slot_attention import SlotAttentionAutoEncoder
from training.building import build_model
from training.config import Config, to_json
from training.metrics_log import Metrics
from training.resolve import resolve
from training.run_folder import reopen_run
from training.schedule import learning_rate, phase_steps
from training.weights import ARCHITECTURE, read_weights, save_weights


def paper(**options):
    """What the preset resolves to; files are not opened for it."""
    options.setdefault("dataset", "tetrominoes")
    if DATASETS[options["dataset"]].generator is None:
        options["data"] = Path("scenes.tfrecords")
    return resolve(Config(preset="paper", device="cpu", **options))


def rate(step, config):
    return learning_rate(step, "pre-training", config)


@pytest.mark.parametrize("model", ["slot-attention", "slot-mlp"])
@pytest.mark.parametrize(
    ("dataset", "steps", "channels"),
    [("tetrominoes", 46_875, 32), ("multi-dsprites", 500_000, 32), ("clevr6", 500_000, 64)],
)
def test_slot_attention_trains_as_long_as_its_supplement_says(model, dataset, steps, channels):
    """Table 10; on Tetrominoes the IIO paper's 50 epochs."""
    config = paper(model=model, dataset=dataset)
    assert phase_steps(config) == {"pre-training": steps}
    assert (config.batch_size, config.optimizer, config.clip, config.channels) == (64, "adam", 0, channels)
    assert rate(9_999, config) == pytest.approx(4e-4 * 0.5**0.1, rel=1e-3)
    assert rate(99_999, config) == pytest.approx(2e-4, rel=1e-3)
    assert config.eval_scenes == (1000 if dataset == "tetrominoes" else 320)


def test_another_length_than_the_papers_can_be_asked_for():
    assert phase_steps(paper(dataset="multi-dsprites", epochs=2)) == {"pre-training": 1875}
    assert phase_steps(paper(dataset="multi-dsprites", steps=7)) == {"pre-training": 7}


#: Of IODINE's appendix C: D, K; channels and size of the decoder's convolutions; and of the refinement network the
#: convolutions' channels, stride and number, the MLP and the LSTM.
IODINES = {
    "tetrominoes": (32, 4, (32, 5), (32, 1, 3), [128], None),
    "multi-dsprites": (16, 6, (32, 5), (32, 1, 3), [128], 128),
    "clevr6": (64, 7, (64, 3), (64, 2, 4), [256], 256),
}


@pytest.mark.parametrize("dataset", IODINES)
def test_iodine_is_its_printed_text(dataset):
    config = paper(model="iodine", dataset=dataset)
    assert phase_steps(config) == {"pre-training": 1_000_000}
    assert (config.batch_size, config.optimizer, config.clip, config.pixel_sigma) == (32, "adam", 5, 0.1)
    assert rate(0, config) == pytest.approx(3e-4)
    assert rate(999_999, config) == pytest.approx(3e-4, rel=1e-3)
    model = build_model(config, DATASETS[dataset].size)
    D, K, decoder, refinement, mlp, lstm = IODINES[dataset]
    assert model.noise_shape == (5, K, D), "T = 5 losses"
    assert model.weigh_first
    assert model.sigma == 0.1
    *hidden, last = model.decoder.convs
    assert [(conv.out_channels, conv.kernel_size[0]) for conv in hidden] == [decoder] * 4
    assert last.out_channels == 4
    convs = model.refinement.convs
    assert [(conv.out_channels, conv.stride[0]) for conv in convs] == [refinement[:2]] * refinement[2]
    assert all(conv.kernel_size[0] == decoder[1] for conv in convs)
    assert [layer.out_features for layer in model.refinement.mlp if isinstance(layer, torch.nn.Linear)] == mlp
    assert (model.refinement.lstm.hidden_size if model.refinement.lstm else None) == lstm
    assert model.refinement.head.out_features == 2 * D


def test_iodines_program_can_be_asked_for():
    config = paper(model="iodine", dataset="clevr6", iodine_source="program")
    model = build_model(config, (128, 128))
    assert model.noise_shape == (6, 7, 64)
    assert [layer.out_features for layer in model.refinement.mlp if isinstance(layer, torch.nn.Linear)] == [256, 256]


def test_monet_is_its_appendix_or_what_iodine_compares_with():
    config = paper(model="monet", dataset="multi-dsprites")
    assert (config.optimizer, config.lr, config.batch_size, config.steps) == ("rmsprop", 1e-4, 64, 1_000_000)
    model = build_model(config, (64, 64))
    assert (model.sigma_first, model.sigma, model.beta, model.gamma) == (0.09, 0.11, 0.5, 0.5)
    config = paper(model="monet", dataset="multi-dsprites", pixel_sigma=0.1, background_sigma=0.06)
    model = build_model(config, (64, 64))
    assert (model.sigma_first, model.sigma) == (0.06, 0.1)


@pytest.mark.parametrize(
    ("options", "unsaid", "meant"),
    [
        (
            {"model": "iodine"},
            ("iodine_source", "background_sigma", "network_of"),
            {"iodine_source": "program", "network_of": "tetrominoes"},
        ),
        (
            {"model": "monet"},
            ("iodine_source", "pixel_sigma", "background_sigma"),
            {"pixel_sigma": 0.11, "background_sigma": 0.09},
        ),
        ({"model": "slot-mlp"}, ("iodine_source", "background_sigma"), {"iodine_source": None}),
    ],
)
def test_weights_say_what_changes_the_network_and_older_ones_mean_what_they_meant(options, unsaid, meant, tmp_path):
    weights, anything = tmp_path / "x.safetensors", torch.nn.Linear(1, 1)
    asked = {"iodine": {"iodine_source": "text"}, "monet": {"pixel_sigma": 0.1, "background_sigma": 0.06}}
    asked = asked.get(options["model"], {})
    config = resolve(Config(preset="smoke", device="cpu", **options, **asked))
    save_weights(weights, anything, config, {})
    scored = resolve(Config(eval_only=weights, preset="smoke", device="cpu"))
    assert {name: getattr(scored, name) for name in asked} == asked
    _, about = read_weights(weights)
    for name in unsaid:
        del about["architecture"][name]
    older = {"iio_kernels": json.dumps(about)}
    (tmp_path / "older.safetensors").write_bytes(to_safetensors(anything.state_dict(), older))
    scored = resolve(Config(eval_only=tmp_path / "older.safetensors", preset="smoke", device="cpu"))
    assert {name: getattr(scored, name) for name in meant} == meant
    # And so do runs that an older version began.
    saved = to_json(config)
    for name in (*unsaid, "initial_weights", "gradient", "neumann_terms"):
        saved.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(saved))
    resumed, _ = reopen_run(Config(resume=tmp_path))
    assert {name: getattr(resumed, name) for name in meant} == meant
    assert (resumed.initial_weights, resumed.gradient) == ("own", "unrolled")


@pytest.mark.parametrize("task", ["discovery", "set-prediction"])
@pytest.mark.parametrize(("gradient", "terms"), [("unrolled", 0), ("implicit", 0), ("implicit", 3), ("bilevel", 0)])
def test_gradients_are_those_of_the_module(task, gradient, terms):
    dataset = "tetrominoes" if task == "discovery" else "clevr-like"
    config = Config(task=task, dataset=dataset, preset="smoke", device="cpu", gradient=gradient)
    config = resolve(dataclasses.replace(config, neumann_terms=terms))
    model = build_model(config, (24, 24))
    (module,) = [m for m in model.modules() if isinstance(m, SlotAttention)]
    assert (module.gradient, module.neumann_terms) == (gradient, terms)
    # They are a matter of training alone: weights do not know them.
    assert not {"gradient", "neumann_terms"} & set(ARCHITECTURE)


REFUSED = {
    "gradients of another model": (
        ["--model", "slot-mlp", "--gradient", "implicit"],
        "--gradient is for --model slot-attention",
    ),
    "an ablation of another model": (
        ["--model", "slot-mlp", "--ablation", "no-gru"],
        "--ablation is for --task discovery --model slot-attention",
    ),
    "terms of no series": (["--neumann-terms", "1"], "--neumann-terms is for --gradient implicit"),
    "terms after every iteration": (
        ["--task", "set-prediction", "--dataset", "clevr-like", "--gradient", "implicit", "--neumann-terms", "1",
         "--stepwise-loss"],
        "--neumann-terms is for --gradient implicit, without --stepwise-loss",
    ),
    "terms of one iteration": (
        ["--gradient", "implicit", "--neumann-terms", "1", "--iterations", "1"],
        "takes at least 2 --iterations, got 1",
    ),
    "fewer than no terms": (["--neumann-terms", "-1"], "--neumann-terms: expected a number >= 0, got -1"),
    "the background of another model": (["--background-sigma", "0.1"], "--background-sigma: slot-attention has no"),
    "no background": (
        ["--model", "monet", "--background-sigma", "0"],
        "--background-sigma: expected a number > 0, got 0",
    ),
    "the source of another model": (["--iodine-source", "text"], "--iodine-source: slot-attention has no such size"),
    "slots that are no means": (
        ["--ablation", "soft-k-means", "--input-size", "32"],
        "--input-size 32: --ablation soft-k-means takes inputs as wide as slots, 64",
    ),
    "a rule for given weights": (
        ["--from-pretrained", "--fine-tune", "iio", "--initial-weights", "keras", "--device", "cpu"],
        "--initial-weights: these weights are the initial ones; leave it out",
    ),
    "segments that nobody knows": (["--dataset", "clevr", "--data", "."], "does not tell which pixels are whose"),
    "CLEVR from nowhere": (
        ["--dataset", "clevr", "--task", "set-prediction"],
        "cannot be generated: give its folder as --data",
    ),
    "CLEVR from an empty folder": (
        ["--dataset", "clevr", "--task", "set-prediction", "--data", "."],
        "--data: [Errno 2] expected scenes/CLEVR_train_scenes.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_run_is_refused_before_any_work(arguments, words, tmp_path, monkeypatch, capsys):
    assert_refused_before_any_work(arguments, words, tmp_path, monkeypatch, capsys)


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        ["--ablation", "soft-k-means", "--gradient", "bilevel"],
        ["--ablation", "weighted-sum-and-layernorm", "--gradient", "implicit", "--neumann-terms", "1"],
        ["--model", "iodine", "--iodine-source", "text"],
    ],
    ids=" ".join,
)
def test_what_papers_compare_trains_resumes_and_is_scored(options, tmp_path, monkeypatch, capsys):
    options = [*PLAIN, *options, "--steps", "4", "--eval-draws", "1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call(monkeypatch, *options, "--out", whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "log", interrupting(Metrics.log, at=2))
        assert call(patch, *options, "--out", cut) == 130
    assert call(monkeypatch, "--resume", cut) == 0
    assert_same_tensors(whole / "before.safetensors", cut / "before.safetensors")
    capsys.readouterr()
    arguments = [*SCORE, whole / "before.safetensors", "--eval-draws", "1", "--preset", "smoke"]
    assert call(monkeypatch, *arguments) == 0
    scored = json.loads((whole / "summary.json").read_text())["before"]
    assert f"{100 * scored['ari']:.2f} ± 0.00" in capsys.readouterr().out


def interrupting(log, at):
    """`Metrics.log` that interrupts the run at a step."""

    def log_and_interrupt(self, step, **values):
        log(self, step, **values)
        if step == at:
            signal.raise_signal(signal.SIGINT)

    return log_and_interrupt


def test_implicit_gradients_leave_the_initial_slots_alone_and_bilevel_ones_do_not():
    """As in training: of a whole model's loss."""
    torch.manual_seed(0)
    image, noise = torch.rand(2, 3, 12, 12), torch.randn(2, 4, 64)
    moved = {}
    for gradient in ("implicit", "bilevel"):
        model = SlotAttentionAutoEncoder((12, 12), channels=4, slot_attention={"gradient": gradient})
        model(image, noise=noise).objective(image)[0].backward()
        moved[gradient] = model.slot_attention.mu.grad is not None
    assert moved == {"implicit": False, "bilevel": True}


def test_sets_of_the_original_clevr(tmp_path, monkeypatch, capsys):
    """Trained on the first scenes of the folder, scored on the next, and later on no scene that was trained on."""
    folder, out = tmp_path / "CLEVR_v1.0", tmp_path / "run"
    folder.mkdir()
    clevr_folder.write(folder, {"train": (3, 4, 5, 6, 7, 8), "val": (9, 10)})
    options = ["--task", "set-prediction", "--dataset", "clevr", "--data", folder, "--preset", "smoke", "--device"]
    options += ["cpu", "--steps", "2", "--num-scenes", "6", "--eval-scenes", "2", "--eval-draws", "1"]
    assert call(monkeypatch, *options, "--batch-size", "3", "--out", out) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["before"]["by_objects"].keys() == {"9", "10"}
    assert (out / "objects.png").exists()
    score = ["--eval-only", out / "before.safetensors", "--dataset", "clevr", "--data", folder, "--device", "cpu"]
    assert call(monkeypatch, *score, "--eval-scenes", "2", "--eval-draws", "1") == 0
    assert "Scores on 2 scenes from number 6 on" in capsys.readouterr().out
    assert call(monkeypatch, *score, "--eval-scenes", "3") == 2
    assert "was trained on the first 6; expected at most 2" in capsys.readouterr().err


def test_the_papers_scenes_of_clevr_are_its_two_splits():
    config = paper(task="set-prediction", dataset="clevr")
    assert (config.num_scenes, config.eval_scenes, config.num_slots) == (70_000, 15_000, 10)
