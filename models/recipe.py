"""What training asks of a model: how it is called, and for each task a recipe, from which it is built and trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from models.scene import Scene

Task = Literal["discovery", "set-prediction"]


class SlotModel(Protocol):
    """What the module that a recipe builds must be, besides an `nn.Module`.

    For discovery it makes a `Scene` of images; for set prediction objects (B, K, 19), or with `stepwise=True` those
    after every iteration (T, B, K, 19). `set_prediction.py` says what an object is.

    Attributes:
        noise_shape: of the standard normal numbers that decide an image's draws; (0,) where nothing is drawn.
        adam_only: optional; parameters whose names begin so are left to Adam where Muon trains the others.
    """

    noise_shape: tuple[int, ...]

    def __call__(self, image: Tensor, *, noise: Tensor) -> Scene | Tensor:
        """Explain images (B, 3, H, W) in [0, 1] by standard normal noise (B, *noise_shape)."""
        ...


@dataclass(frozen=True)
class Recipe:
    """How a model is built and trained for one task.

    Attributes:
        model: its name in `--model`.
        title: its name in tables.
        source: who published it.
        task: what it learns.
        build: makes the module, a `SlotModel`: `build(resolution, *, ...)` with `train.py`'s options by their names.
            What it takes is what the model has; every other size or choice is refused.
        presets: by name (paper, quick, smoke) what a preset sets, of the options that `train.py --help` says it sets.
        published: what else a preset sets for the network of a data set, by both their names.
        least_slots: the smallest K it takes.
        fixed_slots: whether trained weights take no other K than they were trained with.
        unsaid: what weights mean that were saved before they said so.
        set_loss: of set prediction; from what the model made, the true objects (B, M, 19) and the factor on
            coordinates to the loss and its parts for the log. Discovery has `Scene.objective`.
        sees_objects: whether in training the model is called with the true `objects`, too.
    """

    model: str
    title: str
    source: str
    task: Task
    build: Callable[..., nn.Module]
    presets: Mapping[str, Mapping[str, Any]]
    published: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    least_slots: int = 1
    fixed_slots: bool = False
    unsaid: Mapping[str, Any] = field(default_factory=dict)
    set_loss: Callable[[Any, Tensor, float], tuple[Tensor, dict[str, Tensor]]] | None = None
    sees_objects: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """The options that the network takes."""
        return tuple(inspect.signature(self.build).parameters)[1:]


#: What `smoke` sets, but for the sizes of the network.
SMOKE: dict[str, Any] = dict(
    steps=20, fine_tune_steps=10, num_scenes=256, eval_scenes=32, batch_size=8,
    optimizer="muon", lr=1e-3, fine_tune_lr=5e-4, warmup_steps=5, half_life=20, clip=1.0,
    fine_tune_warmup_steps=5, margin=4e-4, hinge_scale=1e3, initial_weights="own",
)  # fmt: skip


def without(preset: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A preset but for what another model has not."""
    return {name: value for name, value in preset.items() if name not in names}
