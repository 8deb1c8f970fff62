"""Tetrominoes scenes, drawn on the fly: no file, no download, any number of scenes.

The data set is the Tetrominoes of Multi-Object Datasets (Kabra et al., 2019,
github.com/deepmind/multi_object_datasets): on a black 35 x 35 image lie three tetrominoes of
four bevelled 5 x 5 blocks each. Shape, color and position are independent from object to object, so
colors and shapes repeat within a scene; objects may touch, never overlap.

A scene is a pure function of (seed, number): its random words come from hashing a counter
(SplitMix64), in integer arithmetic alone. So it is the same scene, bit for bit, on a CPU or a GPU,
in whatever batch and order it is asked for.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from data.dataset import Dataset
from data.formats import MULTI_OBJECT_DATASETS, Format
from data.generator import SceneGenerator
from data.random_words import below, high, low, words

__all__ = ["COLORS", "ENTRIES", "SHAPES", "TetrominoesGenerator", "render"]

SIZE = 35  # pixels, height and width of the image
BLOCK = 5  # pixels, side of a block
OBJECTS = 3

# Brightness of a block in the channels that its color has; the others stay 0.
BEVEL = (
    (191, 255, 255, 255, 223),
    (127, 159, 159, 159, 191),
    (127, 159, 159, 159, 191),
    (127, 159, 159, 159, 191),
    (95, 63, 63, 63, 127),
)

# Which of red, green and blue a color has.
COLORS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1))

# Attempts at placing a scene's objects. They are made ROUND at a time, and only scenes still
# unplaced go on to the next round. Six in seven fail, so one scene of 200 needs a second round and
# none comes near the limit.
ROUND = 32
ATTEMPTS = 4096


def _fixed_tetrominoes() -> tuple[tuple[tuple[int, int], ...], ...]:
    """List the 19 tetrominoes, rotations and reflections counted: four (row, column) cells each, from (0, 0)."""
    free = (
        ((0, 0), (0, 1), (0, 2), (0, 3)),  # I
        ((0, 0), (0, 1), (1, 0), (1, 1)),  # O
        ((0, 0), (0, 1), (0, 2), (1, 1)),  # T
        ((0, 0), (0, 1), (1, 1), (1, 2)),  # S
        ((0, 0), (0, 1), (0, 2), (1, 0)),  # L
    )
    fixed = set()
    for cells in free:
        for _ in range(4):
            cells = tuple((column, -row) for row, column in cells)  # a quarter turn
            for flip in (1, -1):
                turned = [(row, flip * column) for row, column in cells]
                top, left = min(row for row, _ in turned), min(column for _, column in turned)
                fixed.add(tuple(sorted((row - top, column - left) for row, column in turned)))
    return tuple(sorted(fixed))


SHAPES = _fixed_tetrominoes()


@dataclass(frozen=True)
class TetrominoesGenerator(SceneGenerator):
    """Tetrominoes scenes number `first` to `first + num_scenes - 1` of the stream `seed`.

    Every object's shape is uniform over the 19 fixed tetrominoes and its color over red, green,
    blue, yellow, magenta and cyan; the positions are uniform over all placements of the scene's
    three shapes at whole pixels, wholly inside the image and without overlap. Follows the
    `Scenes` protocol; see `SceneGenerator` for the arguments.
    """

    name: ClassVar[str] = "tetrominoes"
    size: ClassVar[tuple[int, int]] = (SIZE, SIZE)
    num_entities: ClassVar[int] = 1 + OBJECTS

    def batch(self, indices: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Draw the scenes `first + indices` on `device`; see `Scenes.batch`.

        The host waits for the device to check the indices and after every round of attempts, of which
        a batch takes one or two. Takes about 15 KB of memory a scene.
        """
        return render(*_draw(self.keys(indices, device)))


def render(shapes: Tensor, colors: Tensor, corners: Tensor) -> tuple[Tensor, Tensor]:
    """Paint scenes of objects that lie inside the image and do not overlap (not checked).

    Args:
        shapes: int64 (B, M), numbers into `SHAPES`.
        colors: int64 (B, M), numbers into `COLORS`.
        corners: int64 (B, M, 2), row and column of the top left pixel of each object's bounding box.

    Returns:
        image: uint8 (B, 3, 35, 35).
        labels: uint8 (B, 35, 35), 0 for the background, `1 + m` for object m.
    """
    batch, objects = shapes.shape
    tables = _tables(shapes.device)
    places = corners[..., 0] * SIZE + corners[..., 1]
    pixels = (places[..., None] + tables.pixels[shapes]).flatten(1)  # (B, M * 100)
    paint = tables.colors[colors].transpose(1, 2)[..., None] * tables.bevel  # (B, 3, M, 100)
    numbers = torch.arange(1, objects + 1, dtype=torch.uint8, device=shapes.device)
    numbers = numbers.repeat_interleave(tables.bevel.numel()).expand(batch, -1)

    image = torch.zeros(batch, 3, SIZE * SIZE, dtype=torch.uint8, device=shapes.device)
    image.scatter_(2, pixels[:, None].expand(-1, 3, -1), paint.flatten(2))
    labels = torch.zeros(batch, SIZE * SIZE, dtype=torch.uint8, device=shapes.device)
    labels.scatter_(1, pixels, numbers)
    return image.unflatten(-1, (SIZE, SIZE)), labels.unflatten(-1, (SIZE, SIZE))


