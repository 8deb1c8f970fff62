"""What every source of scenes offers, be it a generator or a file."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Scenes", "check_indices"]


@runtime_checkable
class Scenes(Protocol):
    """A numbered collection of images with their true segmentation.

    Attributes:
        name: the data set, e.g. ``"tetrominoes"``.
        size: height and width of every image, in pixels.
        num_entities: the most entities a scene can hold, the background included.
    """

    name: str
    size: tuple[int, int]
    num_entities: int

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """The scenes of the given numbers.

        Args:
            indices: int64 (B,), each in ``[0, len(self))``, in any order; repeats are fine.
            device: where the result lies; None takes the device of `indices`.

        Returns:
            image: uint8 (B, 3, H, W), red, green and blue in 0..255.
            labels: uint8 (B, H, W), 0 for the background and 1.. for the objects.

        Raises:
            TypeError, ValueError, IndexError: `indices` is of another type, shape or range.
        """
        ...


def check_indices(indices: Tensor, length: int) -> None:
    """Raises a clear error unless `indices` is an int64 vector with every entry in ``[0, length)``."""
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        found = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices: expected a torch.int64 tensor, got {found}")
    if indices.ndim != 1:
        raise ValueError(f"indices: expected shape (B,), got {tuple(indices.shape)}")
    if indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= length:
            raise IndexError(f"indices: expected values in [0, {length}), got {low} to {high}")
