"""What objects of CLEVR are, and how set prediction writes it down (Locatello et al., 2020, supplement)."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

__all__ = ["COLORS", "MATERIALS", "MAX_OBJECTS", "NUM_PROPERTIES", "SHAPES", "SIZES", "encode", "kinds"]

MAX_OBJECTS = 10

# In the order of the one-hot vectors.
SIZES = ("small", "large")
MATERIALS = ("rubber", "metal")
SHAPES = ("cube", "sphere", "cylinder")
COLORS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")

NUM_PROPERTIES = 3 + len(SIZES) + len(MATERIALS) + len(SHAPES) + len(COLORS) + 1  # 19


def encode(coordinates: Tensor, size: Tensor, material: Tensor, shape: Tensor, color: Tensor, real: Tensor) -> Tensor:
    """Encode objects as vectors of 19 numbers.

    Args:
        coordinates: float32 (..., 3), the object's centre, in [-3, 3].
        size, material, shape, color: int64 (...), numbers into the tables above; anything where there is no object.
        real: bool (...), whether there is an object.

    Returns:
        float32 (..., 19): coordinates scaled from [-3, 3] to [0, 1], the four one-hot vectors, and 1; zeros where
        there is no object.
    """
    parts = [(coordinates + 3) * (1 / 6)]
    for number, table in ((size, SIZES), (material, MATERIALS), (shape, SHAPES), (color, COLORS)):
        parts.append(one_hot(number.where(real, 0), len(table)))
    return torch.cat([*parts, torch.ones_like(real)[..., None]], -1) * real[..., None].float()


def kinds(objects: Tensor) -> list[Tensor]:
    """Decode size, material, shape and color of objects (..., 19), or of predictions, whose largest number counts.

    Each is int64 (...), numbers into the tables above.
    """
    one_hots = objects[..., 3:-1].split([len(table) for table in (SIZES, MATERIALS, SHAPES, COLORS)], -1)
    return [one_hot.argmax(-1) for one_hot in one_hots]
