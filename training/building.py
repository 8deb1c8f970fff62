"""The recipe, the model and the optimizer of a configuration."""

from __future__ import annotations

import torch
from torch import nn

from models import MODELS, Recipe, initial_weights
from models.optimizer import Optimizer
from training.config import Config
from training.random_numbers import hash_seed


def recipe_of(config: Config) -> Recipe:
    """How the model is built and trained for the task."""
    return MODELS[config.model][config.task]


def make_module(config: Config, resolution: tuple[int, int]) -> nn.Module:
    """The model's network for images of `resolution`, with the initial weights of its own."""
    recipe = recipe_of(config)
    return recipe.build(tuple(resolution), **{name: getattr(config, name) for name in recipe.options})


def build_model(config: Config, resolution: tuple[int, int]) -> nn.Module:
    """The `models.SlotModel` for images of `resolution`, on the device, with the initial weights that are asked for."""
    torch.manual_seed(hash_seed(config.seed, 0))
    model = make_module(config, resolution)
    if config.initial_weights in initial_weights.RULES:
        initial_weights.RULES[config.initial_weights](model)
    return model.to(config.device, memory_format=torch.channels_last)


def build_optimizer(model: nn.Module, config: Config) -> Optimizer:
    return Optimizer(model, config.optimizer, capturable=torch.device(config.device).type == "cuda")
