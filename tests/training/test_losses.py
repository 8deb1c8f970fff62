"""The losses of the phases."""

import torch

from models.scene import Scene
from training.config import Config
from training.losses import losses


def test_the_hinge_lets_go_at_the_margin():
    config = Config(margin=0.5, hinge_scale=10.0)
    image, masks = torch.rand(2, 3, 11, 11), torch.rand(2, 4, 11, 11).softmax(1)
    unused = torch.empty(0)
    for reconstruction, active in ((image * 2 - 1 + 0.1, False), (image * 2 - 1 + 1.0, True)):
        # One picture for all slots: the masks do not change it.
        decoded = torch.cat([reconstruction[:, None].expand(-1, 4, -1, -1, -1), masks.log()[:, :, None]], 2)
        scene = Scene(decoded, unused)
        loss, parts = losses(scene, image, "fine-tuning", config)
        torch.testing.assert_close(loss - parts["iio"], 10 * parts["mse"] * active, rtol=1e-5, atol=1e-5)
