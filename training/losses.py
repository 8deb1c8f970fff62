"""What a model makes of images, and the losses of the phases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import iio_kernels
from training.building import recipe_of
from training.config import Config
from training.processes import mean_over_ranks


def apply_model(model: nn.Module, pixels: Tensor, noise: Tensor, config: Config, **options: Any) -> tuple[Any, Tensor]:
    """What the model makes of images (uint8, B 3 H W), and those images in [0, 1].

    It is in training mode where gradients are on, in evaluation mode where they are off.
    """
    image = pixels / 255
    model.train(torch.is_grad_enabled())
    with torch.autocast(image.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        return model(image, noise=noise, **options), image


def losses(
    made: Any, image: Tensor, phase: str, config: Config, objects: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a phase, from what a model made of images in [0, 1], and its parts for the log."""
    if config.task == "set-prediction":
        return recipe_of(config).set_loss(made, objects, config.coordinate_scale)
    objective, masks, error = made.objective(image)
    if phase == "pre-training" or config.fine_tune == "reconstruction":
        parts = {} if objective is error else {"loss": objective.detach()}
        return objective, {"mse": error.detach(), **parts}
    inpainter = dict(sigma=config.sigma, kernel_size=config.iio_kernel_size, repeats=config.repeats)
    iio = iio_kernels.iio_loss(image, masks, terms=config.terms, **inpainter)
    # The IIO loss alone would let go of the image: the hinge brings the error back whenever it leaves the margin. It
    # switches on the device, which nothing waits for, and for all processes alike.
    hinge = torch.where(mean_over_ranks(error) > config.margin, config.hinge_scale * error, 0.0)
    return iio + hinge, {"mse": error.detach(), "iio": iio.detach()}
