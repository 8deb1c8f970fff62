"""What the models are trained on, and how their segmentations are scored."""

from . import scores
from .files import DataError, load
from .scenes import Scenes
from .tetrominoes import TetrominoesGenerator

__all__ = ["DataError", "Scenes", "TetrominoesGenerator", "load", "scores"]
