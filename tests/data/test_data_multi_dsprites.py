"""Sprites are what their formulas say, whole, one over another; and the same wherever they are asked for."""

import colorsys
import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import MultiDSpritesGenerator, Scenes
from data.datasets import multi_dsprites
from data.datasets.multi_dsprites import VARIANTS

every_variant = pytest.mark.parametrize("variant", VARIANTS)


@every_variant
def test_protocol(variant):
    scenes = MultiDSpritesGenerator(10, variant=variant)
    image, labels = scenes.batch(torch.tensor([9, 0]))
    assert isinstance(scenes, Scenes)
    name = {"binarized": "-binarized", "colored_on_grayscale": "", "colored_on_colored": "-colored"}[variant]
    entities = {"binarized": 4, "colored_on_grayscale": 6, "colored_on_colored": 5}[variant]  # as published
    assert (scenes.name, scenes.size, scenes.num_entities) == (f"multi-dsprites{name}", (64, 64), entities)
    assert (image.shape, image.dtype) == ((2, 3, 64, 64), torch.uint8)
    assert (labels.shape, labels.dtype) == ((2, 64, 64), torch.uint8)
    assert [len(part) for part in scenes.batch(torch.arange(0))] == [0, 0]


def test_the_stream_stays_what_it_is():
    """Results are quoted with a seed: these scenes must never change."""
    numbers = torch.tensor([0, 60_000])
    batches = [MultiDSpritesGenerator(60_001, variant=variant).batch(numbers) for variant in VARIANTS]
    assert [[zlib.crc32(part.contiguous().numpy()) for part in batch] for batch in batches] == [
        [2472291732, 2158183646],
        [3007656925, 2028392232],
        [3833008533, 1914028222],
    ]


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(VARIANTS)), st.lists(st.integers(0, 49), min_size=1, max_size=5))
def test_a_scene_does_not_depend_on_its_batch(variant, numbers):
    scenes, numbers = MultiDSpritesGenerator(50, seed=1, variant=variant), torch.tensor(numbers)
    for whole, part in zip(scenes.batch(torch.arange(50)), scenes.batch(numbers), strict=True):
        assert torch.equal(whole[numbers], part)


def test_sprites_by_formula():
    """All shapes, scales and orientations, at places of their own: the same pixels but for rounding at edges."""
    kind = torch.arange(0, 3 * 6 * 40, 7)
    place = kind * 37 % 1024
    ours = multi_dsprites._sprite(kind, place).view(-1, 64, 64).numpy()
    for number, at, sprite in zip(kind.tolist(), place.tolist(), ours, strict=True):
        shape, scale, angle = number % 3, 0.5 + 0.1 * (number // 3 % 6), 2 * math.pi * (number // 18) / 40
        column, row = at % 32 + 16.5, at // 32 + 16.5
        down, right = np.mgrid[:64, :64] + 0.5
        z = (right - column) - 1j * (down - row)
        z = z * np.exp(-1j * angle) / scale
        inner, outer = (
            (
                np.maximum(abs(x), abs(y)) <= 10,
                (x / 13) ** 2 + (y / 7) ** 2 <= 1,
                ((x / 10) ** 2 + (y / 10) ** 2 - 1) ** 3 <= (x / 10) ** 2 * (y / 10) ** 3,
            )[shape]
            for x, y in ((z.real * grown, z.imag * grown) for grown in (1 + 1e-5, 1 - 1e-5))
        )
        assert (inner <= sprite).all()
        assert (sprite <= outer).all()
        assert inner.sum() > 60


def test_no_sprite_leaves_the_image():
    kind = torch.arange(3 * 6 * 40)
    for place in (0, 31, 32 * 31, 1023):
        sprites = multi_dsprites._sprite(kind, torch.full_like(kind, place)).view(-1, 64, 64)
        edge = torch.ones(64, 64, dtype=torch.bool)
        edge[1:-1, 1:-1] = False
        assert not sprites[:, edge].any()


@every_variant
def test_colors_and_numbers(variant):
    count = 100
    image, labels = MultiDSpritesGenerator(count, seed=2, variant=variant).batch(torch.arange(count))
    most, seen, backgrounds = labels.max().item(), set(), set()
    for picture, numbers in zip(image.permute(0, 2, 3, 1).numpy(), labels.numpy(), strict=True):
        seen.add(int(numbers.max()))
        for label in np.unique(numbers):
            (color,) = np.unique(picture[numbers == label], axis=0)  # one color each
            if label == 0:
                backgrounds.add(tuple(color))
                assert {"binarized": not color.any(), "colored_on_grayscale": np.ptp(color) == 0}.get(variant, True)
            elif variant == "binarized":
                assert (color == 255).all()
            elif variant == "colored_on_grayscale":
                _, saturation, value = colorsys.rgb_to_hsv(*color / 255)
                assert min(saturation, value) > 0.49
    _, fewest, expected = VARIANTS[variant]
    assert most == expected
    assert seen <= set(range(1, most + 1))  # the last sprites hide others, never themselves
    assert seen >= set(range(fewest, most + 1))
    assert len(backgrounds) == 1 if variant == "binarized" else len(backgrounds) > 50


def test_later_sprites_hide_earlier_ones():
    """With one more sprite, every pixel either stays or becomes that sprite's."""
    key = MultiDSpritesGenerator(300, seed=4).keys(torch.arange(300))
    _, labels = MultiDSpritesGenerator(300, seed=4).batch(torch.arange(300))
    word = multi_dsprites.words(key, torch.arange(23))
    count = 2 + multi_dsprites.below(multi_dsprites.high(word[:, 0]), 4)
    last = word[torch.arange(300), 3 + 4 * (count - 1)], word[torch.arange(300), 4 + 4 * (count - 1)]
    kind, place = (
        multi_dsprites.below(multi_dsprites.high(half), n) for half, n in zip(last, (720, 1024), strict=True)
    )
    assert torch.equal(multi_dsprites._sprite(kind, place).view(labels.shape), labels == count[:, None, None])


def test_hsv_is_that_of_the_standard_library():
    word = multi_dsprites.words(torch.arange(200), torch.arange(2))
    ours = multi_dsprites._hsv(word)
    hue = multi_dsprites.unit(multi_dsprites.high(word[:, 0]))
    saturation = 0.5 + 0.5 * multi_dsprites.unit(multi_dsprites.low(word[:, 0]))
    value = 0.5 + 0.5 * multi_dsprites.unit(multi_dsprites.high(word[:, 1]))
    expected = [colorsys.hsv_to_rgb(*hsv) for hsv in zip(*(x.tolist() for x in (hue, saturation, value)), strict=True)]
    assert (ours.double() - 255 * torch.tensor(expected)).abs().max() < 0.51


def test_unknown_variant():
    with pytest.raises(ValueError, match=r"variant: expected one of 'binarized', .*, got 'gray'"):
        MultiDSpritesGenerator(1, variant="gray")
