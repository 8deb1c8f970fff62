"""A training with the compiled CPU kernels follows one with the reference."""

from __future__ import annotations

import pytest
import torch
from cpu_operators import (
    F32,
    F64,
    _one_thread,  # noqa: F401
)
from torch import Tensor

from iio_kernels import (
    compose,
    iio_loss,
)
from iio_kernels.runtime import backends
from models.slot_attention import SlotAttentionAutoEncoder


def train(backend: str, dtype: torch.dtype, monkeypatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of 30 steps of a small autoencoder, 20 that reconstruct and 10 of the IIO loss; then its weights."""
    with monkeypatch.context() as patch:
        patch.setattr(backends, "BACKENDS", {backend: backends.BACKENDS[backend]})  # "auto" takes it
        torch.manual_seed(0)
        sizes = {"channels": 16, "kernel_size": 3, "slot_size": 16, "mlp_size": 32, "num_slots": 3}
        model = SlotAttentionAutoEncoder((12, 13), **sizes)
        torch.nn.init.normal_(model.decoder.to_rgba.weight, std=1.0)  # masks that differ
        model.to(dtype)
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        quarters, noise = torch.rand(4, 3, 2, 2).to(dtype), torch.randn(30, 4, 3, 16).to(dtype)
        image = quarters.repeat_interleave(6, 2).repeat_interleave(7, 3)[..., :13]
        losses = []
        for step in range(30):
            slots = model.slot_attention.mu + model.slot_attention.log_sigma.exp() * noise[step]
            slots, _ = model.slot_attention(model.encoder(2 * image - 1), slots, iterations=3)
            reconstruction, masks = compose(model.decoder(slots))
            error = (2 * image - 1 - reconstruction).square().mean()
            loss = error if step < 20 else iio_loss(image, masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses), {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "relative"), [(F64, 1e-9), (F32, 1e-3)], ids=["float64", "float32"])
def test_training_follows_the_reference(dtype, relative, monkeypatch):
    (got, weights), (expected, others) = (train(backend, dtype, monkeypatch) for backend in ("cpu", "reference"))
    assert expected[19] < 0.7 * expected[0]
    assert expected[29] < expected[20] - 0.01
    torch.testing.assert_close(got, expected, rtol=relative, atol=0)
    if dtype == F64:  # in float32 Adam makes steps of the rounding errors of a gradient that is 0
        for name, p in weights.items():
            torch.testing.assert_close(p, others[name], rtol=0, atol=relative)
