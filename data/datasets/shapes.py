"""Shapes, drawn on the fly: three outlines on a 28 x 28 binary image.

The data set of Reichert and Serre (2014) in the form of Greff et al. ("Binding via Reconstruction Clustering", 2015;
"Neural Expectation Maximization", 2017): a square and a triangle that points up or down, drawn two pixels thick, lie
anywhere within the image and may overlap; white on black, here in three equal channels. As published, a pixel of
several shapes belongs to none of them: its label is 0, so FG-ARI leaves it out.

A scene is a pure function of (seed, number), bit for bit, in whatever batch and order it is asked for.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from data.dataset import Dataset
from data.generator import SceneGenerator
from data.random_words import below, high, low, words

__all__ = ["ENTRIES", "ShapesGenerator"]

SIZE = 28  # pixels, height and width of the image
OBJECTS = 3
HEIGHT, WIDTHS = 7, (7, 12, 12)  # of the square and the triangles, in pixels


@dataclass(frozen=True)
class ShapesGenerator(SceneGenerator):
    """Shapes: three times a shape and a place, uniform and independent.

    Follows the `Scenes` protocol; see `SceneGenerator` for the arguments.
    """

    name: ClassVar[str] = "shapes"
    size: ClassVar[tuple[int, int]] = (SIZE, SIZE)
    num_entities: ClassVar[int] = 1 + OBJECTS

    def batch(self, indices: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Draw the scenes `first + indices` on `device`; see `Scenes.batch`.

        The host waits for the device to check the indices. Takes about 50 KB of memory a scene.
        """
        key = self.keys(indices, device)
        word = words(key, torch.arange(2 * OBJECTS, device=key.device)).unflatten(1, (OBJECTS, 2))
        shape = below(high(word[..., 0]), len(WIDTHS))  # (B, 3)
        room = torch.tensor(WIDTHS, device=key.device).sub(SIZE + 1).neg()
        row, column = below(high(word[..., 1]), SIZE - HEIGHT + 1), below(low(word[..., 1]), room[shape])

        # The outlines in the middle of a table with a margin, seen through windows: (B, 3, 28, 28).
        pixel = torch.arange(SIZE, device=key.device) + SIZE
        rows, columns = pixel - row[..., None], pixel - column[..., None]
        covered = _outlines(key.device)[shape[..., None, None], rows[..., :, None], columns[..., None, :]]

        image = covered.any(1).to(torch.uint8)[:, None].expand(-1, 3, -1, -1) * 255
        number = torch.arange(1, OBJECTS + 1, device=key.device)[:, None, None]
        labels = (covered * number).sum(1) * (covered.sum(1) == 1)
        return image, labels.to(torch.uint8)


@functools.lru_cache
def _outlines(device: torch.device) -> Tensor:
    """Draw the shapes' pixels, bool (3, 84, 84): their corner at (28, 28), and nothing around."""
    row, column = torch.arange(HEIGHT)[:, None], torch.arange(max(WIDTHS))
    square = (column < 7) & ~((row >= 2) & (row < 5) & (column >= 2) & (column < 5))
    across = (column - 5.5).abs()  # the sides of a triangle go out by one pixel a row
    triangle = (across <= row.clamp(max=5) + 0.5) & ~((across <= row - 2.5) & (row < 5))
    outlines = torch.zeros(3, 3 * SIZE, 3 * SIZE, dtype=torch.bool)
    outlines[:, SIZE : SIZE + HEIGHT, SIZE : SIZE + max(WIDTHS)] = torch.stack((square, triangle, triangle.flip(0)))
    return outlines.to(device)


ENTRIES = (
    Dataset(
        "shapes",
        citation='Greff, van Steenkiste and Schmidhuber, "Neural Expectation Maximization", 2017',
        origin="github.com/sjoerdvansteenkiste/Neural-EM",
        generator=ShapesGenerator,
    ),
)
