"""Slot MLP, the baseline of Locatello et al. 2020: an MLP in place of Slot Attention, for both of its tasks."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models import slot_attention
from models.recipe import Recipe, without
from models.scene import Scene, signed
from models.slot_attention import Decoder, Encoder


class SlotMLP(nn.Module):
    """All inputs at once, resized and flattened, through an MLP: K slots in a fixed order.

    Nothing of that MLP is shared by the slots or by the places of the grid, which is what the paper compares with.
    `PROPERTY_PREDICTION` and `OBJECT_DISCOVERY` have the sizes of its supplement's tables 8 and 9.

    Args:
        input_size: width of the inputs.
        slot_size: D, the width of the slots.
        num_slots: K.
        resolution: height and width of the grid the inputs lie on.
        grid: inputs on a larger grid are resized, bilinearly, to this many rows and columns.
        hidden_sizes: of the MLP's hidden layers, each followed by a ReLU.
        slot_hidden_size: of a second MLP with one hidden layer, which all slots share; None: there is none.
    """

    def __init__(
        self,
        input_size: int,
        slot_size: int,
        num_slots: int,
        resolution: tuple[int, int],
        *,
        grid: int = 16,
        hidden_sizes: tuple[int, ...],
        slot_hidden_size: int | None,
    ) -> None:
        super().__init__()
        self.num_slots, self.resolution = num_slots, tuple(resolution)
        self.grid = tuple(min(grid, size) for size in resolution)
        widths = (self.grid[0] * self.grid[1] * input_size, *hidden_sizes)
        hidden = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.mlp = nn.Sequential(*hidden, nn.Linear(widths[-1], num_slots * slot_size))
        self.slot_mlp = nn.Identity()
        if slot_hidden_size is not None:
            self.slot_mlp = nn.Sequential(
                nn.Linear(slot_size, slot_hidden_size), nn.ReLU(), nn.Linear(slot_hidden_size, slot_size)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, H * W, input_size) -> (B, K, D)."""
        x = inputs.mT.unflatten(2, self.resolution)
        if self.grid != self.resolution:
            x = F.interpolate(x, self.grid, mode="bilinear")
        return self.slot_mlp(self.mlp(x.flatten(1)).unflatten(1, (self.num_slots, -1)))


#: Table 8 of the supplement: `SetPredictor`'s own MLP follows on each slot.
PROPERTY_PREDICTION: dict[str, Any] = dict(hidden_sizes=(512, 512), slot_hidden_size=None)

#: Table 9.
OBJECT_DISCOVERY: dict[str, Any] = dict(hidden_sizes=(512, 1024, 1024), slot_hidden_size=64)


class SlotMLPAutoEncoder(nn.Module):
    """Image -> K slots -> image, with encoder and decoder of `SlotAttentionAutoEncoder`, and of its arguments.

    Args:
        slot_mlp: options of `SlotMLP`, over those of table 9; the others as there.
    """

    noise_shape = (0,)
    """The slots are no draw: there is nothing for noise to decide."""

    def __init__(
        self,
        resolution: tuple[int, int] = (35, 35),
        *,
        channels: int = 32,
        kernel_size: int = 5,
        input_size: int | None = None,
        slot_size: int = 64,
        strided: bool = False,
        num_slots: int = 4,
        slot_mlp: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(channels, kernel_size, resolution, input_size or channels)
        options = OBJECT_DISCOVERY | dict(slot_mlp or {})
        self.slot_mlp = SlotMLP(input_size or channels, slot_size, num_slots, resolution, **options)
        self.decoder = Decoder(slot_size, channels, kernel_size, resolution, strided)

    def forward(self, image: Tensor, *, noise: Tensor | None = None) -> Scene:
        """Explain images (B, 3, H, W) in [0, 1]; `noise` (B, 0) is taken from whoever trains all models alike."""
        slots = self.slot_mlp(self.encoder(signed(image)))
        return Scene(self.decoder(slots), slots)


def build(
    resolution: tuple[int, int],
    *,
    channels: int,
    kernel_size: int,
    input_size: int,
    slot_size: int,
    num_slots: int,
    network_of: str,
) -> SlotMLPAutoEncoder:
    """The autoencoder that `train.py` trains; `network_of` CLEVR6 decodes from a grid of 8 x 8."""
    return SlotMLPAutoEncoder(
        resolution, channels=channels, kernel_size=kernel_size, input_size=input_size, slot_size=slot_size,
        strided=network_of == "clevr6", num_slots=num_slots,
    )  # fmt: skip


def as_baseline(presets: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Slot Attention's presets for the baseline. Muon would spend its time on the first layer of the MLP, which holds
    nearly all of its weights."""
    own = dict(optimizer="adam", lr=4e-4, fine_tune_lr=4e-4)
    return {name: without(preset, "iterations") | own for name, preset in presets.items()}


RECIPES = (
    Recipe(
        "slot-mlp", "Slot MLP", "Locatello et al. 2020", "discovery", build,
        as_baseline(slot_attention.PRESETS), slot_attention.PUBLISHED, fixed_slots=True,
    ),
)  # fmt: skip
