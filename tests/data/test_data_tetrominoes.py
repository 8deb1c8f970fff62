"""The generator draws scenes like the real ones, the same ones wherever and however they are asked for."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import ResidentScenes, Scenes, TetrominoesGenerator, load, random_words
from data.datasets import tetrominoes
from data.datasets.tetrominoes import COLORS, SHAPES, render

SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "tetrominoes_sample.tfrecords"
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.fixture(scope="module")
def many():
    return TetrominoesGenerator(20_000, seed=3).batch(torch.arange(20_000))


def parse(image, labels):
    """Shape, color and corner of each object of one scene, read off its pixels."""
    shapes, colors, corners = [], [], []
    for label in range(1, 4):
        pixels = (labels == label).nonzero()
        corner = pixels.amin(0)
        blocks = {tuple(block) for block in ((pixels - corner) // 5).tolist()}
        color = image[:, labels == label].amax(1) == 255
        shapes.append(SHAPES.index(tuple(sorted(blocks))))
        colors.append(COLORS.index(tuple(color.int().tolist())))
        corners.append(corner)
    return torch.tensor(shapes), torch.tensor(colors), torch.stack(corners)


@pytest.mark.skipif(not SAMPLE.exists(), reason="the real scenes are not at hand")
def test_renders_the_real_scenes_pixel_by_pixel(tmp_path):
    scenes = load(SAMPLE, cache_dir=tmp_path, progress=False)
    image, labels = scenes.batch(torch.arange(len(scenes)))
    parsed = [torch.stack(part) for part in zip(*map(parse, image, labels), strict=True)]
    again = render(*parsed)
    assert torch.equal(again[0], image)
    assert torch.equal(again[1], labels)


def test_what_is_rendered_can_be_read_back():
    numbers = torch.arange(200)
    drawn = tetrominoes._draw(TetrominoesGenerator(200, seed=5).keys(numbers))
    image, labels = render(*drawn)
    parsed = [torch.stack(part) for part in zip(*map(parse, image, labels), strict=True)]
    assert all(map(torch.equal, parsed, drawn))


def test_protocol():
    scenes = TetrominoesGenerator(10)
    image, labels = scenes.batch(torch.tensor([9, 0]))
    assert isinstance(scenes, Scenes)
    assert len(scenes) == 10
    assert (scenes.name, scenes.size, scenes.num_entities) == ("tetrominoes", (35, 35), 4)
    assert (image.shape, image.dtype) == ((2, 3, 35, 35), torch.uint8)
    assert (labels.shape, labels.dtype) == ((2, 35, 35), torch.uint8)
    assert image.is_contiguous()
    assert labels.is_contiguous()
    assert [len(part) for part in scenes.batch(torch.arange(0))] == [0, 0]


def test_nineteen_shapes():
    assert len(set(SHAPES)) == len(SHAPES) == 19
    for shape in SHAPES:
        assert len(set(shape)) == 4
        assert min(row for row, _ in shape) == min(column for _, column in shape) == 0
        steps = sum(abs(r - s) + abs(c - d) == 1 for r, c in shape for s, d in shape) // 2
        assert steps == (4 if shape == ((0, 0), (0, 1), (1, 0), (1, 1)) else 3)  # connected


def test_splitmix_known_answers():
    # The first outputs of SplitMix64 from state 1234567, as published with its reference code.
    words = random_words.words(torch.tensor([1234567]), torch.arange(3))[0].tolist()
    assert [word % 2**64 for word in words] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.integers(-(2**63), 2**63 - 1))
def test_mix_is_exact_on_any_word(word):
    bits, mask = word % 2**64, 2**64 - 1
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & mask
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & mask
    assert random_words.mix(torch.tensor([word])).item() % 2**64 == bits ^ bits >> 31


def test_the_stream_stays_what_it_is():
    """Results are quoted with a seed: these scenes must never change."""
    shapes, colors, corners = tetrominoes._draw(TetrominoesGenerator(60_001).keys(torch.tensor([0, 60_000])))
    assert shapes.tolist() == [[16, 8, 0], [16, 12, 14]]
    assert colors.tolist() == [[2, 3, 3], [1, 5, 5]]
    assert corners.tolist() == [[[9, 18], [3, 6], [27, 10]], [[11, 0], [0, 29], [21, 11]]]


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 299), min_size=1, max_size=40))
def test_a_scene_does_not_depend_on_its_batch(device, numbers):
    scenes, numbers = TetrominoesGenerator(300, seed=1), torch.tensor(numbers)
    for all_scenes, batch in zip(scenes.batch(torch.arange(300)), scenes.batch(numbers, device=device), strict=True):
        assert batch.device.type == device
        assert torch.equal(all_scenes[numbers], batch.cpu())


def test_first_counts_on_in_the_same_stream():
    whole = TetrominoesGenerator(30, seed=4).batch(torch.arange(10, 30))
    part = TetrominoesGenerator(20, seed=4, first=10).batch(torch.arange(20))
    assert all(map(torch.equal, whole, part))


def test_other_seeds_and_numbers_give_other_scenes():
    numbers = torch.arange(500)
    flat = torch.cat([TetrominoesGenerator(500, seed=seed).batch(numbers)[0].flatten(1) for seed in range(4)])
    assert len(flat.unique(dim=0)) == len(flat)


def test_every_object_is_whole(many):
    image, labels = many
    counts = torch.stack([(labels == label).sum((1, 2)) for label in range(4)], 1)
    assert (counts == torch.tensor([925, 100, 100, 100])).all()
    assert ((image.amax(1) > 0) == (labels > 0)).all()


def test_distribution():
    count = 20_000
    shapes, colors, corners = tetrominoes._draw(TetrominoesGenerator(count, seed=3).keys(torch.arange(count)))
    for values, kinds in ((shapes, 19), (colors, 6)):
        expected = count / kinds  # for each of the three objects; six standard deviations
        for column in values.T:
            assert ((column.bincount(minlength=kinds) - expected).abs() < 6 * expected**0.5).all()
    # Colors are independent, so they repeat: all three alike in one scene of 36.
    alike = (colors == colors[:, :1]).all(1).double().mean().item()
    assert abs(alike - 1 / 36) < 6 * (1 / 36 / count) ** 0.5
    # Every corner that a shape has room for is taken, and none beyond.
    for shape in range(19):
        taken = corners[shapes == shape]
        room = tetrominoes._tables(torch.device("cpu")).room[shape]
        assert taken.amin(0).tolist() == [0, 0]
        assert (taken.amax(0) == room - 1).all()
    # The objects are exchangeable.
    means = corners.double().mean(0)
    assert (means - means.mean(0)).abs().max() < 0.5


def test_every_border_pixel_is_reached(many):
    _, labels = many
    assert (labels > 0).any(0).all()


def test_squares_overlap_when_closer_than_their_side():
    square = SHAPES.index(((0, 0), (0, 1), (1, 0), (1, 1)))
    tables = tetrominoes._tables(torch.device("cpu"))
    overlap = tables.overlap.view(19, 19, 61, 61)[square, square]
    offset = torch.arange(-30, 31).abs()
    assert torch.equal(overlap, (offset[:, None] < 10) & (offset < 10))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 18), st.integers(0, 18), st.integers(-30, 30), st.integers(-30, 30))
def test_overlap_is_that_of_the_painted_pixels(a, b, down, right):
    tables = tetrominoes._tables(torch.device("cpu"))
    painted = []
    for shape, corner in ((a, (0, 0)), (b, (down, right))):
        rows, columns = tables.pixels[shape] // 35 + corner[0], tables.pixels[shape] % 35 + corner[1]
        painted.append(set(zip(rows.tolist(), columns.tolist(), strict=True)))
    overlap = tables.overlap.view(19, 19, 61, 61)[a, b, down + 30, right + 30]
    assert overlap.item() == bool(painted[0] & painted[1])


def test_gives_up_clearly(monkeypatch):
    monkeypatch.setattr(tetrominoes, "ATTEMPTS", 1)
    monkeypatch.setattr(tetrominoes, "ROUND", 1)
    with pytest.raises(RuntimeError, match=r"\d+ of 100 scenes not placed in 1 attempts"):
        TetrominoesGenerator(100).batch(torch.arange(100))


def test_rounds_do_not_change_the_scenes(monkeypatch):
    wide = TetrominoesGenerator(200).batch(torch.arange(200))
    monkeypatch.setattr(tetrominoes, "ROUND", 1)
    assert all(map(torch.equal, wide, TetrominoesGenerator(200).batch(torch.arange(200))))


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0], TypeError, "indices: expected a torch.int64 tensor, got list"),
        (torch.zeros(1), TypeError, "indices: expected a torch.int64 tensor, got torch.float32"),
        (torch.tensor(0), ValueError, r"indices: expected shape \(B,\), got \(\)"),
        (torch.tensor([0, 10]), IndexError, r"indices: expected values in \[0, 10\), got 0 to 10"),
        (torch.tensor([-1]), IndexError, "got -1 to -1"),
    ],
)
def test_bad_indices(indices, error, message):
    with pytest.raises(error, match=message):
        TetrominoesGenerator(10).batch(indices)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_scenes": 0}, ValueError, "num_scenes: expected 1 or more and below"),
        ({"num_scenes": 1.5}, TypeError, "num_scenes: expected an integer, got 1.5"),
        ({"num_scenes": 1, "seed": -1}, ValueError, "seed: expected 0 or more"),
        ({"num_scenes": 1, "first": True}, TypeError, "first: expected an integer, got True"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        TetrominoesGenerator(**arguments)


def test_resident_scenes_are_those_of_their_source():
    source = TetrominoesGenerator(1003, seed=5)  # more than one chunk
    resident = ResidentScenes(source, "cpu")
    assert isinstance(resident, Scenes)
    assert (len(resident), resident.name, resident.size) == (len(source), source.name, source.size)
    assert resident.num_entities == source.num_entities
    indices = torch.tensor([1002, 0, 7, 7, 999, 1000])
    for ours, theirs in zip(resident.batch(indices), source.batch(indices), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(IndexError, match=r"indices: expected values in \[0, 1003\), got 0 to 1003"):
        resident.batch(torch.tensor([0, 1003]))
    few = ResidentScenes(source, "cpu", 7)
    assert len(few) == 7
    assert torch.equal(few.batch(torch.tensor([6]))[0], source.batch(torch.tensor([6]))[0])
    with pytest.raises(TypeError, match=r"indices: expected a torch\.int64 tensor"):
        resident.batch(torch.tensor([0.0]))
