"""Multi-dSprites scenes, drawn on the fly: no file, no download, any number of scenes.

The data set is the Multi-dSprites of Multi-Object Datasets (Kabra et al., 2019,
github.com/deepmind/multi_object_datasets): on a plain 64 x 64 background lie sprites of dSprites (Matthey et al.,
2017), squares, ellipses and hearts, of which later ones hide earlier ones, now and then altogether. Its factors are
those of dSprites, independent and uniform: 3 shapes, 6 scales from 0.5 to 1, 40 orientations, 32 places each way. Where
the description is silent, this file decides: the sprites' sizes at scale 1, places a pixel apart and such that no
sprite leaves the image, and saturation and value of HSV colors from 0.5 to 1.

A scene is a pure function of (seed, number), bit for bit, in whatever batch and order it is asked for.
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from data.dataset import Dataset
from data.formats import MULTI_OBJECT_DATASETS, Format
from data.generator import SceneGenerator
from data.random_words import below, high, low, unit, words

__all__ = ["ENTRIES", "VARIANTS", "MultiDSpritesGenerator"]

SIZE = 64  # pixels, height and width of the image
SHAPES, SCALES, TURNS, PLACES = 3, 6, 40, 32  # how many values each factor has

SQUARE = 10.0  # pixels, half the side at scale 1
ELLIPSE = (13.0, 7.0)  # the semiaxes
HEART = 10.0  # half the width of the circle that the heart is made from
FIRST_PLACE = (SIZE - PLACES) / 2 + 0.5  # of a sprite's centre, in pixels from the image's edge


class Variant(NamedTuple):
    """One of the published versions.

    Attributes:
        name: of the data set.
        fewest, most: how many sprites a scene has.
    """

    name: str
    fewest: int
    most: int


VARIANTS = {
    "binarized": Variant("multi-dsprites-binarized", 2, 3),
    "colored_on_grayscale": Variant("multi-dsprites", 2, 5),
    "colored_on_colored": Variant("multi-dsprites-colored", 1, 4),
}


@dataclass(frozen=True)
class MultiDSpritesGenerator(SceneGenerator):
    """Multi-dSprites in one of its three published variants, 64 x 64.

    Follows the `Scenes` protocol; see `SceneGenerator` for the other arguments.

    Args:
        variant: "binarized": 2 or 3 white sprites on black, three equal channels; "colored_on_grayscale": 2 to 5
            sprites of random HSV colors on a random gray; "colored_on_colored": 1 to 4 sprites and a background of
            random RGB colors.
    """

    variant: str = "colored_on_grayscale"

    size: ClassVar[tuple[int, int]] = (SIZE, SIZE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(map(repr, VARIANTS))}, got {self.variant!r}")

    @property
    def name(self) -> str:
        return VARIANTS[self.variant].name

    @property
    def num_entities(self) -> int:
        return 1 + VARIANTS[self.variant].most

    def batch(self, indices: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Draw the scenes `first + indices` on `device`; see `Scenes.batch`.

        The host waits for the device to check the indices. Takes about 280 KB of memory a scene.
        """
        key = self.keys(indices, device)
        _, fewest, most = VARIANTS[self.variant]
        word = words(key, torch.arange(3 + 4 * most, device=key.device))
        count = fewest + below(high(word[:, 0]), most - fewest + 1)
        kind, place, *paint = word[:, 3:].unflatten(1, (most, 4)).unbind(-1)  # (B, M) each
        background, colors = self._paint(word[:, 1:3], torch.stack(paint, -1))

        image = background[..., None].expand(-1, -1, SIZE * SIZE).contiguous()
        labels = torch.zeros(len(key), SIZE * SIZE, dtype=torch.uint8, device=key.device)
        for m in range(most):
            sprite = _sprite(below(high(kind[:, m]), SHAPES * SCALES * TURNS), below(high(place[:, m]), PLACES**2))
            sprite &= (m < count)[:, None]
            image = torch.where(sprite[:, None], colors[:, m, :, None], image)
            labels = torch.where(sprite, m + 1, labels)
        return image.unflatten(-1, (SIZE, SIZE)), labels.unflatten(-1, (SIZE, SIZE))

    def _paint(self, background: Tensor, sprites: Tensor) -> tuple[Tensor, Tensor]:
        """Draw colors uint8 (B, 3) of the background and (B, M, 3) of the sprites, from words (B, 2) and (B, M, 2)."""
        if self.variant == "binarized":
            return torch.zeros_like(_rgb(background)), torch.full_like(_rgb(sprites), 255)
        if self.variant == "colored_on_colored":
            return _rgb(background), _rgb(sprites)
        return _rgb(background)[..., :1].expand(-1, 3), _hsv(sprites)


