"""The optimizers against PyTorch's own, and written out."""

import pytest
import torch

from training.building import build_model, build_optimizer
from training.config import Config
from training.resolve import resolve


def test_muon_on_hidden_matrices_and_adam_on_the_rest():
    """Several steps against both optimizers written out: no weight decay, Nesterov momentum 0.95, Adam's step size."""
    config = resolve(Config(preset="smoke", device="cpu"))
    model = build_model(config, (12, 12))
    optimizer = build_optimizer(model, config)
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
    config = resolve(Config(preset="smoke", optimizer=name, device="cpu"))
    ours, theirs = (build_model(config, (12, 12)) for _ in range(2))
    optimizer, expected = build_optimizer(ours, config), alone(theirs.parameters())
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
