"""The picture that a run leaves."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import Scenes
from data.properties import kinds
from training.building import build_model
from training.config import Config
from training.console import warn
from training.files import write
from training.losses import apply_model
from training.processes import rank
from training.random_numbers import draw_noise
from training.run_folder import PICTURES, resume_command
from training.scenes import objects_of
from training.tables import FINE_TUNING
from training.weights import load_weights, restore

#: CLEVR's colors, in the order of their numbers.
COLORS = ["#575757", "#ad2323", "#2a4bd7", "#1d6914", "#814a19", "#8126c0", "#29d0d0", "#ffee33"]

#: Colors of background and objects; whatever has no counterpart in the truth takes one of the rest.
PALETTE = torch.tensor(
    [[38, 41, 48], [238, 119, 51], [0, 153, 136], [204, 51, 17], [51, 187, 238], [238, 51, 119], [187, 187, 187],
     [0, 119, 187], [221, 204, 119], [136, 34, 85], [153, 153, 51], [170, 68, 153], [68, 170, 153]]
) / 255  # fmt: skip


def draw(folder: Path, config: Config, source: Scenes) -> None:
    """The picture of a run, from its weights. Scores and weights are there already, so what stops it is a warning."""
    if rank() > 0:
        return
    # The name of a backend that does not exist stops Matplotlib's import; the pictures need none.
    os.environ.pop("MPLBACKEND", None)
    draw_task = draw_masks if config.task == "discovery" else draw_objects
    unseen = torch.arange(config.num_scenes, config.num_scenes + config.eval_scenes)
    try:
        draw_task(folder, config, source, unseen[:6])
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip() or 'it says nothing'}".splitlines()[0]
        warn(f"{folder / PICTURES[config.task]} is not drawn ({reason}); to try again: {resume_command(folder)}")


@torch.no_grad()
def draw_masks(folder: Path, config: Config, source: Scenes, indices: Tensor) -> None:
    """masks.png: a column a scene; image, truth, masks after each phase, and the slots' own pictures."""
    from matplotlib.figure import Figure

    pixels, truth = source.batch(indices, device=config.device)
    panels: list[tuple[str, Tensor]] = [
        ("image", pixels.permute(0, 2, 3, 1) / 255),
        ("truth", PALETTE[truth.long().cpu()]),
    ]
    tuned = (folder / "after.safetensors").exists()
    for key, title in (
        ("before", "masks before" if tuned else "masks"),
        ("after", f"masks after {FINE_TUNING.get(config.fine_tune)}"),
    ):
        if not (folder / f"{key}.safetensors").exists():
            continue
        _, tensors = load_weights(folder / f"{key}.safetensors", config)
        model = build_model(config, source.size)
        restore(model, tensors, folder)
        noise = draw_noise(config, len(indices), model.noise_shape, -1, 0, 0)
        scene, _ = apply_model(model, pixels, noise, config)
        reconstruction, masks = scene.compose()
        colors = matched_colors(truth, masks.argmax(1), masks.shape[1])
        panels.append((title, torch.einsum("bkhw,bkc->bhwc", masks.cpu(), colors)))
    panels.append(("reconstruction", reconstruction.permute(0, 2, 3, 1) / 2 + 0.5))
    for k in range(masks.shape[1]):
        mask = masks[:, k, :, :, None]
        picture = mask * (scene.decoded[:, k, :3].permute(0, 2, 3, 1).float() / 2 + 0.5) + (1 - mask)
        panels.append((f"slot {k + 1}", picture))

    figure = Figure(figsize=(1.1 * len(indices) + 1, 1.1 * len(panels)))
    axes = figure.subplots(len(panels), len(indices), squeeze=False)
    for row, (title, images) in zip(axes, panels, strict=True):
        for axis, picture in zip(row, images.float().cpu().clamp(0, 1), strict=True):
            axis.imshow(picture.numpy())
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(title, rotation=0, ha="right", va="center")
    save_figure(figure, folder / PICTURES["discovery"])


def save_figure(figure: Any, path: Path) -> None:
    figure.tight_layout(pad=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write(path, content.getbuffer())


@torch.no_grad()
def draw_objects(folder: Path, config: Config, source: Scenes, indices: Tensor) -> None:
    """objects.png: a column a scene; the image, its objects seen from above, and those predicted.

    Color, shape and size of a mark are the object's, its edge is thick where it is metal.
    """
    from matplotlib.figure import Figure

    pixels = source.images(indices, device=config.device)
    _, tensors = load_weights(folder / "before.safetensors", config)
    model = build_model(config, source.size)
    restore(model, tensors, folder)
    noise = draw_noise(config, len(indices), model.noise_shape, -1, 0, 0)
    predicted, _ = apply_model(model, pixels, noise, config)
    rows = {"truth": objects_of(config, source, indices).cpu(), "predicted": predicted.cpu()}

    figure = Figure(figsize=(1.6 * len(indices) + 1, 4.8))
    axes = figure.subplots(3, len(indices), squeeze=False)
    for axis, picture in zip(axes[0], pixels.cpu(), strict=True):
        axis.imshow(picture.permute(1, 2, 0).numpy())
    for row, (title, scenes) in zip(axes[1:], rows.items(), strict=True):
        row[0].set_ylabel(title, rotation=0, ha="right", va="center")
        for axis, objects in zip(row, scenes, strict=True):
            for thing in objects[objects[:, -1] > 0.5]:
                size, material, shape, color = kinds(thing)
                axis.plot(thing[0], thing[1], "so^"[shape], color=COLORS[color], markersize=(5, 9)[size],
                          markeredgecolor="black", markeredgewidth=(0.3, 1.2)[material])  # fmt: skip
            axis.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), aspect="equal")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    save_figure(figure, folder / PICTURES["set-prediction"])


def matched_colors(truth: Tensor, predicted: Tensor, num_slots: int) -> Tensor:
    """Each slot's color (B, K, 3): that of the true entity it fits best, one to one."""
    from scipy.optimize import linear_sum_assignment

    colors = []
    for true, pred in zip(truth.long().flatten(1).cpu(), predicted.flatten(1).cpu(), strict=True):
        entities = max(int(true.max()) + 1, num_slots)
        overlap = torch.bincount(true * num_slots + pred, minlength=entities * num_slots).view(entities, num_slots)
        chosen, slots = linear_sum_assignment(overlap.numpy(), maximize=True)
        entity = torch.zeros(num_slots, dtype=torch.long)
        entity[torch.as_tensor(slots)] = torch.as_tensor(chosen)
        colors.append(PALETTE[entity % len(PALETTE)])
    return torch.stack(colors)
