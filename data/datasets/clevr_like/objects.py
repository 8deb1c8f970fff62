"""What stands in a scene: objects as unit bodies, scaled, turned and moved."""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from data.datasets.clevr_like.camera import View
from data.datasets.clevr_like.vectors import Vector, look_up, take
from data.properties import SHAPES

__all__ = ["RADII", "DrawnScenes", "Solids", "corners_of"]

RADII = (0.35, 0.7)  # half the height of all objects, and half the width of cubes


class DrawnScenes(NamedTuple):
    """B scenes of up to M = 10 objects."""

    real: Tensor  # bool (B, M): is there an object?
    shape: Tensor  # int64 (B, M), as all factors: numbers into the tables in properties.py
    large: Tensor
    metal: Tensor
    color: Tensor
    cosine: Tensor  # float32 (B, M): of the rotation about the vertical axis
    sine: Tensor
    position: Tensor  # float32 (B, M, 2): x and y
    camera: Tensor  # float32 (B, 3)
    lamps: Tensor  # float32 (B, 3, 3)

    def rows(self, rows: Tensor | slice) -> "DrawnScenes":
        return DrawnScenes(*(part[rows] for part in self))

    @property
    def half(self) -> Tensor:
        """Half the objects' height, float32 (B, M): the radii, and half the sides of cubes."""
        return look_up(RADII, self.large)

    @property
    def centres(self) -> Vector:
        """The objects' centres, (B, M): they stand on the plane z = 0."""
        return *self.position.unbind(-1), self.half


class Solids(NamedTuple):
    """Objects as unit bodies, scaled, turned and moved: (B, M) each, or (L,) taken from them.

    A unit body is what the cube |x|, |y|, |z| <= 1 has in common with x^2 + y^2 + bulge * z^2 <= limit: a sphere, a
    cylinder or, for a limit beyond its corners, the cube.
    """

    centre: Vector
    cosine: Tensor
    sine: Tensor
    half: Tensor
    bulge: Tensor
    limit: Tensor

    @staticmethod
    def of(scenes: DrawnScenes) -> "Solids":
        bulge = (scenes.shape != SHAPES.index("cylinder")).float()
        limit = torch.where(scenes.shape == SHAPES.index("cube"), 4.0, 1.0)
        return Solids(scenes.centres, scenes.cosine, scenes.sine, scenes.half, bulge, limit)

    def take(self, which: Tensor) -> "Solids":
        return Solids(take(self.centre, which), *take(self[1:], which))

    def view(self, view: View) -> View:
        """Express the cameras (B, 1) in the unit bodies' coordinates, (B, M) each: depths stay the same."""
        return View(self.relative(view.origin), *(self.inward(*axis) for axis in view[1:]))

    def inward(self, x: Tensor, y: Tensor, z: Tensor) -> Vector:
        """Express a direction in the unit body's coordinates."""
        return (
            (self.cosine * x + self.sine * y) / self.half,
            (self.cosine * y - self.sine * x) / self.half,
            z / self.half,
        )

    def relative(self, point: Vector) -> Vector:
        """Express a point in the unit body's coordinates."""
        return self.inward(*(p - c for p, c in zip(point, self.centre, strict=True)))

    def crossings(self, origin: Vector, direction: Vector) -> tuple[list[Tensor], list[Tensor]]:
        """Find where rays, given in the unit body's coordinates, enter and leave its three slabs and its round part.

        The body is entered at the last entry and left at the first exit, and missed where that is no later.
        """
        entries, exits = [], []
        for o, d in zip(origin, direction, strict=True):
            middle, reach = -o / d, (1 / d).abs()
            entries.append(middle - reach)
            exits.append(middle + reach)
        (ox, oy, oz), (x, y, z) = origin, direction
        a = x * x + y * y + self.bulge * (z * z)
        b = ox * x + oy * y + self.bulge * (oz * z)
        c = ox * ox + oy * oy + self.bulge * (oz * oz) - self.limit
        root = b * b - a * c
        root = torch.where(root < 0, -math.inf, root.clamp(min=0).sqrt())  # a negative root is slow, as well as NaN
        return [*entries, (-b - root) / a], [*exits, (root - b) / a]


def corners_of(scenes: DrawnScenes) -> Vector:
    """Compute the corners of the cubes that the objects fill: (B, M, 8) each."""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), device=scenes.real.device)
    x, y, z = (scenes.half[..., None] * sign for sign in signs.unbind(1))
    cosine, sine = scenes.cosine[..., None], scenes.sine[..., None]
    turned = (cosine * x - sine * y, sine * x + cosine * y, z)
    return tuple(c[..., None] + t for c, t in zip(scenes.centres, turned, strict=True))
