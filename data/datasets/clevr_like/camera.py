"""Cameras that look at the origin, and the pixels that they see."""

from typing import NamedTuple

import torch
from torch import Tensor

from data.datasets.clevr_like.vectors import Vector, dot, normalize, take

__all__ = ["PIXELS", "SIZE", "View", "place_of"]

SIZE = 128  # pixels, height and width of the image
PIXELS = SIZE * SIZE  # P

# CLEVR's camera has a lens of 35 mm for a sensor of 32 mm, over 320 pixels. It looks at the origin.
SCALE = 128 / 192  # pixels here for a pixel of 320 x 240
FOCAL = 320 * 35 / 32 * SCALE
CENTRE = ((240 / 2 - 29) * SCALE, (320 / 2 - 64) * SCALE)  # row and column of the optical axis


class View(NamedTuple):
    """Cameras that look at the origin, upright: unit vectors, (B, 1) each."""

    origin: Vector
    forward: Vector
    right: Vector
    up: Vector

    @staticmethod
    def of(camera: Tensor) -> "View":
        origin = x, y, z = tuple(camera[:, i, None] for i in range(3))
        forward = normalize((-x, -y, -z))
        right = normalize((forward[1], -forward[0], torch.zeros_like(x)))
        up = (right[1] * forward[2], -right[0] * forward[2], right[0] * forward[1] - right[1] * forward[0])
        return View(origin, forward, right, up)

    def project(self, point: Vector) -> tuple[Tensor, Tensor]:
        """Find row and column where a point is seen; pixel (i, j) covers [i, i + 1) x [j, j + 1)."""
        relative = tuple(p - o for p, o in zip(point, self.origin, strict=True))
        pixels = FOCAL / dot(relative, self.forward)
        return CENTRE[0] - pixels * dot(relative, self.up), CENTRE[1] + pixels * dot(relative, self.right)

    def take(self, which: Tensor) -> "View":
        """Take the views number `which` (L,), one for each ray."""
        return View(*(take(vector, which) for vector in self))

    def ray(self, row: Tensor, column: Tensor) -> Vector:
        """Compute the direction in which the centres of pixels are seen, for the depth as the parameter."""
        # Products, as a GPU divides by a constant otherwise than a CPU.
        x, y = (column + (0.5 - CENTRE[1])) * (1 / FOCAL), ((CENTRE[0] - 0.5) - row) * (1 / FOCAL)
        axes = zip(self.forward, self.right, self.up, strict=True)
        return tuple(forward + x * right + y * up for forward, right, up in axes)


def place_of(pixel: Tensor) -> tuple[Tensor, Tensor]:
    """Give row and column of pixels of the B * P, as floats."""
    return ((pixel // SIZE) % SIZE).float(), (pixel % SIZE).float()
