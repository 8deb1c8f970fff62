"""The Slot Attention autoencoder is the paper's: layers, algorithm, invariances; and its shortcuts are exact."""

import json
import subprocess
from pathlib import Path

import plain
import pytest
import torch

from bench import ablations, runs, systems
from models.scene import signed
from models.slot_attention import ABLATIONS, SlotAttentionAutoEncoder
from training.building import build_model
from training.config import Config, to_json
from training.evaluation import SCORES
from training.losses import losses
from training.resolve import resolve


def shapes(module):
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def test_tetrominoes_layers_are_those_of_the_supplement():
    assert shapes(SlotAttentionAutoEncoder()) == {
        # Encoder: four 5x5 convolutions, position embedding, LayerNorm, MLP.
        "encoder.convs.0.weight": (32, 3, 5, 5),
        **{f"encoder.convs.{i}.weight": (32, 32, 5, 5) for i in (1, 2, 3)},
        **{f"encoder.convs.{i}.bias": (32,) for i in range(4)},
        **{"encoder.position.dense.weight": (32, 4), "encoder.position.dense.bias": (32,)},
        **{"encoder.norm.weight": (32,), "encoder.norm.bias": (32,)},
        **{f"encoder.mlp.{i}.weight": (32, 32) for i in (0, 2)},
        **{f"encoder.mlp.{i}.bias": (32,) for i in (0, 2)},
        # Slot Attention: D = 64, hidden 128.
        **{"slot_attention.mu": (1, 64), "slot_attention.log_sigma": (1, 64)},
        **{"slot_attention.norm_inputs.weight": (32,), "slot_attention.norm_inputs.bias": (32,)},
        **{f"slot_attention.{n}.{p}": (64,) for n in ("norm_slots", "norm_mlp") for p in ("weight", "bias")},
        **{"slot_attention.to_q.weight": (64, 64)},
        **{f"slot_attention.to_{n}.weight": (64, 32) for n in "kv"},
        **{f"slot_attention.gru.weight_{n}": (192, 64) for n in ("ih", "hh")},
        **{f"slot_attention.gru.bias_{n}": (192,) for n in ("ih", "hh")},
        **{"slot_attention.mlp.0.weight": (128, 64), "slot_attention.mlp.0.bias": (128,)},
        **{"slot_attention.mlp.2.weight": (64, 128), "slot_attention.mlp.2.bias": (64,)},
        # Decoder: three 5x5 convolutions on the broadcast slot, and a 3x3 one to RGB and alpha.
        **{"decoder.position.dense.weight": (64, 4), "decoder.position.dense.bias": (64,)},
        "decoder.convs.0.weight": (32, 64, 5, 5),
        **{f"decoder.convs.{i}.weight": (32, 32, 5, 5) for i in (1, 2)},
        **{f"decoder.convs.{i}.bias": (32,) for i in range(3)},
        **{"decoder.to_rgba.weight": (4, 32, 3, 3), "decoder.to_rgba.bias": (4,)},
    }


def test_clevr_decoder_is_strided():
    model = SlotAttentionAutoEncoder((128, 128), channels=64, strided=True, num_slots=7)
    convs = model.decoder.convs
    assert [c.stride[0] for c in convs] == [2, 2, 2, 2, 1]
    assert all(c.kernel_size == (5, 5) and c.in_channels == c.out_channels == 64 for c in convs)
    scene = model(torch.rand(1, 3, 128, 128))
    assert scene.decoded.shape == (1, 7, 4, 128, 128)
    with pytest.raises(ValueError, match="resolution"):
        SlotAttentionAutoEncoder((64, 64), strided=True)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_the_decoder_is_its_layers(strided, kernel_size):
    torch.manual_seed(0)
    resolution = (128, 128) if strided else (9, 7)
    decoder = SlotAttentionAutoEncoder(
        resolution, channels=3, slot_size=4, kernel_size=kernel_size, strided=strided
    ).decoder.double()
    slots = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    leaves = [slots, *decoder.parameters()]
    ours, expected = decoder(slots), plain.decode(decoder, slots)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    for x, y in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10 * y.abs().max().item())


