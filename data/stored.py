"""Scenes that lie in a folder of arrays, mapped into memory: what is not asked for is not read."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.cache import open_arrays
from data.formats import Format, PictureFolder
from data.properties import MAX_OBJECTS, NUM_PROPERTIES
from data.scenes import check_indices

__all__ = ["StoredObjectScenes", "StoredScenes", "UnlabeledStoredScenes"]


class StoredScenes:
    """The scenes of a data set in a folder of arrays: image uint8 (n, 3, H, W) and labels uint8 (n, H, W)."""

    def __init__(
        self, name: str, form: Format | PictureFolder, cache: Path, wanted: dict, verify: bool = False
    ) -> None:
        self.name, self.size, self.num_entities = name, form.size, form.num_entities
        self._arrays = open_arrays(cache, wanted, form.arrays, verify)
        self._rows = np.arange(len(self._arrays["image"]))
        self._opened = name, form, cache, wanted

    def __reduce__(self) -> tuple[type, tuple]:
        """Pickle where the arrays lie, as for a worker of a DataLoader: another process opens these again.

        Opening raises a `DataError` if the scenes have been made anew from another file in the meantime.
        """
        return type(self), self._opened

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Copy the scenes out of the file; see `Scenes.batch`."""
        return self.images(indices, device), self._take("labels", indices, device)

    def images(self, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Copy the images alone; see `Scenes.images`. The file of the labels is not read."""
        return self._take("image", indices, device)

    def _take(self, name: str, indices: Tensor, device: torch.device | str | None) -> Tensor:
        check_indices(indices, len(self))
        rows = self._rows[indices.numpy(force=True)]
        return torch.from_numpy(self._arrays[name][rows]).to(indices.device if device is None else device)


class StoredObjectScenes(StoredScenes):
    """The same with properties, float32 (n, 10, 19); only the scenes with no more objects than the data set has."""

    num_properties = NUM_PROPERTIES

    def __init__(self, *opened: object) -> None:
        super().__init__(*opened)
        self._rows = np.flatnonzero(self._arrays["properties"][..., -1].sum(1) < self.num_entities)

    def properties(self, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Copy the objects out of the file, those that have a pixel in the image; see `ObjectScenes.properties`."""
        objects, labels = self._take("properties", indices, device), self._take("labels", indices, device)
        # Object number m has the label m + 1. As a scene's objects are counted before, all of them stay in the file.
        seen = torch.zeros(len(labels), 256, dtype=torch.bool, device=labels.device)
        seen = seen.scatter_(1, labels.flatten(1).long(), True)[:, 1 : 1 + MAX_OBJECTS]
        first = (~seen).to(torch.uint8).argsort(dim=1, stable=True)  # rows of zeros come last
        return (objects * seen.unsqueeze(2)).take_along_dim(first.unsqueeze(2), 1)


class UnlabeledStoredScenes(StoredScenes):
    """Scenes of the original CLEVR: image uint8 (n, 3, H, W) and properties float32 (n, 10, 19), but no labels."""

    num_properties = NUM_PROPERTIES

    def batch(self, indices: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Copy the images out of the file; all labels are 0; see `Scenes.batch`."""
        image = self.images(indices, device)
        return image, torch.zeros_like(image[:, 0])

    def properties(self, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Copy the objects out of the file; see `ObjectScenes.properties`."""
        return self._take("properties", indices, device)
