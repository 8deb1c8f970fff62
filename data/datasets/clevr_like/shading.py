"""How a scene looks: light, shadows, colors and what metal mirrors."""

import math

import torch
from torch import Tensor

from data.datasets.clevr_like.camera import PIXELS, View, place_of
from data.datasets.clevr_like.objects import DrawnScenes, Solids, corners_of
from data.datasets.clevr_like.vectors import (
    Vector,
    constant,
    dot,
    first_exit,
    last_entry,
    look_up,
    normalize,
    power,
    take,
)
from data.datasets.clevr_like.visibility import cast, fill_boxes
from data.properties import MAX_OBJECTS

__all__ = ["find_shadows", "shade"]

SUN = (-1.5, -9.3, 11.0)  # its direction, from the left behind the camera; it alone casts shadows
PALETTE = ((87, 87, 87), (173, 35, 35), (42, 75, 215), (29, 105, 20),
           (129, 74, 25), (129, 38, 192), (41, 208, 208), (255, 238, 51))  # fmt: skip

# The light that comes from everywhere, from the sun, and from each lamp at distance 1; and what the plane reflects.
AMBIENT = 0.22
SUNSHINE = 0.7
LAMPLIGHT = (12.0, 3.0, 4.0)
GRAY = 0.45


def shade(scenes: DrawnScenes, labels: Tensor) -> Tensor:
    """Render images uint8 (B, 3, P) of scenes in which is seen what `labels` says."""
    view, solids = View.of(scenes.camera), Solids.of(scenes)
    plane = view.ray(*place_of(torch.arange(PIXELS, device=labels.device)))
    depth = -view.origin[2] / plane[2]
    point = tuple(o + depth * d for o, d in zip(view.origin, plane, strict=True))  # (B, P)

    # The points of objects, (F,), and the surface's normals there.
    seen = labels.flatten().nonzero()[:, 0]
    scene = seen // PIXELS
    which = scene * MAX_OBJECTS + labels.flatten()[seen].long() - 1
    solid, origin, direction, entries, _ = cast(scenes, view, which, seen)
    entry = last_entry(entries)
    flat = [torch.where(e == entry, -d.sign(), 0.0) for e, d in zip(entries[:3], direction, strict=True)]
    x, y, z = (o + entry * d for o, d in zip(origin, direction, strict=True))
    x, y, z = (torch.where(entries[3] == entry, i, f) for i, f in zip((x, y, z * solid.bulge), flat, strict=True))
    normal = (solid.cosine * x - solid.sine * y, solid.sine * x + solid.cosine * y, z)
    camera = view.take(scene)
    ray = camera.ray(*place_of(seen))
    own = tuple(o + entry * r for o, r in zip(camera.origin, ray, strict=True))
    for p, o in zip(point, own, strict=True):
        p.view(-1)[seen] = o

    lit = ~find_shadows(scenes, view, solids, point, labels)
    lamps = [tuple(lamp[:, i, None] for i in range(3)) for lamp in scenes.lamps.unbind(1)]
    paint = GRAY * _light(point, (0.0, 0.0, 1.0), lit, lamps)
    image = _developed(paint)[:, None].repeat(1, 3, 1)

    lamps = [take(lamp, scene) for lamp in lamps]
    lit = lit.flatten()[seen]
    light = _light(own, normal, lit, lamps)

    # What objects mirror: the sun, and metal its surroundings, a dark room with bright ceiling and sides.
    ray = normalize(ray)
    facing = 2 * dot(ray, normal)
    mirrored = tuple(r - facing * n for r, n in zip(ray, normal, strict=True))
    glint = dot(mirrored, _sun(labels.device)).clamp(min=0) * lit
    metal = scenes.metal.flatten()[which] == 1
    gloss = torch.where(metal, 0.9 * power(glint, 64), 0.12 * power(glint, 8))
    side = dot(mirrored, camera.right)
    room = 0.15 + 0.6 * mirrored[2].clamp(min=0) + 0.9 * (side * side)
    body = torch.where(metal, 0.3 * light + room, light)

    color, first = scenes.color.flatten()[which], scene * (2 * PIXELS) + seen
    for channel in range(3):
        paint = look_up(tuple(c[channel] / 255 for c in PALETTE), color)
        image.view(-1)[first + channel * PIXELS] = _developed(paint * body + gloss)
    return image


def _light(point: Vector, normal: Vector, lit: Tensor, lamps: list[Vector]) -> Tensor:
    """Sum the light that falls on a surface: from everywhere, from the sun where it is lit, and from the lamps."""
    light = AMBIENT + SUNSHINE * (dot(normal, _sun(lit.device)).clamp(min=0) * lit)
    for lamp, strength in zip(lamps, LAMPLIGHT, strict=True):
        towards = tuple(l - p for l, p in zip(lamp, point, strict=True))
        square = dot(towards, towards)
        light = light + strength * dot(normal, towards).clamp(min=0) / (square * square.sqrt())
    return light


def _developed(radiance: Tensor) -> Tensor:
    """Convert radiance to the brightness of pixels, uint8: gamma 2."""
    return (radiance.clamp(0, 1).sqrt() * 255 + 0.5).to(torch.uint8)


def find_shadows(scenes: DrawnScenes, view: View, solids: Solids, point: Vector, labels: Tensor) -> Tensor:
    """Find whether another object stands between the point seen at a pixel and the sun: bool (B, P)."""
    # An object's shadow lies between it and its shadow on the plane.
    corners = corners_of(scenes)
    ground = tuple(c - corners[2] * (s / SUN[2]) for c, s in zip(corners, SUN, strict=True))
    points = tuple(torch.cat(pair, -1) for pair in zip(corners, ground, strict=True))
    which, pixel = fill_boxes(view, points, scenes.real)
    other = labels.flatten().index_select(0, pixel) != which % MAX_OBJECTS + 1
    which, pixel = which[other], pixel[other]

    solid = solids.take(which)
    origin = solid.relative(take(point, pixel))
    entries, exits = solid.crossings(origin, take(solids.inward(*_sun(pixel.device)), which))
    exit = first_exit(exits)
    shadows = torch.zeros(labels.numel(), dtype=torch.bool, device=labels.device)
    shadows[pixel[(last_entry(entries) < exit) & (exit > 0)]] = True
    return shadows.view(labels.shape)


def _sun(device: torch.device) -> Vector:
    """Give the unit vector towards the sun."""
    return constant(tuple(part / math.hypot(*SUN) for part in SUN), device).unbind(0)
