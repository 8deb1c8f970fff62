"""The Slot Attention autoencoder (Locatello et al. 2020, "Object-Centric Learning with Slot Attention").

Encoder, Slot Attention and spatial-broadcast decoder as tables 3 to 6 and 10 of the paper's supplement give them.
Images are (B, 3, H, W) in [0, 1]; K slots of width D explain each.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import iio_kernels
from iio_kernels.nn import SlotAttention
from models.recipe import SMOKE, Recipe
from models.scene import Scene, signed


class PositionEmbedding(nn.Module):
    """Adds a learnt linear projection of (y, x, 1 - y, 1 - x), each in [0, 1] (supplement, section E.2)."""

    def __init__(self, channels: int, resolution: tuple[int, int]) -> None:
        super().__init__()
        self.dense = nn.Linear(4, channels)
        height, width = resolution
        y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
        self.register_buffer("grid", torch.stack([y, x, 1 - y, 1 - x], -1), persistent=False)

    def embedding(self) -> Tensor:
        """(C, H, W), in channels-last memory order."""
        return self.dense(self.grid).permute(2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.embedding()


class Encoder(nn.Module):
    """Convolutions, position embedding, LayerNorm and MLP: (B, 3, H, W) -> (B, N, input_size).

    N = H * W, unless convolutions have `strides`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        resolution: tuple[int, int],
        input_size: int,
        *,
        strides: tuple[int, ...] = (1, 1, 1, 1),
        position_embedding: bool = True,
    ) -> None:
        super().__init__()
        widths = [3] + [channels] * len(strides)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, kernel_size, stride, padding=kernel_size // 2)
            for (i, o), stride in zip(pairwise(widths), strides, strict=True)
        )
        for stride in strides:
            resolution = tuple((size - 1) // stride + 1 for size in resolution)
        for conv in self.convs:
            # The supplement is silent. The authors' program leaves Keras' default, Glorot's rule, of which
            # `models.initial_weights` has all. He et al.'s keeps the signal's size from layer to layer, which PyTorch's
            # default shrinks; in whole runs it was ahead early (docs/experiments.md).
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        self.position = PositionEmbedding(channels, resolution) if position_embedding else nn.Identity()
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, input_size), nn.ReLU(), nn.Linear(input_size, input_size))

    def forward(self, image: Tensor) -> Tensor:
        x = image.contiguous(memory_format=torch.channels_last)
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.mlp(self.norm(self.position(x).flatten(2).mT))


class Decoder(nn.Module):
    """The spatial-broadcast decoder: each slot (.., D) becomes a picture with an alpha channel (.., 4, H, W).

    At full resolution: three convolutions on the slot broadcast to H x W, and a 3x3 one to RGB and alpha.
    `strided` (CLEVR): from an 8x8 grid, four transposed convolutions of stride 2, one of stride 1, and the 3x3 one.
    """

    def __init__(
        self, slot_size: int, channels: int, kernel_size: int, resolution: tuple[int, int], strided: bool
    ) -> None:
        super().__init__()
        self.strided = strided
        self.position = PositionEmbedding(slot_size, (8, 8) if strided else resolution)
        if strided:
            strides, half = (2, 2, 2, 2, 1), kernel_size // 2
            widths = [slot_size] + [channels] * len(strides)
            self.convs = nn.ModuleList(
                nn.ConvTranspose2d(i, o, kernel_size, stride, padding=half, output_padding=stride - 1)
                for (i, o), stride in zip(pairwise(widths), strides, strict=True)
            )
        else:
            widths = [slot_size] + [channels] * 3
            self.convs = nn.ModuleList(nn.Conv2d(i, o, kernel_size, padding="same") for i, o in pairwise(widths))
        self.to_rgba = nn.Conv2d(channels, 4, 3, padding="same")

    def forward(self, slots: Tensor) -> Tensor:
        first, *others = self.convs
        # A slot is the same all over the grid, and the position embedding the same for all slots: it is convolved once.
        position = self.position.embedding()
        x = iio_kernels.broadcast_conv2d(
            slots.flatten(0, -2), first.weight, first(position.unsqueeze(0))[0], position.shape[1:],
            stride=first.stride, padding=first.kernel_size[0] // 2, transposed=self.strided, relu=True,
        )  # fmt: skip
        for conv in others:
            x = F.relu(conv(x))
        return self.to_rgba(x).unflatten(0, slots.shape[:-1])


