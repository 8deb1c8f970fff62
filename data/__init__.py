"""What the models are trained on, and how their segmentations are scored."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from . import metrics
from .clevr import PictureFolder
from .clevr_like import ClevrLikeGenerator
from .files import FORMATS, DataError, Format, load
from .multi_dsprites import MultiDSpritesGenerator
from .scenes import ObjectScenes, ResidentScenes, Scenes
from .shapes import ShapesGenerator
from .tetrominoes import TetrominoesGenerator

__all__ = [
    "DATASETS",
    "ClevrLikeGenerator",
    "DataError",
    "Dataset",
    "MultiDSpritesGenerator",
    "ObjectScenes",
    "ResidentScenes",
    "Scenes",
    "ShapesGenerator",
    "TetrominoesGenerator",
    "generator",
    "load",
    "metrics",
]


class Dataset(NamedTuple):
    """Where the scenes of a data set come from, and what they are.

    Attributes:
        generator: takes `num_scenes`, `seed` and `first`; None where the scenes come from files alone.
        file: how a file, or a folder of pictures, stores them, for `load`; None where there are no files.
        size: height and width of every image, in pixels.
        num_entities: the most entities a scene can hold, the background included.
        properties: whether the properties of the objects are known: the scenes follow `ObjectScenes`.
        masks: whether it is known which pixels are whose.
    """

    generator: Callable[..., Scenes] | None
    file: Format | PictureFolder | None
    size: tuple[int, int]
    num_entities: int
    properties: bool
    masks: bool


_GENERATORS = {
    "tetrominoes": TetrominoesGenerator,
    "multi-dsprites": MultiDSpritesGenerator,
    "multi-dsprites-binarized": partial(MultiDSpritesGenerator, variant="binarized"),
    "multi-dsprites-colored": partial(MultiDSpritesGenerator, variant="colored_on_colored"),
    "shapes": ShapesGenerator,
    "clevr-like": ClevrLikeGenerator,
    "clevr6-like": partial(ClevrLikeGenerator, max_objects=6),
}


def _dataset(name: str) -> Dataset:
    make, file = _GENERATORS.get(name), FORMATS.get(name)
    scenes = make(1) if make else None
    size, num_entities = (scenes.size, scenes.num_entities) if scenes else (file.size, file.num_entities)
    properties = isinstance(scenes, ObjectScenes) or (file is not None and file.properties)
    return Dataset(make, file, size, num_entities, properties, masks=file is None or file.masks)


#: All data sets by name.
DATASETS = {name: _dataset(name) for name in (*_GENERATORS, *(name for name in FORMATS if name not in _GENERATORS))}


def generator(name: str, num_scenes: int, seed: int = 0, first: int = 0) -> Scenes:
    """Scenes of the data set `name`, drawn on the fly: number `first` and on of the stream `seed`.

    Raises:
        ValueError: there is no such data set, or none without a file.
        TypeError, ValueError: an argument is no integer or out of range.
    """
    if name not in _GENERATORS:
        reason = "its scenes come from a file" if name in DATASETS else "no such data set"
        raise ValueError(f"name: expected one of {', '.join(map(repr, _GENERATORS))}, got {name!r}: {reason}")
    return _GENERATORS[name](num_scenes, seed=seed, first=first)
