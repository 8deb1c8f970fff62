"""The scores of a model on scenes."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data import Scenes
from data.metrics import METRICS
from models.scene import signed
from models.set_prediction import set_loss
from training.config import Config
from training.losses import apply_model
from training.processes import num_ranks, rank
from training.random_numbers import draw_noise
from training.scenes import objects_of

#: The scores of a task, by their names in files. The loss of set prediction is the one that is trained.
SCORES = {
    "discovery": tuple(name for name, metric in METRICS.items() if metric.compares != "objects"),
    "set-prediction": (*(name for name, metric in METRICS.items() if metric.compares == "objects"), "loss"),
}


@torch.no_grad()
def evaluate(model: nn.Module, source: Scenes, indices: Tensor, draws: int, config: Config) -> dict:
    """The task's scores over scenes: {"ari": mean over draws of the noise, "ari_std": ..., "fg_ari": ...}.

    Set prediction scores all scenes together, and as "by_objects" those with each number of objects, of the first draw.
    Several processes share the scenes, 64 at a time or 16 larger ones, and know the scores of all.
    """
    score = score_masks if config.task == "discovery" else score_sets
    if num_ranks() > 1:  # each process's batch normalisation has averaged over its own share
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    each = []
    for number in range(draws):
        batches = []
        for i, chunk in enumerate(indices.split(64 if max(source.size) <= 64 else 16)):
            if i % num_ranks() == rank():
                noise = draw_noise(config, len(chunk), model.noise_shape, -1, number, i)
                batches.append((chunk, noise))
        each.append(score(model, source, batches, len(indices), config))
    columns = {name: torch.tensor([scored[name] for scored in each], dtype=torch.float64)
               for name in SCORES[config.task]}  # fmt: skip
    means = {name: column.mean().item() for name, column in columns.items()}
    deviations = {f"{name}_std": column.std(correction=0).item() for name, column in columns.items()}
    return each[0] | means | deviations


def score_masks(
    model: nn.Module, source: Scenes, batches: list[tuple[Tensor, Tensor]], total: int, config: Config
) -> dict[str, Any]:
    """Scores of the masks' argmax, mean over scenes."""
    sums = torch.zeros(len(SCORES["discovery"]), dtype=torch.float64)
    for indices, noise in batches:
        pixels, truth = source.batch(indices, device=config.device)
        scene, image = apply_model(model, pixels, noise, config)
        reconstruction, masks = scene.compose()
        sizes = dict(num_true=source.num_entities, num_pred=masks.shape[1])
        predicted = masks.argmax(1)
        each = {}
        for name in SCORES["discovery"]:
            metric = METRICS[name]
            if metric.compares == "labels":
                each[name] = metric.function(truth, predicted, **sizes)
            else:
                each[name] = metric.function(reconstruction, signed(image))
        sums += torch.stack([each[name].double().sum() for name in SCORES["discovery"]]).cpu()
    if num_ranks() > 1:
        dist.all_reduce(sums)
    return dict(zip(SCORES["discovery"], (sums / total).tolist(), strict=True))


def score_sets(
    model: nn.Module, source: Scenes, batches: list[tuple[Tensor, Tensor]], total: int, config: Config
) -> dict[str, Any]:
    """Average precision at each distance, over all scenes together, and of those with the same number of objects."""
    parts = []
    for indices, noise in batches:
        pixels = source.images(indices, device=config.device)
        predicted, _ = apply_model(model, pixels, noise, config)
        parts.append((predicted.cpu(), objects_of(config, source, indices).cpu()))
    if num_ranks() > 1:
        gathered: list[Any] = [None] * num_ranks()
        dist.all_gather_object(gathered, parts)
        in_order = itertools.zip_longest(*gathered)  # what is equally sure keeps its order
        parts = [part for row in in_order for part in row if part is not None]
    predicted, objects = (torch.cat(x) for x in zip(*parts, strict=True))
    functions = {name: METRICS[name].function for name in SCORES["set-prediction"] if name in METRICS}
    scored = {name: function(predicted, objects) for name, function in functions.items()}
    scored["loss"] = set_loss(predicted, objects, config.coordinate_scale).item()
    counts = (objects[..., -1] > 0.5).sum(1)
    by_objects = {
        int(n): {name: function(predicted[counts == n], objects[counts == n]) for name, function in functions.items()}
        for n in counts.unique()
    }
    return scored | {"by_objects": by_objects}
