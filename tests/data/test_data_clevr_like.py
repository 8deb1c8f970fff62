"""The ray caster shows what stands there, and every scene is the same wherever and however it is asked for."""

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import ClevrLikeGenerator, ObjectScenes, ResidentScenes, Scenes, TetrominoesGenerator
from data.datasets import clevr_like
from data.datasets.clevr_like import placement, shading
from data.datasets.clevr_like.camera import View
from data.datasets.clevr_like.objects import Solids
from data.properties import COLORS, MATERIALS, SHAPES, SIZES

COUNT = 48


@pytest.fixture(scope="module")
def generator():
    return ClevrLikeGenerator(COUNT, seed=2)


@pytest.fixture(scope="module")
def drawn(generator):
    return placement.draw(generator.keys(torch.arange(COUNT)), 3, 10)


@pytest.fixture(scope="module")
def batch(generator):
    return generator.batch(torch.arange(COUNT))


def test_protocol(generator, batch):
    image, labels = batch
    assert isinstance(generator, Scenes)
    assert isinstance(generator, ObjectScenes)
    assert not isinstance(TetrominoesGenerator(1), ObjectScenes)
    assert (generator.name, generator.size, generator.num_entities) == ("clevr-like", (128, 128), 11)
    assert (image.shape, image.dtype) == ((COUNT, 3, 128, 128), torch.uint8)
    assert (labels.shape, labels.dtype) == ((COUNT, 128, 128), torch.uint8)
    none = torch.arange(0)
    assert [len(part) for part in (*generator.batch(none), generator.properties(none))] == [0, 0, 0]


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=4))
def test_a_scene_does_not_depend_on_its_batch(generator, batch, numbers):
    numbers = torch.tensor(numbers)
    for whole, part in zip(batch, generator.batch(numbers), strict=True):
        assert torch.equal(whole[numbers], part)


def test_rounds_do_not_change_the_scenes(generator, batch, monkeypatch):
    monkeypatch.setattr(placement, "CHUNK", 3)
    monkeypatch.setattr(clevr_like, "CHUNK", 3)
    assert all(map(torch.equal, batch, generator.batch(torch.arange(COUNT))))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_same_bits_on_a_gpu(generator, batch):
    assert all(map(torch.equal, batch, (part.cpu() for part in generator.batch(torch.arange(COUNT), "cuda"))))


def test_the_stream_stays_what_it_is():
    """Results are quoted with a seed: these scenes must never change."""
    batch = ClevrLikeGenerator(60_001).batch(torch.tensor([0, 60_000]))
    assert [zlib.crc32(part.numpy()) for part in batch] == [410128376, 3849841054]


def test_first_counts_on_in_the_same_stream_and_other_seeds_differ(batch):
    part = ClevrLikeGenerator(2, seed=2, first=5).batch(torch.arange(2))
    assert torch.equal(part[0], batch[0][5:7])
    assert not torch.equal(ClevrLikeGenerator(2, seed=3, first=5).batch(torch.arange(2))[0], part[0])


def inside(scenes, scene, point):
    """Which objects hold a point, float64 (..., 3): bool (..., M), from what cubes, spheres and cylinders are."""
    held = []
    for m in range(int(scenes.real[scene].sum())):
        large, shape = int(scenes.large[scene, m]), SHAPES[scenes.shape[scene, m]]
        radius = (0.35, 0.7)[large]
        x, y = (point[..., i] - float(scenes.position[scene, m, i]) for i in range(2))
        z = point[..., 2] - radius
        cosine, sine = float(scenes.cosine[scene, m]), float(scenes.sine[scene, m])
        along, across = cosine * x + sine * y, cosine * y - sine * x
        held.append(
            {
                "sphere": np.sqrt(x**2 + y**2 + z**2) <= radius,
                "cylinder": (np.hypot(x, y) <= radius) & (abs(z) <= radius),
                "cube": np.maximum(np.maximum(abs(along), abs(across)), abs(z)) <= radius,
            }[shape]
        )
    return np.stack(held, -1)


@pytest.mark.parametrize("scene", range(3))
def test_labels_and_shadows_by_marching_along_rays(drawn, scene):
    """Points along each ray, each asked whether it lies in an object, tell the same at all pixels but edges."""
    scenes, labels = drawn
    camera = scenes.camera[scene].double().numpy()
    forward = -camera / np.linalg.norm(camera)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    # CLEVR's lens over 320 x 240 pixels; rows 29 to 220 and columns 64 to 255, every sixth of them.
    rows, columns = np.meshgrid(np.arange(1.5, 128, 4), np.arange(1.5, 128, 4), indexing="ij")
    x, y = 64 + 1.5 * columns - 160, 120 - 29 - 1.5 * rows
    ray = forward + (x[..., None] * right + y[..., None] * up) / (320 * 35 / 32)

    depth = np.linspace(5, 18, 1000)
    held = inside(scenes, scene, camera + depth[:, None, None, None] * ray)
    hit = held.any((0, 3))
    first = held.any(-1).argmax(0)
    label = np.where(hit, np.take_along_axis(held, first[None, ..., None], 0)[0].argmax(-1) + 1, 0)
    ours = labels[scene].view(128, 128)[1::4, 1::4].numpy()
    assert (label != ours).mean() < 0.01
    assert len(np.unique(ours)) > 2

    # From there towards the sun; no object shadows itself.
    far = np.where(hit, depth[first], -camera[2] / ray[..., 2])
    point = camera + far[..., None] * ray
    sun = np.array(shading.SUN) / np.linalg.norm(shading.SUN)
    held = inside(scenes, scene, point + np.linspace(0.001, 2.5, 300)[:, None, None, None] * sun)
    dark = (held & (np.arange(held.shape[-1]) != label[..., None] - 1)).any((0, 3))
    view, solids = View.of(scenes.camera), Solids.of(scenes)
    points = np.zeros((len(labels), 3, 128, 128), np.float32)
    points[scene, :, 1::4, 1::4] = np.moveaxis(point, -1, 0)
    points = torch.from_numpy(points).flatten(2).unbind(1)
    ours = shading.find_shadows(scenes, view, solids, tuple(p.contiguous() for p in points), labels)
    ours = ours[scene].view(128, 128)[1::4, 1::4].numpy()
    assert (dark != ours).mean() < 0.01
    assert dark[label == 0].any()


