"""Which scenes there are: objects placed at random, until each of them is seen."""

import math

import torch
from torch import Tensor

from data.datasets.clevr_like.camera import PIXELS, SCALE, SIZE, View
from data.datasets.clevr_like.objects import RADII, DrawnScenes
from data.datasets.clevr_like.vectors import look_up
from data.datasets.clevr_like.visibility import find_visible
from data.properties import MAX_OBJECTS, SHAPES
from data.random_words import below, high, low, unit, words

__all__ = ["draw"]

CAMERA = (7.48, -6.51, 5.34)
CAMERA_JITTER = 0.5

LAMPS = ((6.45, -2.91, 4.26), (-4.67, -4.01, 3.01), (-1.17, 2.65, 5.82))  # key, fill and back
LAMP_JITTER = 1.0

# Where objects stand: in a square, apart from each other by MIN_GAP between the circles around their bases and, both
# along the camera's axis and across it, by MARGIN between their centres (CLEVR: 0.4, in its wider image; its circles
# cut the corners of cubes, which can then touch). The centre lies in the image.
REACH = 3.0
MIN_GAP = 0.25
MARGIN = 0.2
TRIES = 50  # positions tried for an object before the scene is begun anew

# Of 200 pixels in 320 x 240 that CLEVR asks of every object, as many as cover the same part of the scene.
MIN_PIXELS = math.ceil(200 * SCALE**2)  # 89
ATTEMPTS = 4096  # scenes drawn before giving up

TURN = 4096  # the angles of a rotation
_TURNS = [tuple(turn(2 * math.pi * angle / TURN) for angle in range(TURN)) for turn in (math.cos, math.sin)]
CHUNK = 16  # scenes looked at at a time, whose temporaries the processor's caches hold


def draw(key: Tensor, fewest: int, most: int) -> tuple[DrawnScenes, Tensor]:
    """Draw the scenes of keys (B,), and what is seen at each pixel: uint8 (B, P), 0 the plane, 1 + m object m."""
    device = key.device
    count = fewest + below(high(words(key, torch.arange(1, device=device)))[:, 0], most - fewest + 1)
    scenes, _ = place(key, torch.zeros_like(key), count)
    labels = torch.empty(len(key), PIXELS, dtype=torch.uint8, device=device)

    pending, attempt = torch.arange(len(key), device=device), 0
    while len(pending):
        if attempt >= ATTEMPTS:
            raise RuntimeError(f"{len(pending)} of {len(key)} scenes not drawn in {ATTEMPTS} attempts")
        # The last few scenes make several attempts at once, of which the first that serves counts.
        several = max(1, CHUNK // len(pending))
        row = pending.repeat_interleave(several)
        attempts = torch.arange(attempt, attempt + several, device=device).repeat(len(pending))
        drawn, serves = place(key[row], attempts, count[row])

        seen = torch.zeros(len(row), PIXELS, dtype=torch.uint8, device=device)
        for placed in serves.nonzero()[:, 0].split(CHUNK):
            scene = drawn.rows(placed)
            seen[placed] = find_visible(scene)
            serves[placed] = ((_count_pixels(seen[placed]) >= MIN_PIXELS) | ~scene.real).all(1)

        served, which = serves.view(len(pending), several).max(1)
        which = (torch.arange(len(pending), device=device) * several + which)[served]
        for part, new in zip((*scenes, labels), (*drawn, seen), strict=True):
            part[pending[served]] = new[which]
        pending, attempt = pending[~served], attempt + several
    return scenes, labels


def place(key: Tensor, attempt: Tensor, count: Tensor) -> tuple[DrawnScenes, Tensor]:
    """Draw scenes (B,) in the attempts of the given numbers (B,); and whether all objects found a place."""
    device = key.device
    # Words 1 and on of each attempt: 6 for camera and lamps, 1 for each object's factors, and the positions to try.
    length = 6 + MAX_OBJECTS * (1 + TRIES)
    word = words(key, 1 + attempt[:, None] * length + torch.arange(length, device=device))
    pairs = torch.stack((unit(high(word)), unit(low(word))), -1)  # (B, length, 2)
    jitter = 2 * pairs[:, :6].flatten(1) - 1  # (B, 12)
    camera = torch.tensor(CAMERA, device=device) + CAMERA_JITTER * jitter[:, :3]
    lamps = torch.tensor(LAMPS, device=device) + LAMP_JITTER * jitter[:, 3:].unflatten(1, (3, 3))

    factors, tried = word[:, 6 : 6 + MAX_OBJECTS], REACH * (2 * pairs[:, 6 + MAX_OBJECTS :] - 1)
    tried = tried.unflatten(1, (MAX_OBJECTS, TRIES))
    kind, angle = below(high(factors), 3 * 2 * 2 * 8), below(low(factors), TURN)
    shape, large, metal, color = kind % 3, kind // 3 % 2, kind // 6 % 2, kind // 12
    real = torch.arange(MAX_OBJECTS, device=device) < count[:, None]

    view = View.of(camera)
    right = tuple(part[..., None] for part in view.right)
    half = look_up(RADII, large)
    radius = torch.where(shape == SHAPES.index("cube"), half * math.sqrt(2), half)
    position = torch.zeros(len(key), MAX_OBJECTS, 2, device=device)
    placed = torch.ones(len(key), dtype=torch.bool, device=device)
    for m in range(MAX_OBJECTS):
        x, y = tried[:, m].unbind(-1)  # (B, TRIES)
        dx, dy = x[..., None] - position[:, None, :m, 0], y[..., None] - position[:, None, :m, 1]  # (B, TRIES, m)
        gap = (radius[:, m, None] + radius[:, :m] + MIN_GAP)[:, None]
        across, along = dx * right[0] + dy * right[1], dy * right[0] - dx * right[1]
        apart = (dx * dx + dy * dy >= gap * gap) & (across.abs() >= MARGIN) & (along.abs() >= MARGIN)
        fits = _within(view, x, y, half[:, m, None]) & apart.all(-1)
        found, first = fits.max(1)  # the first that fits, if any
        position[:, m] = tried[:, m].gather(1, first[:, None, None].expand(-1, -1, 2))[:, 0]
        placed &= found | ~real[:, m]
    cosine, sine = (look_up(table, angle) for table in _TURNS)
    return DrawnScenes(real, shape, large, metal, color, cosine, sine, position, camera, lamps), placed


def _within(view: "View", x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    row, column = view.project((x, y, z))
    return (row > 0) & (row < SIZE) & (column > 0) & (column < SIZE)


def _count_pixels(labels: Tensor) -> Tensor:
    """Count the pixels that show each object: labels uint8 (B, P) to int64 (B, M)."""
    kinds = 1 + MAX_OBJECTS
    scene = kinds * torch.arange(len(labels), device=labels.device)
    return (labels + scene[:, None]).flatten().bincount(minlength=kinds * len(labels)).view(-1, kinds)[:, 1:]
