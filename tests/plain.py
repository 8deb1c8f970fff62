"""The Slot Attention autoencoder as everybody writes it: the same weights, no kernels, nothing taken apart.

Tests and benchmarks compare models/slot_attention.py with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import iio_kernels
from iio_kernels.nn import SlotAttention
from iio_kernels.testing.slot_attention_module import literal_slot_attention_module
from models.slot_attention import Decoder, Encoder, SlotAttentionAutoEncoder


def encode(encoder: Encoder, image: Tensor) -> Tensor:
    x = image
    for conv in encoder.convs:
        x = F.relu(conv(x))
    return encoder.mlp(encoder.norm(encoder.position(x).flatten(2).mT))


def attend(module: SlotAttention, inputs: Tensor, slots: Tensor, iterations: int) -> Tensor:
    return literal_slot_attention_module(module.norm_inputs(inputs), slots, module.weights(), iterations)[0]


def decode(decoder: Decoder, slots: Tensor) -> Tensor:
    """(B, K, D) -> (B, K, 4, H, W): every slot broadcast, and convolved with the position embedding in it."""
    height, width = decoder.position.grid.shape[:2]
    x = decoder.position(slots.flatten(0, 1)[:, :, None, None].expand(-1, -1, height, width))
    for conv in decoder.convs:
        x = F.relu(conv(x))
    return decoder.to_rgba(x).unflatten(0, slots.shape[:2])


def losses(model: SlotAttentionAutoEncoder, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The reconstruction error of images in [0, 1], and the masks."""
    slots = attend(model.slot_attention, encode(model.encoder, image * 2 - 1), model.slot_attention.draw(noise), 3)
    decoded = decode(model.decoder, slots)
    masks = decoded[:, :, 3:].softmax(1)
    reconstruction = (masks * decoded[:, :, :3]).sum(1)
    return F.mse_loss(reconstruction, image * 2 - 1), masks[:, :, 0]


def loss(model: SlotAttentionAutoEncoder, image: Tensor, noise: Tensor, phase: str) -> Tensor:
    """That of train.py with the paper's hinge; the IIO loss by its subset sums in PyTorch."""
    error, masks = losses(model, image, noise)
    if phase == "pre-training":
        return error
    iio = iio_kernels.iio_loss(image, masks, backend="reference")
    return iio + torch.where(error > 4e-4, 1000 * error, 0.0)
