"""Set prediction (Locatello et al. 2020, section 4.2): the properties of all objects of an image, in no order.

A CNN, Slot Attention and an MLP on each slot (supplement, section E). Images are (B, 3, H, W) in [0, 1]. A scene's
objects are (M, 19): coordinates (3) in [0, 1], size (2), material (2), shape (3) and color (8) one-hot, and 1 for an
object; rows of zeros fill up scenes with fewer than M.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from data.properties import NUM_PROPERTIES
from iio_kernels.nn import SlotAttention
from models import slot_attention
from models.recipe import Recipe
from models.scene import signed
from models.slot_attention import Encoder
from models.slot_mlp import PROPERTY_PREDICTION, SlotMLP, as_baseline


class SetPredictor(nn.Module):
    """Image -> K objects.

    Defaults are those of CLEVR10: 128 x 128 pixels, features of 32 x 32.

    Args:
        resolution: (H, W) of the images.
        channels: width of the convolutions.
        kernel_size: of the convolutions, odd.
        downsample: 1, 2, 4 or 8: the image has this many times as many rows as the features. Some of the first three
            of four convolutions have stride 2 for it, the last ones first.
        input_size: width of the MLP on the features; None: `channels`.
        slot_size: D, the width of the slots.
        mlp_size: hidden width of the residual MLP on the slots.
        num_slots, iterations: K and T of Slot Attention.
        slots: "attention"; or "mlp", the Slot MLP baseline.
        slot_attention: further options of `iio_kernels.nn.SlotAttention`, over those above.
    """

    def __init__(
        self,
        resolution: tuple[int, int] = (128, 128),
        *,
        channels: int = 64,
        kernel_size: int = 5,
        downsample: int = 4,
        input_size: int | None = None,
        slot_size: int = 64,
        mlp_size: int = 128,
        num_slots: int = 10,
        iterations: int = 3,
        slots: Literal["attention", "mlp"] = "attention",
        slot_attention: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        input_size = input_size or channels
        halvings = downsample.bit_length() - 1
        strides = (*(1,) * (3 - halvings), *(2,) * halvings, 1)
        self.encoder = Encoder(channels, kernel_size, resolution, input_size, strides=strides)
        self.iterations = iterations
        if slots == "attention":
            self.noise_shape: tuple[int, ...] = (num_slots, slot_size)
            options = dict(mlp_size=mlp_size, num_slots=num_slots, iterations=iterations) | dict(slot_attention or {})
            self.slots: nn.Module = SlotAttention(input_size, slot_size, **options)
        else:
            self.noise_shape = (0,)
            grid = self.encoder.position.grid.shape[:2]
            self.slots = SlotMLP(input_size, slot_size, num_slots, grid, **PROPERTY_PREDICTION)
        self.classifier = nn.Sequential(
            nn.Linear(slot_size, slot_size), nn.ReLU(), nn.Linear(slot_size, NUM_PROPERTIES)
        )

    def forward(self, image: Tensor, *, noise: Tensor | None = None, stepwise: bool = False) -> Tensor:
        """Predict the objects of images (B, 3, H, W) in [0, 1]: (B, K, 19), each number in (0, 1).

        The initial slots are drawn by standard normal `noise` (B, K, D), or by torch's own random numbers. `stepwise`
        puts the predictions after every iteration in front: (T, B, K, 19).
        """
        inputs = self.encoder(signed(image))
        if isinstance(self.slots, SlotMLP):
            slots = self.slots(inputs)
            return self.predict(slots.unsqueeze(0) if stepwise else slots)
        if not stepwise:
            return self.predict(self.slots(inputs, noise=noise))
        slots = [self.slots(inputs, noise=noise, iterations=1)]
        for _ in range(self.iterations - 1):
            slots.append(self.slots(inputs, slots[-1], iterations=1))
        return self.predict(torch.stack(slots))

    def predict(self, slots: Tensor) -> Tensor:
        """(..., D) -> (..., 19), in float32: scoring sorts by the last of them, and bfloat16 has many ties."""
        with torch.autocast(slots.device.type, enabled=False):
            return self.classifier(slots.to(self.classifier[0].weight.dtype)).float().sigmoid()


def pairwise_cost(predicted: Tensor, objects: Tensor, coordinate_scale: float = 1.0) -> Tensor:
    """Huber's loss, mean over properties, of each prediction (..., K, P) as each object (..., M, P): (..., K, M).

    `coordinate_scale` multiplies the differences of coordinates, the first three properties.
    """
    difference = predicted.unsqueeze(-2) - objects.unsqueeze(-3)
    if coordinate_scale != 1:
        difference = torch.cat([difference[..., :3] * coordinate_scale, difference[..., 3:]], -1)
    return F.huber_loss(difference, torch.zeros_like(difference), reduction="none").mean(-1)


def set_loss(predicted: Tensor, objects: Tensor, coordinate_scale: float = 1.0) -> Tensor:
    """The loss of predictions (B, K, P) matched to objects (B, M, P) at least cost, summed over pairs, mean over B.

    The Hungarian algorithm matches, on the host. Surplus predictions are matched with rows of zeros. Where predictions
    are fewer, real objects are matched before rows of zeros, and what is left over costs nothing. Predictions may have
    more leading dimensions, which are averaged over, too: (T, B, K, P) is the loss after every iteration.

    Complexity: O(B K M P), and O(B max(K, M)^3) for matching.

    Source: Zhang et al. 2019, "Deep Set Prediction Networks", eq. 2, with Huber's loss as Locatello et al. 2020.
    """
    objects = F.pad(objects, (0, 0, 0, max(0, predicted.shape[-2] - objects.shape[-2])))
    objects = objects.expand(*predicted.shape[:-2], *objects.shape[-2:])
    cost = pairwise_cost(predicted, objects, coordinate_scale).flatten(0, -3)
    # A NaN shall be matched with anything, and be seen in the loss.
    table = cost.detach().double().nan_to_num(nan=1e9)
    if cost.shape[1] < cost.shape[2]:
        # Otherwise predictions of nothing would take the rows of zeros, and no object be missed.
        table -= 1e6 * (objects[..., -1] > 0.5).flatten(0, -2).unsqueeze(1)
    table = table.cpu().numpy()
    pairs = torch.stack([torch.as_tensor(part) for row in table for part in linear_sum_assignment(row)])
    rows, columns = pairs.view(len(cost), 2, -1).to(cost.device).unbind(1)
    chosen = cost[torch.arange(len(cost), device=cost.device).unsqueeze(1), rows, columns]
    return chosen.sum(1).mean()


def loss_and_parts(predicted: Tensor, objects: Tensor, coordinate_scale: float) -> tuple[Tensor, dict[str, Tensor]]:
    """`set_loss`, and what of it is logged."""
    loss = set_loss(predicted, objects, coordinate_scale)
    return loss, {"loss": loss.detach()}


def build(
    resolution: tuple[int, int],
    *,
    channels: int,
    kernel_size: int,
    downsample: int,
    input_size: int,
    slot_size: int,
    num_slots: int,
    iterations: int,
    gradient: str = "unrolled",
    neumann_terms: int = 0,
) -> SetPredictor:
    """The predictor with Slot Attention that `train.py` trains."""
    return SetPredictor(
        resolution, channels=channels, kernel_size=kernel_size, downsample=downsample, input_size=input_size,
        slot_size=slot_size, num_slots=num_slots, iterations=iterations,
        slot_attention={"gradient": gradient, "neumann_terms": neumann_terms},
    )  # fmt: skip


def build_baseline(
    resolution: tuple[int, int],
    *,
    channels: int,
    kernel_size: int,
    downsample: int,
    input_size: int,
    slot_size: int,
    num_slots: int,
) -> SetPredictor:
    """The predictor with Slot MLP that `train.py` trains."""
    return SetPredictor(
        resolution, channels=channels, kernel_size=kernel_size, downsample=downsample, input_size=input_size,
        slot_size=slot_size, num_slots=num_slots, slots="mlp",
    )  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    # The supplement, section E: 150,000 steps on CLEVR's 70,000 images.
    "paper": dict(
        steps=150_000, num_scenes=70_000, eval_scenes=15_000,
        channels=64, kernel_size=5, input_size=64, downsample=4, slot_size=64, iterations=3, batch_size=512,
        optimizer="adam", lr=4e-4, warmup_steps=1000, half_life=50_000, clip=0.0, initial_weights="keras",
    ),
    "quick": slot_attention.PRESETS["quick"] | dict(
        steps=6000, num_scenes=10_000, channels=32, kernel_size=5, downsample=8, batch_size=32, lr=3e-3,
        half_life=1200,
    ),
    "smoke": slot_attention.PRESETS["smoke"] | dict(num_scenes=64, eval_scenes=16, downsample=8),
}  # fmt: skip

RECIPES = (
    Recipe(
        "slot-attention", "Slot Attention", "Locatello et al. 2020", "set-prediction", build, PRESETS,
        set_loss=loss_and_parts,
    ),
    Recipe(
        "slot-mlp", "Slot MLP", "Locatello et al. 2020", "set-prediction", build_baseline, as_baseline(PRESETS),
        fixed_slots=True, set_loss=loss_and_parts,
    ),
)  # fmt: skip
