"""What the generators of scenes have in common: a stream of numbered scenes, and its arguments."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.random_words import scene_keys
from data.scenes import check_indices

__all__ = ["SceneGenerator", "check_integer"]


@dataclass(frozen=True)
class SceneGenerator:
    """Scenes number `first` to `first + num_scenes - 1` of the stream `seed`.

    A scene is a pure function of (seed, number). Two generators with the same seed and disjoint ranges share no scene
    but by chance.

    Args:
        num_scenes: how many scenes, at least 1.
        seed: the stream of scenes, at least 0.
        first: the number of the scene that index 0 means, at least 0.

    Raises:
        TypeError, ValueError: an argument is no integer or out of range.
    """

    num_scenes: int
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_scenes", 1), ("seed", 0), ("first", 0)):
            check_integer(name, getattr(self, name), least, 2**62)

    def __len__(self) -> int:
        return self.num_scenes

    def batch(self, indices: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Draw the scenes `first + indices` on `device`; see `Scenes.batch`."""
        raise NotImplementedError

    def images(self, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Draw the images alone; see `Scenes.images`. Their labels fall off as they are drawn."""
        return self.batch(indices, device)[0]

    def keys(self, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Hash the random keys of the scenes `first + indices`, on `device`, and check the indices."""
        check_indices(indices, len(self))
        return scene_keys(self.seed, self.first + indices.to(indices.device if device is None else device))


def check_integer(name: str, value: int, least: int, bound: int) -> None:
    """Raise a clear error unless the argument `name` is an integer in `[least, bound)`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if not least <= value < bound:
        bound = "2**62" if bound == 2**62 else bound
        raise ValueError(f"{name}: expected {least} or more and below {bound}, got {value}")
