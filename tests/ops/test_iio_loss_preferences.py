"""What the IIO loss prefers: the true masks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data import TetrominoesGenerator
from iio_kernels import iio_loss

OPERATION = "iio_loss"


def _with_background(objects: Tensor) -> Tensor:
    return torch.cat([1 - objects.sum(1, keepdim=True), objects], 1)


def _merged(masks: Tensor, one: int, other: int) -> Tensor:
    masks = masks.clone()
    masks[:, one] += masks[:, other]
    masks[:, other] = 0
    return masks


def _dilated(objects: Tensor) -> Tensor:
    """By a pixel into the background; where two objects meet the first one wins."""
    grown = F.max_pool2d(objects, 3, 1, 1) * (1 - objects.sum(1, keepdim=True)) + objects
    return grown * (grown.cumsum(1) - grown == 0)


@pytest.mark.long("written_out")
def test_true_masks_are_the_best_of_all(backend, device, interpreted):
    """Mean loss over 300 scenes of Tetrominoes, the true masks and what a model might settle for instead."""
    if interpreted:
        pytest.skip("minutes in the interpreter, and no matter of the backend")
    image, labels = TetrominoesGenerator(300).batch(torch.arange(300), device)
    image = image.float() / 255
    truth = F.one_hot(labels.long(), 4).movedim(-1, 1).float()
    objects = truth[:, 1:]
    spread = truth.clone()
    spread[:, 1:] += truth[:, :1] / 4
    spread[:, 0] /= 4
    candidates = {
        "truth": (truth, -9.07),
        "eroded": (_with_background(1 - F.max_pool2d(1 - objects, 3, 1, 1)), -7.85),
        "dilated": (_with_background(_dilated(objects)), -6.17),
        "two objects merged": (_merged(truth, 1, 2), -5.80),
        "background merged with an object": (_merged(truth, 0, 1), -5.83),
        "background spread": (spread, -2.98),
        "uniform": (torch.full_like(truth, 0.25), -2.50),
    }

    def mean_loss(masks, **options):
        pieces = zip(image.split(50), masks.split(50), strict=False)
        return sum(iio_loss(x, m, reduction="sum", backend=backend, **options).item() for x, m in pieces) / len(masks)

    losses = {name: mean_loss(masks) for name, (masks, _) in candidates.items()}
    assert losses == {name: pytest.approx(expected, abs=0.15) for name, (_, expected) in candidates.items()}
    for sigma in (2.0, 10.0):
        some = {name: mean_loss(masks[:50], sigma=sigma) for name, (masks, _) in candidates.items()}
        assert min(some, key=some.get) == "truth"
