"""What the models are trained on, and how their segmentations are scored.

`DATASETS` is the table of data sets, `metrics.METRICS` that of scores.
"""

from data import metrics
from data.dataset import Dataset
from data.datasets import DATASETS
from data.datasets.clevr_like import ClevrLikeGenerator
from data.datasets.multi_dsprites import MultiDSpritesGenerator
from data.datasets.shapes import ShapesGenerator
from data.datasets.tetrominoes import TetrominoesGenerator
from data.errors import DataError
from data.files import load
from data.resident import ResidentScenes
from data.scenes import ObjectScenes, Scenes

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


def generator(name: str, num_scenes: int, seed: int = 0, first: int = 0) -> Scenes:
    """Draw scenes of the data set `name` on the fly: number `first` and on of the stream `seed`.

    Raises:
        ValueError: there is no such data set, or none without a file.
        TypeError, ValueError: an argument is no integer or out of range.
    """
    if name not in DATASETS or DATASETS[name].generator is None:
        drawn = [known for known, entry in DATASETS.items() if entry.generator is not None]
        reason = "its scenes come from a file" if name in DATASETS else "no such data set"
        raise ValueError(f"name: expected one of {', '.join(map(repr, drawn))}, got {name!r}: {reason}")
    return DATASETS[name].generator(num_scenes, seed=seed, first=first)
