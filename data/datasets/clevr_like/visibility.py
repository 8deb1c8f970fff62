"""What is seen at each pixel: rays cast through the boxes around objects."""

import torch
from torch import Tensor

from data.datasets.clevr_like.camera import PIXELS, SIZE, View, place_of
from data.datasets.clevr_like.objects import DrawnScenes, Solids, corners_of
from data.datasets.clevr_like.vectors import Vector, first_exit, last_entry, take
from data.properties import MAX_OBJECTS

__all__ = ["cast", "fill_boxes", "find_visible"]

PLANE = 2**31 - 1  # stands for the plane where the nearest object is sought


def find_visible(scenes: DrawnScenes) -> Tensor:
    """Find what is seen at each pixel: uint8 (B, P), 0 the plane, 1 + m object m."""
    view = View.of(scenes.camera)
    which, pixel = fill_boxes(view, corners_of(scenes), scenes.real)
    *_, entries, exits = cast(scenes, view, which, pixel)
    entry = last_entry(entries)

    # The nearest object is the least of these: the bits of positive floats are in the order of the floats, and the
    # lowest four make place for the object.
    nearest = (entry.view(torch.int32) & ~15) | (which % MAX_OBJECTS).int()
    nearest = torch.where(entry < first_exit(exits), nearest, PLANE)
    image = torch.full((len(scenes.real) * PIXELS,), PLANE, dtype=torch.int32, device=pixel.device)
    image.scatter_reduce_(0, pixel, nearest, "amin")
    return torch.where(image < PLANE, (image & 15) + 1, 0).to(torch.uint8).view(-1, PIXELS)


def cast(scenes: DrawnScenes, view: View, which: Tensor, pixel: Tensor) -> tuple[Solids, Vector, Vector, list, list]:
    """Cast rays through pixels (L,) of the B * P against objects `which` (L,) of the B * M.

    Returns:
        the objects; origins and directions of the rays in their unit bodies' coordinates; and the crossings.
    """
    solids = Solids.of(scenes)
    camera, solid = solids.view(view).take(which), solids.take(which)
    direction = camera.ray(*place_of(pixel))
    return solid, camera.origin, direction, *solid.crossings(camera.origin, direction)


def fill_boxes(view: View, points: Vector, real: Tensor) -> tuple[Tensor, Tensor]:
    """List smallest boxes around points (B, M, N) as seen: which of B * M objects and which of B * P pixels, (L,)."""
    view = View(*(tuple(part[..., None] for part in vector) for vector in view))
    edges = [(part.amin(-1).floor(), part.amax(-1).ceil()) for part in view.project(points)]
    (top, bottom), (left, right) = (tuple(x.clamp(0, SIZE).long().flatten() for x in pair) for pair in edges)
    height, width = (bottom - top) * real.flatten(), right - left
    # A list of the boxes' rows, and from it one of the pixels.
    objects = torch.arange(len(height), device=height.device)
    row_of = objects.repeat_interleave(height)
    row = torch.arange(len(row_of), device=height.device) + (top - (height.cumsum(0) - height))[row_of]
    width = width[row_of]
    first = row_of // MAX_OBJECTS * PIXELS + row * SIZE + left[row_of] - (width.cumsum(0) - width)
    line = torch.arange(len(row_of), device=height.device).repeat_interleave(width)
    which, first = take((row_of, first), line)
    return which, first + torch.arange(len(line), device=height.device)