class SlotAttentionAutoEncoder(nn.Module):
    """Image -> K slots -> image: see `Scene` for what comes out.

    Defaults are those of Tetrominoes and Multi-dSprites; CLEVR takes `resolution=(128, 128)`, `channels=64` and
    `strided=True`.

    Args:
        resolution: (H, W) of the images; with `strided` it must be (128, 128).
        channels: width of all hidden convolutions.
        kernel_size: of the convolutions, odd.
        input_size: width of the encoder's MLP, which makes the inputs to Slot Attention; None: `channels`, or without
            projections `slot_size`.
        slot_size: D, the width of slots, queries, keys and values.
        mlp_size: hidden width of the residual MLP on the slots.
        strided: decode from an 8 x 8 grid by transposed convolutions.
        num_slots, iterations: K and T, unless a call says otherwise.
        position_embedding: False: the encoder's features do not tell where they are; the decoder's grid still does.
        slot_attention: further options of `iio_kernels.nn.SlotAttention`, over those above; see `ABLATIONS`.
    """

    def __init__(
        self,
        resolution: tuple[int, int] = (35, 35),
        *,
        channels: int = 32,
        kernel_size: int = 5,
        input_size: int | None = None,
        slot_size: int = 64,
        mlp_size: int = 128,
        strided: bool = False,
        num_slots: int = 4,
        iterations: int = 3,
        position_embedding: bool = True,
        slot_attention: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if strided and tuple(resolution) != (128, 128):
            raise ValueError(f"resolution: the strided decoder makes (128, 128) images, got {tuple(resolution)}")
        self.resolution = tuple(resolution)
        self.noise_shape = (num_slots, slot_size)
        options = dict(mlp_size=mlp_size, num_slots=num_slots, iterations=iterations, attention="softmax")
        options |= dict(slot_attention or {})
        input_size = input_size or (channels if options.get("project", True) else slot_size)
        self.encoder = Encoder(channels, kernel_size, resolution, input_size, position_embedding=position_embedding)
        self.slot_attention = SlotAttention(input_size, slot_size, **options)
        self.decoder = Decoder(slot_size, channels, kernel_size, resolution, strided)

    def forward(
        self,
        image: Tensor,
        *,
        num_slots: int | None = None,
        iterations: int | None = None,
        slots: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Scene:
        """Explain images (B, 3, H, W) in [0, 1].

        The initial slots are `slots` (B, K, D) where given, otherwise drawn from the learnt Gaussian: by standard
        normal `noise` (B, K, D) where given, otherwise `num_slots` of them by torch's own random numbers.
        """
        if tuple(image.shape[1:]) != (3, *self.resolution):
            raise ValueError(
                f"image: expected shape (B, 3, {self.resolution[0]}, {self.resolution[1]}), got {tuple(image.shape)}"
            )
        slots, attention = self.slot_attention(
            self.encoder(signed(image)), slots, num_slots=num_slots, iterations=iterations, noise=noise
        )
        return Scene(self.decoder(slots), slots, attention)


#: What the ablations of the paper's supplement change, as arguments of `SlotAttentionAutoEncoder`. Others are a matter
#: of numbers, `num_slots` and `iterations`, or of the training. `bench/ablations.py` compares all.
ABLATIONS: dict[str, dict[str, Any]] = {
    "weighted-sum": {"slot_attention": {"normalize": "sum"}},
    "weighted-sum-and-layernorm": {"slot_attention": {"normalize": "sum", "norm_updates": True}},
    "softmax-over-inputs": {"slot_attention": {"softmax": "inputs"}},
    "no-temperature": {"slot_attention": {"scale": 1.0}},
    "eps-in-denominator": {"slot_attention": {"eps_in": "denominator"}},
    "slots-of-their-own": {"slot_attention": {"initial": "gaussians"}},
    "no-position-embedding": {"position_embedding": False},
    "no-gru": {"slot_attention": {"update": "replace"}},
    "no-mlp": {"slot_attention": {"mlp_size": None}},
    "no-layernorm": {"slot_attention": {"norm_inputs": False, "norm_slots": False, "norm_mlp": False}},
    # Nothing is learnt but encoder, decoder and where slots begin; scores are products. Inputs are as wide as slots.
    "soft-k-means": {
        "slot_attention": {
            "project": False, "update": "replace", "mlp_size": None, "norm_inputs": False, "norm_slots": False,
        },
    },
}  # fmt: skip


def build(
    resolution: tuple[int, int],
    *,
    channels: int,
    kernel_size: int,
    input_size: int,
    slot_size: int,
    num_slots: int,
    iterations: int,
    network_of: str,
    ablation: str = "none",
    gradient: str = "unrolled",
    neumann_terms: int = 0,
) -> SlotAttentionAutoEncoder:
    """The autoencoder that `train.py` trains. `network_of` CLEVR6 decodes from a grid of 8 x 8, as in table 6."""
    changed = {} if ablation == "none" else ABLATIONS[ablation]
    gradients = {"gradient": gradient, "neumann_terms": neumann_terms}
    changed = changed | {"slot_attention": changed.get("slot_attention", {}) | gradients}
    return SlotAttentionAutoEncoder(
        resolution, channels=channels, kernel_size=kernel_size, input_size=input_size, slot_size=slot_size,
        strided=network_of == "clevr6", num_slots=num_slots, iterations=iterations, **changed,
    )  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    # The supplement, section E, and the IIO paper. How long fine-tuning warms up is ours. Initial weights are those of
    # the authors' program: the supplement is silent on them.
    "paper": dict(
        epochs=50, fine_tune_epochs=5, num_scenes=60_000, eval_scenes=1000,
        channels=32, kernel_size=5, input_size=32, slot_size=64, iterations=3, batch_size=64,
        optimizer="adam", lr=4e-4, fine_tune_lr=4e-4, warmup_steps=10_000, half_life=100_000, clip=0.0,
        fine_tune_warmup_steps=100, margin=4e-4, hinge_scale=1e3, initial_weights="keras",
    ),
    # The lowest error in 20 minutes of what was tried (docs/experiments.md). The loss and its hinge are the paper's.
    "quick": dict(
        steps=5000, fine_tune_steps=4500, num_scenes=60_000, eval_scenes=320,
        channels=32, kernel_size=3, input_size=64, slot_size=64, iterations=3, batch_size=16,
        optimizer="muon", lr=1e-3, fine_tune_lr=5e-4, warmup_steps=100, half_life=2500, clip=1.0,
        fine_tune_warmup_steps=100, margin=4e-4, hinge_scale=1e3, initial_weights="own",
    ),
    "smoke": SMOKE | dict(channels=8, kernel_size=3, input_size=8, slot_size=64, iterations=3),
}  # fmt: skip

_TABLE_10: dict[str, Any] = dict(steps=500_000, epochs=None, eval_scenes=320)
#: Steps and scoring scenes are those of the supplement's table 10; 50 epochs are the IIO paper's, of Tetrominoes alone.
PUBLISHED = {
    ("paper", "multi-dsprites"): _TABLE_10,
    ("paper", "clevr6"): _TABLE_10 | dict(channels=64, input_size=64),
}

RECIPES = (Recipe("slot-attention", "Slot Attention", "Locatello et al. 2020", "discovery", build, PRESETS, PUBLISHED),)
