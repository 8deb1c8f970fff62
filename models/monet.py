"""MONet (Burgess et al. 2019, "MONet: Unsupervised Scene Decomposition and Representation").

An attention network cuts the image x into K masks m_k, one after the other, each from what the ones before have left;
a variational autoencoder of one component reconstructs picture and mask under each:

    loss = -log sum_k m_k N(x; mu_k, sigma_k^2) + beta KL(q(z | x, m) || N(0, 1)) + gamma KL(m || softmax_k c_k)

Encoder, decoder and U-Net are those of the paper's appendix B; the U-Net's widths, on which it is silent, are those of
the GENESIS authors' port (Engelcke et al. 2020). The published initial weights are `models.initial_weights.as_sonnet`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import iio_kernels
from models.iodine import coordinates
from models.recipe import SMOKE, Recipe
from models.scene import Scene, signed


class Block(nn.Module):
    """A 3x3 convolution without bias, instance normalisation with a learnt bias, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.instance_norm(self.conv(x)) + self.bias[:, None, None])


class Attention(nn.Module):
    """The U-Net: from image and log scope (B, 4, H, W) to the logits of alpha (B, 1, H, W).

    Down, each block but the last halves the resolution; an MLP goes on from the last; up, each takes what the block of
    its resolution made on the way down, too, and each but the last doubles it. Pixels are resized to their nearest.
    """

    def __init__(self, resolution: tuple[int, int], blocks: int, channels: int) -> None:
        super().__init__()
        widths = [channels] * (blocks // 2) + [2 * channels] * (blocks - blocks // 2)
        self.down = nn.ModuleList(Block(i, o) for i, o in pairwise([4, *widths]))
        above = [*widths[-2::-1], channels]
        self.up = nn.ModuleList(
            Block(i + skip, o) for i, skip, o in zip([widths[-1], *above], widths[::-1], above, strict=False)
        )
        size = widths[-1] * math.prod(n >> (blocks - 1) for n in resolution)
        self.mlp = nn.Sequential()
        for i, o in pairwise([size, 128, 128, size]):
            self.mlp.extend([nn.Linear(i, o), nn.ReLU()])
        self.to_logits = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            if skips:
                x = F.interpolate(x, size=[n // 2 for n in x.shape[2:]])
            x = block(x)
            skips.append(x)
        x = self.mlp(x.flatten(1)).view_as(x)
        for block, skip in zip(self.up, skips[::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, size=skip.shape[2:]), skip], 1))
        return self.to_logits(x)


class Encoder(nn.Module):
    """Image and log mask (.., 4, H, W) -> mean and log standard deviation (.., D) of q(z | x, m_k)."""

    def __init__(self, resolution: tuple[int, int], latent_size: int, channels: int) -> None:
        super().__init__()
        widths = [4, channels, channels, 2 * channels, 2 * channels]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in pairwise(widths))
        size = widths[-1] * math.prod(-(-n // 16) for n in resolution)
        self.mlp = nn.Sequential(nn.Linear(size, 256), nn.ReLU(), nn.Linear(256, 2 * latent_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        leading = x.shape[:-3]
        x = x.flatten(0, -4)
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.mlp(x.flatten(1)).unflatten(0, leading).chunk(2, -1)


class Decoder(nn.Module):
    """The spatial-broadcast decoder: each latent (.., D) becomes a picture and the logit of a mask (.., 4, H, W).

    Four 3x3 convolutions without padding, from a grid larger by the eight pixels that they take away, with two
    coordinates in [-1, 1] behind the latent; and a 1x1 one to the four.
    """

    def __init__(self, resolution: tuple[int, int], latent_size: int, channels: int) -> None:
        super().__init__()
        widths = [latent_size + 2] + [channels] * 4
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3) for i, o in pairwise(widths))
        self.to_rgba = nn.Conv2d(channels, 4, 1)
        larger = tuple(n + 2 * len(self.convs) for n in resolution)
        self.register_buffer("grid", coordinates(larger), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        first, *others = self.convs
        D = z.shape[-1]
        # The coordinates are the same for all latents and are convolved once; a latent is the same at every pixel.
        position = F.conv2d(self.grid.unsqueeze(0), first.weight[:, D:], first.bias)[0]
        x = iio_kernels.broadcast_conv2d(
            z.flatten(0, -2), first.weight[:, :D], position, self.grid.shape[1:], relu=True
        )
        for conv in others:
            x = F.relu(conv(x))
        return self.to_rgba(x).unflatten(0, z.shape[:-1])


class MONet(nn.Module):
    """Image -> K masks and latents -> image: see `Scene` for what comes out.

    Defaults are the published ones, for 64x64 images; those of 128x128 take `blocks=6`.

    Args:
        resolution: (H, W) of the images, each at least 2 to the power of blocks.
        latent_size: D, the width of a slot's latent.
        channels: of the decoder's convolutions and the outer ones of encoder and U-Net, whose inner have twice as many.
        blocks: of the U-Net on each way.
        sigma_first, sigma: standard deviation of a pixel under the first slot, the background's, and under all others,
            for images in [0, 1]. IODINE's authors compare with a MONet of 0.06 and 0.1.
        beta, gamma: factors of the divergence of latents and of masks.
        num_slots: K, unless a call says otherwise.
    """

    def __init__(
        self,
        resolution: tuple[int, int] = (64, 64),
        *,
        latent_size: int = 16,
        channels: int = 32,
        blocks: int = 5,
        sigma_first: float = 0.09,
        sigma: float = 0.11,
        beta: float = 0.5,
        gamma: float = 0.5,
        num_slots: int = 7,
    ) -> None:
        super().__init__()
        if min(resolution) >> (blocks - 1) < 2:  # of a single pixel, instance normalisation leaves nothing
            raise ValueError(f"blocks: {blocks} of them halve {tuple(resolution)} pixels to less than 2 x 2")
        self.resolution, self.latent_size, self.num_slots = tuple(resolution), latent_size, num_slots
        self.sigma_first, self.sigma, self.beta, self.gamma = sigma_first, sigma, beta, gamma
        self.attention = Attention(resolution, blocks, channels)
        self.encoder = Encoder(resolution, latent_size, channels)
        self.decoder = Decoder(resolution, latent_size, channels)

    @property
    def noise_shape(self) -> tuple[int, int]:
        """(K, D): of the standard normal numbers that draw an image's latents."""
        return self.num_slots, self.latent_size

    def forward(self, image: Tensor, *, num_slots: int | None = None, noise: Tensor | None = None) -> Scene:
        """Explain images (B, 3, H, W) in [0, 1].

        The latents are drawn by standard normal `noise` (B, K, D) where given, which then says K, or else by torch's
        own random numbers, for `num_slots` slots.
        """
        (H, W), (K, D) = self.resolution, self.noise_shape
        if image.dim() != 4 or tuple(image.shape[1:]) != (3, H, W):
            raise ValueError(f"image: expected shape (B, 3, {H}, {W}), got {tuple(image.shape)}")
        if noise is None:
            K = K if num_slots is None else num_slots
            if K < 1:
                raise ValueError(f"num_slots: expected an int >= 1, got {K}")
            noise = torch.randn(len(image), K, D, device=image.device, dtype=image.dtype)
        elif noise.dim() != 3 or len(noise) != len(image) or noise.shape[1] < 1 or noise.shape[2] != D:
            raise ValueError(
                f"noise: expected shape (B, K, {D}) to match image {tuple(image.shape)}, got {tuple(noise.shape)}"
            )
        log_masks = self.attend(image, noise.shape[1])
        seen = torch.cat([image.unsqueeze(1).expand(-1, noise.shape[1], -1, -1, -1), log_masks.unsqueeze(2)], 2)
        mean, log_deviation = (y.to(noise.dtype) for y in self.encoder(seen))
        z = mean + log_deviation.exp() * noise
        decoded = self.decoder(z)
        loss = self.loss(image, log_masks, mean, log_deviation, decoded)
        return Scene(torch.cat([signed(decoded[:, :, :3]), log_masks.unsqueeze(2)], 2), z, loss=loss)

    def attend(self, x: Tensor, num_slots: int) -> Tensor:
        """log m_k (B, K, H, W): of the scope that is left, slot k takes alpha_k, and the last all.

        log m_k = log s_k + log alpha_k,   log s_{k + 1} = log s_k + log(1 - alpha_k),   log s_1 = 0
        """
        log_scope = torch.zeros_like(x[:, :1])
        log_masks = []
        for _ in range(num_slots - 1):
            logits = self.attention(torch.cat([x, log_scope], 1)).to(x.dtype)
            log_masks.append(log_scope + F.logsigmoid(logits))
            log_scope = log_scope + F.logsigmoid(-logits)
        return torch.cat([*log_masks, log_scope], 1)

    def loss(self, x: Tensor, log_masks: Tensor, mean: Tensor, log_deviation: Tensor, decoded: Tensor) -> Tensor:
        """The loss of images x (B, 3, H, W) in [0, 1]; see the module."""
        K = decoded.shape[1]
        sigma = torch.full((K, 1, 1), self.sigma, device=x.device, dtype=x.dtype)
        sigma[0] = self.sigma_first
        means, mask_logits = decoded[:, :, :3].to(x.dtype), decoded[:, :, 3].to(x.dtype)
        log_normal = -(x.unsqueeze(1) - means).square().sum(2) / (2 * sigma**2)
        log_normal = log_normal - 3 * (sigma.log() + 0.5 * math.log(2 * math.pi))
        reconstruction = -(log_masks + log_normal).logsumexp(1).sum((1, 2))
        latents = 0.5 * (mean.square() + (2 * log_deviation).exp() - 1 - 2 * log_deviation).sum((1, 2))
        masks = (log_masks.exp() * (log_masks - mask_logits.log_softmax(1))).sum((1, 2, 3))
        return (reconstruction + self.beta * latents + self.gamma * masks).mean()


def build(
    resolution: tuple[int, int],
    *,
    channels: int,
    slot_size: int,
    num_slots: int,
    pixel_sigma: float,
    background_sigma: float,
) -> MONet:
    """The network that `train.py` trains: blocks halve images to 4 to 7 pixels, the published 5 of 64, 6 of 128."""
    return MONet(
        resolution, latent_size=slot_size, channels=channels, blocks=min(resolution).bit_length() - 2,
        sigma_first=background_sigma, sigma=pixel_sigma, num_slots=num_slots,
    )  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    # Appendix B, as printed, with the deviation of initial weights that is Sonnet's.
    "paper": dict(
        steps=1_000_000, fine_tune_steps=100_000, num_scenes=60_000, eval_scenes=320,
        channels=32, slot_size=16, pixel_sigma=0.11, background_sigma=0.09, batch_size=64,
        optimizer="rmsprop", lr=1e-4, fine_tune_lr=1e-4, warmup_steps=0, half_life=10**9, clip=0.0,
        fine_tune_warmup_steps=0, margin=4e-4, hinge_scale=1e3, initial_weights="sonnet",
    ),
    "quick": dict(
        steps=4000, fine_tune_steps=1000, num_scenes=60_000, eval_scenes=320,
        channels=16, slot_size=16, pixel_sigma=0.11, background_sigma=0.09, batch_size=8,
        optimizer="muon", lr=1e-3, fine_tune_lr=5e-4, warmup_steps=100, half_life=2500, clip=5.0,
        fine_tune_warmup_steps=100, margin=4e-4, hinge_scale=1e3, initial_weights="own",
    ),
    "smoke": SMOKE | dict(channels=8, slot_size=8, pixel_sigma=0.11, background_sigma=0.09),
}  # fmt: skip

RECIPES = (
    Recipe(
        "monet", "MONet", "Burgess et al. 2019", "discovery", build, PRESETS,
        least_slots=2, unsaid={"pixel_sigma": 0.11, "background_sigma": 0.09},
    ),
)  # fmt: skip
