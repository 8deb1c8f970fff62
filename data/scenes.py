"""What every source of scenes offers, be it a generator or a file."""

import sys
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from tqdm import tqdm

__all__ = ["ObjectScenes", "Scenes", "check_indices", "progress_bar"]


@runtime_checkable
class Scenes(Protocol):
    """A numbered collection of images with their true segmentation.

    Attributes:
        name: the data set, e.g. `"tetrominoes"`.
        size: height and width of every image, in pixels.
        num_entities: the most entities a scene can hold, the background included.
    """

    name: str
    size: tuple[int, int]
    num_entities: int

    def __len__(self) -> int: ...

    def images(self, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Give the images of `batch` alone, for a training step: a file's labels are not read.

        Args:
            indices: as `batch` takes them.
            device: where the result lies; None takes the device of `indices`.

        Returns:
            uint8 (B, 3, H, W), red, green and blue in 0..255.

        Raises:
            TypeError, ValueError, IndexError: `indices` is of another type, shape or range.
        """
        ...

    def batch(self, indices: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Give the images of the given numbers with their true segmentation.

        Args:
            indices: int64 (B,), each in `[0, len(self))`, in any order; repeats are fine.
            device: where the result lies; None takes the device of `indices`.

        Returns:
            image: uint8 (B, 3, H, W), red, green and blue in 0..255.
            labels: uint8 (B, H, W), 0 for the background and 1.. for the objects.

        Raises:
            TypeError, ValueError, IndexError: `indices` is of another type, shape or range.
        """
        ...


@runtime_checkable
class ObjectScenes(Scenes, Protocol):
    """Scenes that know what their objects are, for set prediction.

    Attributes:
        num_properties: the length of an object's vector, 19.
    """

    num_properties: int

    def properties(self, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Give the objects of the scenes of the given numbers.

        Args:
            indices: as `Scenes.batch` takes them.
            device: where the result lies; None takes the device of `indices`.

        Returns:
            float32 (B, 10, 19), the objects in the order of the labels, then rows of zeros. An object is x, y and z of
            its centre, scaled from [-3, 3] to [0, 1]; its size (small, large), material (rubber, metal), shape (cube,
            sphere, cylinder) and color (gray, red, blue, green, brown, purple, cyan, yellow), one-hot each; and 1.

        Raises:
            TypeError, ValueError, IndexError: `indices` is of another type, shape or range.
        """
        ...


def progress_bar(wanted: bool, *arguments: object, **options: object) -> tqdm:
    """Make tqdm's bar with these arguments, where it is wanted and stderr is a terminal."""
    try:
        shown = wanted and sys.stderr.isatty()
    except (AttributeError, ValueError):  # it is closed, before Python started or since
        shown = False
    return tqdm(*arguments, disable=not shown, **options)


def check_indices(indices: Tensor, length: int, values: bool = True) -> None:
    """Raise a clear error unless `indices` is an int64 vector with every entry in `[0, length)`.

    Without `values` the entries are not looked at, which on a GPU would wait for it.
    """
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        found = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices: expected a torch.int64 tensor, got {found}")
    if indices.ndim != 1:
        raise ValueError(f"indices: expected shape (B,), got {tuple(indices.shape)}")
    if values and indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= length:
            raise IndexError(f"indices: expected values in [0, {length}), got {low} to {high}")