class _Tables(NamedTuple):
    """Constants on one device; S = 19 shapes."""

    pixels: Tensor  # int64 (S, 100): the pixels of a shape, counted row by row from its corner
    bevel: Tensor  # uint8 (100,): the brightness of those pixels
    colors: Tensor  # uint8 (6, 3)
    room: Tensor  # int64 (S, 2): how many rows and columns the corner can lie in
    overlap: Tensor  # bool (S * S * 61 * 61,): do two shapes overlap, by shapes and offset of the corners


REACH = SIZE - BLOCK  # the furthest apart two corners can lie, in rows or columns


@functools.lru_cache
def _tables(device: torch.device) -> _Tables:
    blocks = BLOCK * torch.tensor(SHAPES)  # (S, 4, 2)
    rows, columns = blocks[..., 0], blocks[..., 1]
    within = torch.arange(BLOCK)[:, None] * SIZE + torch.arange(BLOCK)  # (5, 5)
    pixels = (rows * SIZE + columns)[..., None, None] + within

    # Two blocks overlap when they lie less than a block apart both ways, two shapes when any two
    # of their blocks do.
    offset = torch.arange(-REACH, REACH + 1)
    apart = (blocks[None, :, None, :, :] - blocks[:, None, :, None, :]).flatten(2, 3)  # (S, S, 16, 2)
    near = ((apart[..., None] + offset).abs() < BLOCK).float()  # (S, S, 16, 2, 61)
    overlap = torch.einsum("abpi,abpj->abij", near[..., 0, :], near[..., 1, :]) > 0

    tables = _Tables(
        pixels=pixels.flatten(1),
        bevel=torch.tensor(BEVEL, dtype=torch.uint8).flatten().repeat(4),
        colors=torch.tensor(COLORS, dtype=torch.uint8),
        room=SIZE - BLOCK + 1 - blocks.amax(1),
        overlap=overlap.flatten(),
    )
    return _Tables(*(table.to(device) for table in tables))


def _draw(key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw shapes (B, 3), colors (B, 3) and corners (B, 3, 2) of the scenes with these keys (B,)."""
    device = key.device
    tables = _tables(device)

    kind = words(key, torch.arange(OBJECTS, device=device))  # (B, 3)
    shapes, colors = below(high(kind), len(SHAPES)), below(low(kind), len(COLORS))

    corners = torch.empty(*shapes.shape, 2, dtype=torch.int64, device=device)
    pending = torch.arange(len(key), device=device)
    for start in range(OBJECTS, OBJECTS * (1 + ATTEMPTS), OBJECTS * ROUND):
        if not len(pending):
            break
        counters = torch.arange(start, start + OBJECTS * ROUND, device=device)
        place = words(key[pending], counters).unflatten(1, (ROUND, OBJECTS))
        shape = shapes[pending][:, None]  # (P, 1, 3)
        # Row from the word's high half, column from its low half: (P, ROUND, 3, 2).
        tried = below(torch.stack((high(place), low(place)), -1), tables.room[shape])

        # Each of the three objects with the next, the last with the first: all pairs.
        offset = tried.roll(-1, 2) - tried + REACH
        pair = shape * len(SHAPES) + shape.roll(-1, 2)
        span = 2 * REACH + 1
        clear = ~tables.overlap[(pair * span + offset[..., 0]) * span + offset[..., 1]].any(-1)  # (P, ROUND)

        placed, attempt = clear.max(1)  # the first attempt without overlap, if any
        corners[pending] = tried[torch.arange(len(pending), device=device), attempt]
        pending = pending[~placed]
    if len(pending):
        raise RuntimeError(f"{len(pending)} of {len(key)} scenes not placed in {ATTEMPTS} attempts")
    return shapes, colors, corners


ENTRIES = (
    Dataset(
        "tetrominoes",
        citation='Kabra et al., "Multi-Object Datasets", 2019',
        origin=MULTI_OBJECT_DATASETS,
        generator=TetrominoesGenerator,
        file=Format("tetrominoes", image=(35, 35, 3), mask=(4, 35, 35, 1), entity_axis=0, strays=0.0),
    ),
)
