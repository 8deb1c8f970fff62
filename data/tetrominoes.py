"""Tetrominoes scenes, drawn on the fly: no file, no download, any number of scenes.

The data set is the Tetrominoes of Multi-Object Datasets (Kabra et al., 2019,
github.com/deepmind/multi_object_datasets): on a black 35 x 35 image lie three tetrominoes of
four bevelled 5 x 5 blocks each. Shape, colour and position are independent from object to object, so
colours and shapes repeat within a scene; objects may touch, never overlap.

A scene is a pure function of (seed, number): its random words come from hashing a counter
(SplitMix64), in integer arithmetic alone. So it is the same scene, bit for bit, on a CPU or a GPU,
in whatever batch and order it is asked for.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .scenes import check_indices

__all__ = ["COLOURS", "SHAPES", "TetrominoesGenerator", "render"]

SIZE = 35  # pixels, height and width of the image
BLOCK = 5  # pixels, side of a block
OBJECTS = 3

# Brightness of a block in the channels that its colour has; the others stay 0.
BEVEL = (
    (191, 255, 255, 255, 223),
    (127, 159, 159, 159, 191),
    (127, 159, 159, 159, 191),
    (127, 159, 159, 159, 191),
    (95, 63, 63, 63, 127),
)

# Which of red, green and blue a colour has.
COLOURS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1))

# Attempts at placing a scene's objects. They are made ROUND at a time, and only scenes still
# unplaced go on to the next round. Six in seven fail, so one scene of 200 needs a second round and
# none comes near the limit.
ROUND = 32
ATTEMPTS = 4096


def _fixed_tetrominoes() -> tuple[tuple[tuple[int, int], ...], ...]:
    """The 19 tetrominoes, rotations and reflections counted: four (row, column) cells each, from (0, 0)."""
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
class TetrominoesGenerator:
    """Tetrominoes scenes number `first` to ``first + num_scenes - 1`` of the stream `seed`.

    Every object's shape is uniform over the 19 fixed tetrominoes and its colour over red, green,
    blue, yellow, magenta and cyan; the positions are uniform over all placements of the scene's
    three shapes at whole pixels, wholly inside the image and without overlap. Follows the
    `Scenes` protocol. Two generators with the same seed and disjoint ranges share no scene but by chance.

    Args:
        num_scenes: how many scenes, at least 1.
        seed: the stream of scenes, at least 0.
        first: the number of the scene that index 0 means, at least 0.

    Raises:
        TypeError, ValueError: an argument is no integer or out of range.
    """

    num_scenes: int
    seed: int = 0
    first: int = 0

    name: ClassVar[str] = "tetrominoes"
    size: ClassVar[tuple[int, int]] = (SIZE, SIZE)
    num_entities: ClassVar[int] = 1 + OBJECTS

    def __post_init__(self) -> None:
        for argument, least in (("num_scenes", 1), ("seed", 0), ("first", 0)):
            value = getattr(self, argument)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{argument}: expected an integer, got {value!r}")
            if not least <= value < 2**62:
                raise ValueError(f"{argument}: expected {least} or more and below 2**62, got {value}")

    def __len__(self) -> int:
        return self.num_scenes

    def batch(self, indices: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Draws the scenes ``first + indices`` on `device`; see `Scenes.batch`.

        The host waits for the device to check the indices and after every round of attempts, of which
        a batch takes one or two. Takes about 15 KB of memory a scene.
        """
        check_indices(indices, len(self))
        indices = indices.to(indices.device if device is None else device)
        return render(*_draw(self.seed, self.first + indices))


def render(shapes: Tensor, colours: Tensor, corners: Tensor) -> tuple[Tensor, Tensor]:
    """Paints scenes of objects that lie inside the image and do not overlap (not checked).

    Args:
        shapes: int64 (B, M), numbers into `SHAPES`.
        colours: int64 (B, M), numbers into `COLOURS`.
        corners: int64 (B, M, 2), row and column of the top left pixel of each object's bounding box.

    Returns:
        image: uint8 (B, 3, 35, 35).
        labels: uint8 (B, 35, 35), 0 for the background, ``1 + m`` for object m.
    """
    batch, objects = shapes.shape
    tables = _tables(shapes.device)
    places = corners[..., 0] * SIZE + corners[..., 1]
    pixels = (places[..., None] + tables.pixels[shapes]).flatten(1)  # (B, M * 100)
    paint = tables.colours[colours].transpose(1, 2)[..., None] * tables.bevel  # (B, 3, M, 100)
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
    colours: Tensor  # uint8 (6, 3)
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
        colours=torch.tensor(COLOURS, dtype=torch.uint8),
        room=SIZE - BLOCK + 1 - blocks.amax(1),
        overlap=overlap.flatten(),
    )
    return _Tables(*(table.to(device) for table in tables))


def _draw(seed: int, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes (B, 3), colours (B, 3) and corners (B, 3, 2) of the scenes `numbers` (B,) of stream `seed`."""
    device = numbers.device
    tables = _tables(device)
    key = _mix(_mix(torch.tensor(seed, device=device)) + numbers)

    kind = _words(key, torch.arange(OBJECTS, device=device))  # (B, 3)
    shapes, colours = _below(_high(kind), len(SHAPES)), _below(_low(kind), len(COLOURS))

    corners = torch.empty(*shapes.shape, 2, dtype=torch.int64, device=device)
    pending = torch.arange(len(numbers), device=device)
    for start in range(OBJECTS, OBJECTS * (1 + ATTEMPTS), OBJECTS * ROUND):
        if not len(pending):
            break
        counters = torch.arange(start, start + OBJECTS * ROUND, device=device)
        place = _words(key[pending], counters).unflatten(1, (ROUND, OBJECTS))
        shape = shapes[pending][:, None]  # (P, 1, 3)
        # Row from the word's high half, column from its low half: (P, ROUND, 3, 2).
        tried = _below(torch.stack((_high(place), _low(place)), -1), tables.room[shape])

        # Each of the three objects with the next, the last with the first: all pairs.
        offset = tried.roll(-1, 2) - tried + REACH
        pair = shape * len(SHAPES) + shape.roll(-1, 2)
        span = 2 * REACH + 1
        clear = ~tables.overlap[(pair * span + offset[..., 0]) * span + offset[..., 1]].any(-1)  # (P, ROUND)

        placed, attempt = clear.max(1)  # the first attempt without overlap, if any
        corners[pending] = tried[torch.arange(len(pending), device=device), attempt]
        pending = pending[~placed]
    if len(pending):
        raise RuntimeError(f"{len(pending)} of {len(numbers)} scenes not placed in {ATTEMPTS} attempts")
    return shapes, colours, corners


# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014). Torch has
# no arithmetic on unsigned 64-bit integers, but sums and products of signed ones wrap around to the
# same bits; only the shift to the right has to be masked.


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


GOLDEN = _signed(0x9E3779B97F4A7C15)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection on 64-bit words: int64 of any shape."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift to the right that brings in zeros whatever the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _words(key: Tensor, counters: Tensor) -> Tensor:
    """Outputs number `counters` (T,) of the generators with states `key` (B,): int64 (B, T)."""
    return _mix(key[:, None] + (counters + 1) * GOLDEN)


def _high(word: Tensor) -> Tensor:
    return _shift(word, 32)


def _low(word: Tensor) -> Tensor:
    return word & 0xFFFFFFFF


def _below(half: Tensor, bound: Tensor | int) -> Tensor:
    """Uniform integers in ``[0, bound)`` from 32-bit ones, even to within ``bound / 2**32``."""
    return (half * bound) >> 32
