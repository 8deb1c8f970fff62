"""Three outlines, anywhere; what several of them cover belongs to none."""

import zlib

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Scenes, ShapesGenerator
from data.datasets import shapes

PUBLISHED = {
    7: ("XXXXXXX", "XXXXXXX", "XX...XX", "XX...XX", "XX...XX", "XXXXXXX", "XXXXXXX"),
    12: (
        ".....XX.....",
        "....XXXX....",
        "...XXXXXX...",
        "..XXX..XXX..",
        ".XXX....XXX.",
        "XXXXXXXXXXXX",
        "XXXXXXXXXXXX",
    ),
}


def pixels(rows):
    return torch.tensor([[character == "X" for character in row] for row in rows])


def test_protocol():
    scenes = ShapesGenerator(10)
    image, labels = scenes.batch(torch.tensor([9, 0]))
    assert isinstance(scenes, Scenes)
    assert (scenes.name, scenes.size, scenes.num_entities) == ("shapes", (28, 28), 4)
    assert (image.shape, image.dtype) == ((2, 3, 28, 28), torch.uint8)
    assert (labels.shape, labels.dtype) == ((2, 28, 28), torch.uint8)
    assert [len(part) for part in scenes.batch(torch.arange(0))] == [0, 0]


def test_outlines_are_the_published_ones():
    outlines = shapes._outlines(torch.device("cpu"))
    square, triangle = pixels(PUBLISHED[7]), pixels(PUBLISHED[12])
    for outline, expected in zip(outlines, (square, triangle, triangle.flip(0)), strict=True):
        assert torch.equal(outline[28:35, 28 : 28 + expected.shape[1]], expected)
        assert outline.sum() == expected.sum()


def test_the_stream_stays_what_it_is():
    batch = ShapesGenerator(60_001).batch(torch.tensor([0, 60_000]))
    assert [zlib.crc32(part.contiguous().numpy()) for part in batch] == [3525989571, 3648542590]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 49), min_size=1, max_size=5))
def test_a_scene_does_not_depend_on_its_batch(numbers):
    scenes, numbers = ShapesGenerator(50, seed=1), torch.tensor(numbers)
    for whole, part in zip(scenes.batch(torch.arange(50)), scenes.batch(numbers), strict=True):
        assert torch.equal(whole[numbers], part)


def test_scenes():
    image, labels = ShapesGenerator(2000, seed=2).batch(torch.arange(2000))
    assert torch.equal(image[:, 0], image[:, 1])
    assert image.unique().tolist() == [0, 255]
    covered = image[:, 0] == 255
    assert not labels[~covered].any()
    assert (labels > 0).any(0).all()  # every pixel of the image is reached
    # Where no shapes overlap, the labels are three whole outlines: of 40 or 52 pixels.
    apart = (labels > 0).flatten(1).sum(1) == covered.flatten(1).sum(1)
    assert 0.1 < apart.double().mean() < 0.9
    areas = torch.stack([(labels[apart] == label).sum((1, 2)) for label in (1, 2, 3)])
    assert set(areas.unique().tolist()) == {int(pixels(rows).sum()) for rows in PUBLISHED.values()}
    # Where they do, some covered pixels belong to none.
    assert (covered & (labels == 0))[~apart].flatten(1).any(1).all()
