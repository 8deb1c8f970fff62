"""The model and the optimizer of a configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models import initial_weights
from models.dspn import DSPN
from models.iodine import IODINE
from models.monet import MONet
from models.optimizer import Optimizer
from models.set_prediction import SetPredictor
from models.slot_attention import ABLATIONS, SlotAttentionAutoEncoder
from models.slot_mlp import SlotMLPAutoEncoder
from training.config import Config
from training.random_numbers import hash_seed


def build_model(config: Config, resolution: tuple[int, int]) -> nn.Module:
    """The model for images of `resolution`. All take images in [-1, 1] and `noise`, of `noise_shape` for each."""
    torch.manual_seed(hash_seed(config.seed, 0))
    strided = tuple(resolution) == (128, 128)  # as Slot Attention decodes CLEVR

    def sizes(*names: str) -> dict[str, Any]:
        return {name: getattr(config, name) for name in ("channels", "num_slots", *names)}

    layers = "kernel_size", "input_size", "slot_size"
    gradient = {"gradient": config.gradient, "neumann_terms": config.neumann_terms}
    match config.task, config.model:
        case "set-prediction", "dspn":
            model = DSPN(resolution, latent_size=config.slot_size, **sizes("iterations"))
        case "set-prediction", _:
            slots = config.model.removeprefix("slot-")
            sized = sizes(*layers, "iterations", "downsample")
            model = SetPredictor(resolution, slots=slots, slot_attention=gradient, **sized)
        case _, "slot-attention":
            changed = {} if config.ablation == "none" else ABLATIONS[config.ablation]
            changed = changed | {"slot_attention": changed.get("slot_attention", {}) | gradient}
            model = SlotAttentionAutoEncoder(resolution, strided=strided, **sizes(*layers, "iterations"), **changed)
        case _, "slot-mlp":
            model = SlotMLPAutoEncoder(resolution, strided=strided, **sizes(*layers))
        case _, "iodine":
            source = IODINE.configurations if config.iodine_source == "text" else IODINE.program
            published = {each["resolution"][0]: each for each in source.values()}
            published = published.get(resolution[0], source["tetrominoes"])
            own = dict(
                resolution=resolution, latent_size=config.slot_size, sigma=config.pixel_sigma,
                refinement_channels=config.input_size, refinement_kernel_size=published["kernel_size"],
                mlp_sizes=(4 * config.input_size,) * len(published["mlp_sizes"]),
            )  # fmt: skip
            model = IODINE(**published | own | sizes("kernel_size", "iterations"))
        case _, "monet":
            blocks = min(resolution).bit_length() - 2  # halved to 4 to 7 pixels: the published 5 of 64, 6 of 128
            sigmas = dict(sigma_first=config.background_sigma, sigma=config.pixel_sigma)
            model = MONet(resolution, latent_size=config.slot_size, blocks=blocks, **sigmas, **sizes())
    if config.initial_weights in initial_weights.RULES:
        initial_weights.RULES[config.initial_weights](model)
    return model.to(config.device, memory_format=torch.channels_last)


def build_optimizer(model: nn.Module, config: Config) -> Optimizer:
    return Optimizer(model, config.optimizer, capturable=torch.device(config.device).type == "cuda")