def test_slot_attention_is_algorithm_1():
    torch.manual_seed(0)
    module = SlotAttentionAutoEncoder().slot_attention.double()
    inputs = torch.randn(2, 50, 32, dtype=torch.float64, requires_grad=True)
    slots = module.draw(torch.randn(2, 5, 64, dtype=torch.float64))
    ours, _ = module(inputs, slots, iterations=3)
    expected = plain.attend(module, inputs, slots, 3)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    parameters = [inputs, *module.parameters()]
    weights = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), parameters, retain_graph=True),
        torch.autograd.grad((expected * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return SlotAttentionAutoEncoder((15, 13), channels=8)


def test_what_a_scene_is_made_of(model):
    image = torch.rand(2, 3, 15, 13)
    scene = model(image)
    assert scene.slots.shape == (2, 4, 64)
    reconstruction, masks = scene.compose()
    torch.testing.assert_close(masks.sum(1), torch.ones(2, 15, 13))
    torch.testing.assert_close(scene.attention.sum(1), torch.ones(2, 15 * 13))
    torch.testing.assert_close(reconstruction, (masks[:, :, None] * scene.decoded[:, :, :3]).sum(1))
    objective, same, error = scene.objective(image)
    assert torch.equal(masks, same)
    assert objective is error
    torch.testing.assert_close(error, (reconstruction - signed(image)).square().mean())


def test_slots_and_iterations_per_call(model):
    image = torch.rand(2, 3, 15, 13)
    assert model(image, num_slots=7).decoded.shape == (2, 7, 4, 15, 13)
    slots = model.slot_attention.draw(torch.randn(2, 3, 64))
    once, twice = (model(image, slots=slots, iterations=t).slots for t in (1, 2))
    again = model(image, slots=once, iterations=1).slots
    torch.testing.assert_close(again, twice)
    assert not torch.equal(once, twice)
    with pytest.raises(ValueError, match="iterations: expected an int >= 1, got 0"):
        model(image, iterations=0)


def test_slots_are_drawn_by_the_noise(model):
    image, noise = torch.rand(2, 3, 15, 13), torch.randn(2, 4, 64)
    one, same, other = (model(image, noise=n).decoded for n in (noise, noise, -noise))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    torch.manual_seed(5)
    drawn = model(image).decoded
    torch.manual_seed(5)
    assert torch.equal(drawn, model(image, noise=torch.randn(2, 4, 64)).decoded)


def test_slots_are_exchangeable(model):
    image, order = torch.rand(1, 3, 15, 13), torch.tensor([2, 0, 3, 1])
    slots = model.slot_attention.draw(torch.randn(1, 4, 64))
    scene, permuted = model(image, slots=slots), model(image, slots=slots[:, order])
    torch.testing.assert_close(permuted.decoded, scene.decoded[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(permuted.compose()[0], scene.compose()[0], rtol=1e-4, atol=1e-5)


def test_a_wrong_image_is_refused(model):
    with pytest.raises(ValueError, match=r"image: expected shape \(B, 3, 15, 13\), got \(2, 1, 15, 13\)"):
        model(torch.rand(2, 1, 15, 13))


def test_bfloat16_autocast_keeps_the_masks_in_float32(model):
    with torch.autocast("cpu", torch.bfloat16):
        scene = model(torch.rand(2, 3, 15, 13))
        assert scene.decoded.dtype == torch.bfloat16
        assert {x.dtype for x in (*scene.compose(), *scene.objective(torch.rand(2, 3, 15, 13)))} == {torch.float32}


@pytest.mark.parametrize("phase", ["pre-training", "fine-tuning"])
def test_a_training_step_is_that_of_the_plain_model(phase):
    """Loss and gradients to all weights, of the whole model, against the same written out without kernels."""
    torch.manual_seed(0)
    config = resolve(Config(preset="smoke", device="cpu", precision="fp32"))
    model = build_model(config, (35, 35)).double()
    image = torch.rand(3, 3, 35, 35, dtype=torch.float64)
    noise = torch.randn(3, 4, 64, dtype=torch.float64)
    ours, _ = losses(model(image, noise=noise), image, phase, config)
    expected = plain.loss(model, image, noise, phase)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)
    leaves = list(model.parameters())
    gradients = [torch.autograd.grad(loss, leaves) for loss in (ours, expected)]
    norm = torch.stack([g.norm() for g in gradients[1]]).norm().item()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * norm)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_is_another_model_that_trains(name):
    sizes = dict(resolution=(9, 7), channels=8, kernel_size=3, num_slots=3)
    image, noise = torch.rand(2, 3, 9, 7), torch.randn(2, 3, 64)
    torch.manual_seed(0)
    published = SlotAttentionAutoEncoder(**sizes)
    torch.manual_seed(0)
    model = SlotAttentionAutoEncoder(**sizes, **ABLATIONS[name])
    gone = {"no-gru": "gru.", "no-mlp": "mlp.", "no-layernorm": "norm_", "no-position-embedding": "position.dense",
            "soft-k-means": "slot_attention."}  # fmt: skip
    new = {"weighted-sum-and-layernorm": {f"slot_attention.norm_updates.{p}" for p in ("weight", "bias")}}
    ours, theirs = shapes(model), shapes(published)
    missing = theirs.keys() - ours.keys()
    assert bool(missing) == (name in gone)
    assert all(gone[name] in parameter for parameter in missing)
    assert ours.keys() - theirs.keys() == new.get(name, set())
    # On the same weights, as far as both have them, an image is explained in another way.
    shared = {key: x for key, x in published.state_dict().items() if ours.get(key) == tuple(x.shape)}
    model.load_state_dict(shared, strict=False)
    # Nothing is to be seen of a different place for eps unless eps is to be seen.
    published.slot_attention.eps = model.slot_attention.eps = 1e-2
    scene = model(image, noise=noise)
    assert not torch.allclose(scene.slots, published(image, noise=noise).slots, rtol=1e-4, atol=1e-5)
    loss, *_ = scene.objective(image)
    loss.backward()
    unused = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not unused


def test_soft_k_means_learns_encoder_decoder_and_where_slots_begin():
    model = SlotAttentionAutoEncoder((9, 7), channels=8, slot_size=16, **ABLATIONS["soft-k-means"])
    assert {name for name in shapes(model) if name.startswith("slot_attention.")} == {
        "slot_attention.mu",
        "slot_attention.log_sigma",
    }
    assert model.encoder.mlp[2].out_features == 16, "slots are means of inputs"


def test_the_table_of_ablations(tmp_path, monkeypatch):
    """Each is trained once, by options that train.py has, in a folder of its own; what is finished is in the table."""
    fields = set(Config.__dataclass_fields__)
    assert all(fields >= changed.keys() for changed in ablations.VARIANTS.values())
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir(parents=True)
        scored = {f"{key}{std}": 0.5 for key in SCORES["discovery"] for std in ("", "_std")}
        (folder / "summary.json").write_text(json.dumps({"before": scored, "versions": {}, "config": {"out": "x"}}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(runs.subprocess, "run", run)
    runs.compare(tmp_path, "ablations", ablations.VARIANTS, [*ablations.QUICK, "--steps", "7"], "before")
    assert len(calls) == len(ablations.VARIANTS)
    assert all(command[2:4] == ["--preset", "quick"] and "7" in command for command in calls)
    assert ["--ablation", "no-gru"] in [command[-4:-2] for command in calls]
    runs.compare(tmp_path, "ablations", ablations.VARIANTS, ablations.QUICK, "before")
    assert len(calls) == len(ablations.VARIANTS)
    assert json.loads((tmp_path / "ablations.json").read_text())["rows"].keys() == ablations.VARIANTS.keys()
    lines = (tmp_path / "ablations.md").read_text().splitlines()
    assert len(lines) == 2 + len(ablations.VARIANTS)
    assert lines[2].startswith("| as published | 50.0 ± 50.0 |")


def test_the_table_of_systems_has_runs_that_count_epochs(tmp_path):
    """The paper's preset does, on a GPU."""
    scored = {f"{key}{std}": 0.5 for key in SCORES["discovery"] for std in ("", "_std")}
    config = to_json(resolve(Config(preset="paper", device="cpu")))
    for name in ("Slot Attention", "Slot Attention, untrained"):
        folder = runs.folder_of(tmp_path, name)
        folder.mkdir()
        summary = {"before": scored, "versions": {}, "seconds": 60.0, "config": config}
        (folder / "summary.json").write_text(json.dumps(summary))
    systems.summarise(tmp_path)
    assert "| 46,875 of 64, 1.0 |" in (tmp_path / "systems.md").read_text()
