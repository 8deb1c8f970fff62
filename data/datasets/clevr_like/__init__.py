"""Scenes like CLEVR's, drawn on the fly by ray casting: no Blender, no file, any number of scenes.

As in CLEVR (Johnson et al., 2017), cubes, spheres and cylinders of two sizes, two materials and eight colors stand on
a gray plane, under a camera and lamps that stand a little elsewhere in each scene. Sizes, colors, the square they
stand in and the camera are those of CLEVR's published generator; the image is the square that the field cuts out of
320 x 240 pixels (rows 29 to 220, columns 64 to 255), at 128 x 128. What is not CLEVR's: one ray a pixel, hard shadows
of one light, metal that mirrors a plain surrounding instead of the other objects, and brightness chosen by eye.

A scene is a pure function of (seed, number): its random words come from hashing a counter. The arithmetic is float32
additions, products, quotients and square roots, each rounded alone, so a scene is the same bit for bit in whatever
batch and order it is asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from data.dataset import Dataset
from data.datasets.clevr_like.camera import PIXELS, SIZE
from data.datasets.clevr_like.placement import draw
from data.datasets.clevr_like.shading import shade
from data.generator import SceneGenerator, check_integer
from data.properties import MAX_OBJECTS, NUM_PROPERTIES, encode

__all__ = ["ENTRIES", "ClevrLikeGenerator"]

CHUNK = 16  # scenes rendered at a time, whose temporaries the processor's caches hold


@dataclass(frozen=True)
class ClevrLikeGenerator(SceneGenerator):
    """Scenes like CLEVR's, 128 x 128, with masks and all properties of their objects.

    The number of objects is uniform over `min_objects` to `max_objects`; shape, size, material, color and rotation
    are uniform and independent, positions uniform under the conditions at the head of this file. A scene in which an
    object shows fewer than 89 pixels is drawn anew, as in CLEVR, all but the number of objects. Objects are in the
    order they were drawn in. Follows the `ObjectScenes` protocol; see `SceneGenerator` for the other arguments.

    Args:
        min_objects, max_objects: the fewest and the most objects of a scene, 1 to 10.

    Raises:
        TypeError, ValueError: an argument is no integer or out of range.
    """

    min_objects: int = 3
    max_objects: int = MAX_OBJECTS

    size: ClassVar[tuple[int, int]] = (SIZE, SIZE)
    num_properties: ClassVar[int] = NUM_PROPERTIES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("min_objects", self.min_objects, 1, MAX_OBJECTS + 1)
        check_integer("max_objects", self.max_objects, self.min_objects, MAX_OBJECTS + 1)

    @property
    def name(self) -> str:
        return "clevr-like" if self.max_objects > 6 else "clevr6-like"

    @property
    def num_entities(self) -> int:
        return 1 + self.max_objects

    def batch(self, indices: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Draw the scenes `first + indices` on `device`; see `Scenes.batch`.

        The host waits for the device to check the indices and in every round of attempts. Takes about 100 KB of memory
        a scene, and 40 MB for the few that are rendered at a time.
        """
        scenes, labels = draw(self.keys(indices, device), self.min_objects, self.max_objects)
        image = torch.empty(len(labels), 3, PIXELS, dtype=torch.uint8, device=labels.device)
        for start in range(0, len(labels), CHUNK):
            chunk = slice(start, start + CHUNK)
            image[chunk] = shade(scenes.rows(chunk), labels[chunk])
        return image.unflatten(-1, (SIZE, SIZE)), labels.unflatten(-1, (SIZE, SIZE))

    def properties(self, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Draw the objects of the scenes `first + indices`; see `ObjectScenes.properties`.

        Half the work of `batch`, as only what is seen tells which scenes there are.
        """
        scenes, _ = draw(self.keys(indices, device), self.min_objects, self.max_objects)
        centres = torch.stack(scenes.centres, -1)
        return encode(centres, scenes.large, scenes.metal, scenes.shape, scenes.color, scenes.real)


def _entry(name: str, generator: Callable[..., ClevrLikeGenerator]) -> Dataset:
    citation = 'after Johnson et al., "CLEVR: A Diagnostic Dataset", 2017'
    return Dataset(name, citation, "drawn after github.com/facebookresearch/clevr-dataset-gen", generator=generator)


ENTRIES = (
    _entry("clevr-like", ClevrLikeGenerator),
    _entry("clevr6-like", partial(ClevrLikeGenerator, max_objects=6)),
)