def test_objects_stand_apart_and_are_seen(generator, drawn):
    scenes, labels = drawn
    radius = torch.where(scenes.large == 1, 0.7, 0.35)
    radius = torch.where(scenes.shape == SHAPES.index("cube"), radius * math.sqrt(2), radius)
    assert set(scenes.real.sum(1).tolist()) == set(range(3, 11))
    for scene in range(COUNT):
        count = int(scenes.real[scene].sum())
        position, wide = scenes.position[scene, :count], radius[scene, :count]
        gap = torch.cdist(position, position) - wide[:, None] - wide
        assert gap[~torch.eye(count, dtype=torch.bool)].min() > 0.2499
        assert position.abs().max() <= 3
        seen = labels[scene].long().bincount(minlength=11)[1:]
        assert seen[:count].min() >= 89
        assert seen[count:].sum() == 0


def test_properties_are_those_of_the_picture(generator, batch, drawn):
    scenes, labels = drawn
    properties = generator.properties(torch.arange(COUNT))
    assert (properties.shape, properties.dtype) == ((COUNT, 10, 19), torch.float32)
    coordinates, size, material, shape, color, real = properties.split((3, 2, 2, 3, 8, 1), -1)
    assert torch.equal(real[..., 0] == 1, scenes.real)
    assert not properties[~scenes.real].any()
    for one_hot in (size, material, shape, color):
        assert (one_hot[scenes.real].sum(-1) == 1).all()
    # Height tells the size.
    x, y, z = (coordinates * 6 - 3).unbind(-1)
    assert (z - torch.tensor((0.35, 0.7))[size.argmax(-1)])[scenes.real].abs().max() < 1e-5
    assert torch.allclose(torch.stack((x, y), -1)[scenes.real], scenes.position[scenes.real], atol=1e-5)
    # The hue of an object's pixels is its color's.
    image = batch[0].flatten(2).float()
    for name in ("red", "green", "blue"):
        scene, m = ((color.argmax(-1) == COLORS.index(name)) & scenes.real).nonzero()[0].tolist()
        mean = image[scene][:, labels[scene] == 1 + m].mean(1)
        assert ("red", "green", "blue")[mean.argmax()] == name
    assert (len(SIZES), len(MATERIALS), len(SHAPES), len(COLORS)) == (2, 2, 3, 8)


def test_metal_shines(batch, drawn):
    """The sun's highlight on large metal spheres is brighter than on rubber ones."""
    scenes, labels = drawn
    image = batch[0].flatten(2).amin(1)
    spheres = (scenes.shape == SHAPES.index("sphere")) & (scenes.large == 1) & scenes.real
    brightest = {
        metal: [int(image[b][labels[b] == 1 + m].max()) for b, m in (spheres & (scenes.metal == metal)).nonzero()]
        for metal in (0, 1)
    }
    assert np.median(brightest[1]) > np.median(brightest[0]) + 40


def test_few_objects():
    scenes = ClevrLikeGenerator(30, max_objects=6)
    assert (scenes.name, scenes.num_entities) == ("clevr6-like", 7)
    counts = scenes.properties(torch.arange(30))[..., -1].sum(1)
    assert set(counts.tolist()) == {3, 4, 5, 6}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"min_objects": 0}, ValueError, "min_objects: expected 1 or more and below 11, got 0"),
        ({"min_objects": 4, "max_objects": 3}, ValueError, "max_objects: expected 4 or more and below 11, got 3"),
        ({"max_objects": 11}, ValueError, "max_objects: expected 3 or more and below 11, got 11"),
        ({"max_objects": 6.0}, TypeError, "max_objects: expected an integer, got 6.0"),
    ],
)
def test_bad_numbers_of_objects(arguments, error, message):
    with pytest.raises(error, match=message):
        ClevrLikeGenerator(1, **arguments)


def test_gives_up_clearly(monkeypatch):
    monkeypatch.setattr(placement, "MIN_PIXELS", 20_000)
    monkeypatch.setattr(placement, "ATTEMPTS", 20)
    with pytest.raises(RuntimeError, match="2 of 2 scenes not drawn in 20 attempts"):
        ClevrLikeGenerator(2).batch(torch.arange(2))


def test_resident_properties(generator):
    resident = ResidentScenes(generator, "cpu", 5, properties=True)
    assert isinstance(resident, ObjectScenes)
    indices = torch.tensor([4, 0, 0])
    assert torch.equal(resident.properties(indices), generator.properties(indices))
    assert torch.equal(resident.batch(indices)[0], generator.batch(indices)[0])
    assert not isinstance(ResidentScenes(generator, "cpu", 1), ObjectScenes)
    with pytest.raises(TypeError, match="source: expected scenes that know their objects' properties, got 'tetromi"):
        ResidentScenes(TetrominoesGenerator(1), "cpu", properties=True)
