"""Scenes that lie in a device's memory."""

import torch
from torch import Tensor

from data.scenes import ObjectScenes, Scenes, check_indices, progress_bar

__all__ = ["ResidentScenes"]


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
        self._images = torch.empty(length, 3, height, width, dtype=torch.uint8, device=device)
        self._labels = torch.empty(length, height, width, dtype=torch.uint8, device=device)
        chunks = torch.arange(length).split(1000)
        for indices in progress_bar(progress, chunks, desc=f"{source.name}, a thousand scenes"):
            chunk = slice(int(indices[0]), int(indices[-1]) + 1)
            self._images[chunk], self._labels[chunk] = source.batch(indices, device)
        if properties:
            self.num_properties = source.num_properties
            self._objects = torch.cat([source.properties(indices, device) for indices in chunks])

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Look the scenes up, where they lie; see `Scenes.batch`. The host does not wait for indices on a GPU."""
        return self.images(indices, device), self._look_up(self._labels, indices, device)

    def images(self, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Look the images up; see `Scenes.images`."""
        return self._look_up(self._images, indices, device)

    def properties(self, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Look the objects up; see `ObjectScenes.properties`. Only with `properties=True`."""
        return self._look_up(self._objects, indices, device)

    def _look_up(self, table: Tensor, indices: Tensor, device: torch.device | str | None) -> Tensor:
        check_indices(indices, len(self), values=not indices.is_cuda)
        return table[indices.to(table.device)].to(indices.device if device is None else device)
