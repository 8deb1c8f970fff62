"""How published files store their scenes: those of Multi-Object Datasets, and folders of pictures."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from data.properties import COLORS, MATERIALS, MAX_OBJECTS, NUM_PROPERTIES, SHAPES, SIZES

__all__ = ["CODES", "MULTI_OBJECT_DATASETS", "NUMBERS", "Format", "PictureFolder"]

#: Where the files of Multi-Object Datasets are.
MULTI_OBJECT_DATASETS = "github.com/deepmind/multi_object_datasets"

# The records of CLEVR with masks hold these features of 11 entities each, the background first.
NUMBERS = ("x", "y", "z", "visibility")  # floats
CODES = {"size": SIZES, "material": MATERIALS, "shape": SHAPES, "color": COLORS}  # bytes: 0 for none, or 1 and on


@dataclass(frozen=True)
class Format:
    """How one data set of Multi-Object Datasets stores its scenes, and which part of them is used.

    Attributes:
        stored_as: what the converted scenes are kept as; formats that differ in `most` alone share it.
        image: shape of the record's `image` feature, (H, W, 3) or (H, W, 1).
        mask: shape of its `mask` feature: a trailing 1, and otherwise H, W and the entities.
        entity_axis: which axis of `mask` counts the entities.
        backgrounds: how many of the entities, the first ones, are background: all of them become label 0.
        strays: up to which fraction of a scene's pixels may belong to no entity or to several.
        crop: the first row and column and the side of the square that is cut out; None: all.
        side: the side that it is resized to.
        properties: the properties of objects are there, too, as CLEVR's.
        masks: which pixels are whose is known; always, of these files.
        most: only scenes with at most so many objects are used; None: all.
    """

    stored_as: str
    image: tuple[int, int, int]
    mask: tuple[int, int, int, int]
    entity_axis: int
    backgrounds: int = 1
    strays: float = 0.01
    crop: tuple[int, int, int] | None = None
    side: int | None = None
    properties: bool = False
    masks: ClassVar[bool] = True
    most: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.image[:2] if self.crop is None else (self.side, self.side)

    @property
    def num_entities(self) -> int:
        objects = self.mask[self.entity_axis] - self.backgrounds
        return 1 + (objects if self.most is None else self.most)

    @property
    def arrays(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """The arrays of converted scenes, by name: type and shape of a scene's row."""
        byte, number = np.dtype(np.uint8), np.dtype(np.float32)
        arrays = {"image": (byte, (3, *self.size)), "labels": (byte, self.size)}
        return arrays | ({"properties": (number, (MAX_OBJECTS, NUM_PROPERTIES))} if self.properties else {})


@dataclass(frozen=True)
class PictureFolder:
    """What a folder of pictures with known objects holds, once it is converted: as `Format` says of files."""

    size: tuple[int, int] = (128, 128)
    num_entities: int = 1 + MAX_OBJECTS
    properties: bool = True
    masks: bool = False

    @property
    def arrays(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """The arrays of converted scenes, by name: type and shape of a scene's row."""
        return {
            "image": (np.dtype(np.uint8), (3, *self.size)),
            "properties": (np.dtype(np.float32), (MAX_OBJECTS, NUM_PROPERTIES)),
        }
