"""Initial weights are those of the library that a program is written in: size, shape of the distribution, biases."""

import pytest
import torch
from torch import nn

from models.initial_weights import LAYERS, RULES
from training.building import build_model
from training.config import Config
from training.resolve import resolve


class Model(nn.Module):
    """A layer of each kind, wide enough to tell a distribution by."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.without = nn.Linear(300, 200), nn.Linear(300, 200, bias=False)
        self.conv, self.transposed = nn.Conv2d(30, 50, 5), nn.ConvTranspose2d(30, 50, 5, 2)
        self.gru, self.lstm = nn.GRUCell(80, 100), nn.LSTMCell(80, 100)
        self.norm, self.own = nn.LayerNorm(7), nn.Parameter(torch.full((3,), 5.0))


#: The deviation of each weight, and the largest number that it can hold, in units of that.
WEIGHTS = {
    "keras": {
        "linear": ((2 / (300 + 200)) ** 0.5, 3**0.5),
        "without": ((2 / (300 + 200)) ** 0.5, 3**0.5),
        "conv": ((2 / (25 * (30 + 50))) ** 0.5, 3**0.5),
        "transposed": ((2 / (25 * (30 + 50))) ** 0.5, 3**0.5),
        # All three or four gates are one matrix.
        "gru.weight_ih": ((2 / (80 + 300)) ** 0.5, 3**0.5),
        "lstm.weight_ih": ((2 / (80 + 400)) ** 0.5, 3**0.5),
    },
    # A normal distribution without what lies beyond 2 has a deviation of 0.8796.
    "sonnet": {
        "linear": (0.8796 * 300**-0.5, 2 / 0.8796),
        "without": (0.8796 * 300**-0.5, 2 / 0.8796),
        "conv": (0.8796 * (25 * 30) ** -0.5, 2 / 0.8796),
        "transposed": (0.8796 * (25 * 30) ** -0.5, 2 / 0.8796),
        "gru.weight_ih": (0.8796 * 180**-0.5, 2 / 0.8796),
        "lstm.weight_ih": (0.8796 * 180**-0.5, 2 / 0.8796),
        "lstm.weight_hh": (0.8796 * 180**-0.5, 2 / 0.8796),
    },
}


@pytest.mark.parametrize("rule", WEIGHTS)
def test_a_rule(rule):
    model = Model()
    RULES[rule](model)
    parameters = dict(model.named_parameters())
    for name, (deviation, largest) in WEIGHTS[rule].items():
        weight = parameters[name if "." in name else f"{name}.weight"]
        assert weight.std().item() == pytest.approx(deviation, rel=0.03), name
        assert abs(weight.mean().item()) < 0.03 * deviation, name
        assert weight.abs().max().item() == pytest.approx(largest * deviation, rel=0.01), name
    for name, bias in parameters.items():
        if "bias" in name and name != "lstm.bias_ih":
            assert not bias.any(), name
    assert model.lstm.bias_ih.view(4, 100).mean(1).tolist() == [0, 1, 0, 0]
    assert model.norm.weight.eq(1).all()
    assert model.own.eq(5).all()


def test_recurrent_weights_of_keras_are_orthogonal():
    model = Model()
    RULES["keras"](model)
    for cell in (model.gru, model.lstm):
        torch.testing.assert_close(cell.weight_hh.mT @ cell.weight_hh, torch.eye(100), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "rule"), [("slot-attention", "keras"), ("slot-mlp", "keras"), ("iodine", "sonnet"), ("monet", "sonnet")]
)
def test_the_paper_preset_draws_weights_as_the_program_does(model, rule):
    options = dict(model=model, device="cpu", channels=2, num_slots=2, slot_size=4)
    config = resolve(Config(preset="paper", **options))
    assert config.initial_weights == rule
    built = build_model(config, (32, 32))
    biases = [layer.bias for layer in built.modules() if isinstance(layer, LAYERS) and layer.bias is not None]
    assert len(biases) > 5
    assert not any(bias.any() for bias in biases)
    # Others draw as models/ has it, as before: their figures' seeds stay.
    plain = build_model(resolve(Config(preset="smoke", **options)), (32, 32))
    assert any(layer.bias.any() for layer in plain.modules() if isinstance(layer, nn.Linear) and layer.bias is not None)