def _sprite(kind: Tensor, place: Tensor) -> Tensor:
    """Find which pixels a sprite covers, bool (B, 64 * 64): those whose centres lie in it.

    Args:
        kind: int64 (B,), shape, scale and orientation as one number.
        place: int64 (B,), column and row of the centre as one number.
    """
    shape, scale, turn = kind % SHAPES, kind // SHAPES % SCALES, kind // (SHAPES * SCALES)
    cosine, sine = (table[turn, None] for table in _turns(kind.device))
    centre = torch.arange(SIZE, device=kind.device) + 0.5 - FIRST_PLACE
    right = (centre - (place % PLACES)[:, None])[:, None, :]
    up = ((place // PLACES)[:, None] - centre)[:, :, None]

    # In the sprite's own coordinates, scale 1: (B, 64, 64).
    grown = (10 / (5 + scale.float()))[:, None]
    cosine, sine = (cosine * grown)[..., None], (sine * grown)[..., None]
    x, y = cosine * right + sine * up, cosine * up - sine * right
    xx, yy = x * x, y * y
    square = torch.maximum(xx, yy) <= SQUARE**2
    ellipse = xx * (1 / ELLIPSE[0] ** 2) + yy * (1 / ELLIPSE[1] ** 2) <= 1
    # (x^2 + y^2 - 1)^3 <= x^2 y^3
    xx, yy, y = xx * (1 / HEART**2), yy * (1 / HEART**2), y * (1 / HEART)
    round = xx + yy - 1
    heart = round * round * round <= xx * (yy * y)
    shape = shape[:, None, None]
    return torch.where(shape == 0, square, torch.where(shape == 1, ellipse, heart)).flatten(1)


@functools.lru_cache
def _turns(device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute cosine and sine of the orientations, float32 (40,)."""
    angles = [2 * math.pi * turn / TURNS for turn in range(TURNS)]
    return tuple(torch.tensor([f(angle) for angle in angles], device=device) for f in (math.cos, math.sin))


def _rgb(word: Tensor) -> Tensor:
    """Draw random colors, uint8 (..., 3), from two words."""
    return below(torch.stack((high(word[..., 0]), low(word[..., 0]), high(word[..., 1])), -1), 256).to(torch.uint8)


def _hsv(word: Tensor) -> Tensor:
    """Draw colors of random hue, and of random saturation and value from 0.5 to 1, uint8 (..., 3), from two words."""
    hue = 6 * unit(high(word[..., 0]))
    saturation, value = (0.5 + 0.5 * unit(half) for half in (low(word[..., 0]), high(word[..., 1])))
    channels = []
    for offset in (5, 3, 1):  # Smith, "Color gamut transform pairs" (1978)
        k = hue + offset
        k = torch.where(k >= 6, k - 6, k)
        channels.append(value * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1)))
    return (torch.stack(channels, -1) * 255 + 0.5).to(torch.uint8)


def _entry(variant: str, channels: int, entities: int) -> Dataset:
    name = VARIANTS[variant].name
    return Dataset(
        name,
        citation='Kabra et al., "Multi-Object Datasets", 2019',
        origin=MULTI_OBJECT_DATASETS,
        generator=functools.partial(MultiDSpritesGenerator, variant=variant),
        file=Format(name, image=(64, 64, channels), mask=(64, 64, entities, 1), entity_axis=2),
    )


ENTRIES = (_entry("colored_on_grayscale", 3, 6), _entry("binarized", 1, 4), _entry("colored_on_colored", 3, 5))
