"""What the models are trained on, and how their segmentations are scored."""

from . import scores
from .files import DataError, load
from .scenes import ResidentScenes, Scenes
from .tetrominoes import TetrominoesGenerator

__all__ = ["DataError", "ResidentScenes", "Scenes", "TetrominoesGenerator", "load", "scores"]
