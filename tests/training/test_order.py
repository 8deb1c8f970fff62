"""The order of the scenes."""

import torch

from training.config import Config
from training.scenes import Order


def test_every_epoch_sees_every_scene_once():
    order = Order(Config(num_scenes=10, batch_size=4, seed=3, device="cpu"))
    seen = torch.cat([order(step) for step in range(10)]).view(4, 10)
    assert all(torch.equal(epoch.sort().values, torch.arange(10)) for epoch in seen)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(order(2), torch.cat([seen[0, 8:], seen[1, :2]])), "going back gives the same scenes"
