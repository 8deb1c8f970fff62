"""What every source of scenes offers, be it a generator or a file."""

import sys
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from tqdm import tqdm

__all__ = ["ObjectScenes", "ResidentScenes", "Scenes", "check_indices", "progress_bar"]


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


@runtime_checkable
class ObjectScenes(Scenes, Protocol):
    """Scenes that know what their objects are, for set prediction.

    Attributes:
        num_properties: the length of an object's vector, 19.
    """

    num_properties: int

    def properties(self, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        """The objects of the scenes of the given numbers.

        Args:
            indices: as `Scenes.batch` takes them.
            device: where the result lies; None takes the device of `indices`.

        Returns:
            float32 (B, 10, 19), the objects in the order of the labels, then rows of zeros. An object is x, y and z of
            its centre, scaled from [-3, 3] to [0, 1]; its size (small, large), material (rubber, metal), shape (cube,
            sphere, cylinder) and colour (gray, red, blue, green, brown, purple, cyan, yellow), one-hot each; and 1.

        Raises:
            TypeError, ValueError, IndexError: `indices` is of another type, shape or range.
        """
        ...


class ResidentScenes:
    """The scenes of another source, all of them in a device's memory: a batch is then one look-up.

    Follows the `Scenes` protocol. The first batch of a generator or a file takes work or waits for the device to check
    its indices; here neither happens again, so a training step never waits for its scenes.

    Args:
        source: the scenes.
        device: where they shall lie.
        num_scenes: how many of them, the first ones: `num_scenes * H * W * 4` bytes. None: all.
        properties: keep the properties of the objects, too: 760 bytes a scene. The scenes then follow `ObjectScenes`.
        progress: show a progress bar, on a terminal.

    Raises:
        TypeError: properties are asked for and `source` has none.
    """

    def __init__(
        self,
        source: Scenes,
        device: torch.device | str,
        num_scenes: int | None = None,
        *,
        properties: bool = False,
        progress: bool = True,
    ) -> None:
        if properties and not isinstance(source, ObjectScenes):
            raise TypeError(f"source: expected scenes that know their objects' properties, got {source.name!r}")
        length = len(source) if num_scenes is None else num_scenes
        self.name, self.size, self.num_entities = source.name, source.size, source.num_entities
        height, width = source.size
        self.images = torch.empty(length, 3, height, width, dtype=torch.uint8, device=device)
        self.labels = torch.empty(length, height, width, dtype=torch.uint8, device=device)
        chunks = torch.arange(length).split(1000)
        for indices in progress_bar(progress, chunks, desc=f"{source.name}, a thousand scenes"):
            chunk = slice(int(indices[0]), int(indices[-1]) + 1)
            self.images[chunk], self.labels[chunk] = source.batch(indices, device)
        if properties:
            self.num_properties = source.num_properties
            self.objects = torch.cat([source.properties(indices, device) for indices in chunks])

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Looks the scenes up, where they lie; see `Scenes.batch`. The host does not wait for indices on a GPU."""
        return self._look_up(self.images, indices, device), self._look_up(self.labels, indices, device)

    def properties(self, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Looks the objects up; see `ObjectScenes.properties`. Only with ``properties=True``."""
        return self._look_up(self.objects, indices, device)

    def _look_up(self, table: Tensor, indices: Tensor, device: torch.device | str | None) -> Tensor:
        check_indices(indices, len(self), values=not indices.is_cuda)
        return table[indices.to(table.device)].to(indices.device if device is None else device)


def progress_bar(wanted: bool, *arguments: object, **options: object) -> tqdm:
    """tqdm's bar with these arguments, where it is wanted and stderr is a terminal."""
    try:
        shown = wanted and sys.stderr.isatty()
    except (AttributeError, ValueError):  # it is closed, before Python started or since
        shown = False
    return tqdm(*arguments, disable=not shown, **options)


def check_indices(indices: Tensor, length: int, values: bool = True) -> None:
    """Raises a clear error unless `indices` is an int64 vector with every entry in ``[0, length)``.

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
