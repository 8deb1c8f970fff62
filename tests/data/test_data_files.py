"""Files are read exactly."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from written_files import bytes_of, clevr, clevr_record, example, field, frame, generated, one_hot, refuse, same, write

from data import (
    DATASETS,
    DataError,
    ObjectScenes,
    Scenes,
    blocks,
    conversion,
    load,
    tfrecord,
)

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not SAMPLE.exists(), reason="the real scenes are not at hand")
def test_real_scenes(tmp_path):
    with np.load(SAMPLE / "tetrominoes_sample.npz") as archive:
        image, mask = archive["image"], archive["mask"]
    for name in ("tetrominoes_sample.tfrecords", "tetrominoes_sample.npz"):
        scenes = load(SAMPLE / name, cache_dir=tmp_path, progress=False)
        got_image, got_labels = scenes.batch(torch.arange(6))
        assert len(scenes) == 6
        assert np.array_equal(got_image.numpy(), image.transpose(0, 3, 1, 2))
        assert np.array_equal(got_labels.numpy(), mask.argmax(1))


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("count", [1, 512, 513])
def test_tfrecord(path, count, compress):
    write(path, count, compress=compress)
    assert same(load(path, progress=False), count)


@pytest.mark.parametrize("trailing", [(), (1,)])
@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_npz(path, dtype, trailing):
    image, labels = generated(520)
    mask = np.stack([labels == entity for entity in range(4)], 1).reshape(520, 4, 35, 35, *trailing)
    mask = mask if dtype is bool else mask * np.uint8(255)
    with path.open("wb") as file:
        np.savez_compressed(file, image=image.transpose(0, 2, 3, 1), mask=mask)
    assert same(load(path, progress=False), 520)


def test_protocol(path):
    write(path)
    scenes = load(str(path))
    image, labels = scenes.batch(torch.tensor([5, 0, 5]), device="cpu")
    assert isinstance(scenes, Scenes)
    assert (scenes.name, scenes.size, scenes.num_entities) == ("tetrominoes", (35, 35), 4)
    assert (image.shape, image.dtype) == ((3, 3, 35, 35), torch.uint8)
    assert (labels.shape, labels.dtype) == ((3, 35, 35), torch.uint8)
    assert torch.equal(image[0], image[2])
    assert not torch.equal(image[0], image[1])
    image.zero_()  # a copy: the file stays what it is
    assert same(scenes, 6)
    with pytest.raises(IndexError, match=r"indices: expected values in \[0, 6\), got 6 to 6"):
        scenes.batch(torch.tensor([6]))


def test_bytes_of_any_value():
    values = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
    serialized = b"".join(field(1, bytes([value])) for value in values)
    assert np.array_equal(tfrecord.byte_feature(serialized), values)


def test_floats():
    """The serialization of a list of any length, as protobuf writes it."""
    for count in (0, 1, 31, 32, 4096):
        values = np.random.default_rng(0).normal(size=count).astype(np.float32)
        assert np.array_equal(tfrecord.float_feature(field(1, values.tobytes())), values)
    for wrong in (b"", field(1, bytes(3)), field(1, bytes(4))[:-1], field(1, bytes(4)) + b"x", bytes(5), b"\x0a\xff"):
        with pytest.raises(DataError, match="expected a packed list of floats"):
            tfrecord.float_feature(wrong)


@pytest.mark.parametrize("dataset", [name for name in DATASETS if name.startswith(("multi", "objects"))])
def test_published_formats(path, dataset):
    """Shapes as in the readers that were published with the files."""
    entities = {"": 6, "-binarized": 4, "-colored": 5} if "multi" in dataset else {
        "": 7, "-six-objects": 10, "-empty-room": 4, "-identical-color": 10
    }  # fmt: skip
    entities = entities[dataset.removeprefix("multi-dsprites").removeprefix("objects-room")]
    last, channels = "multi" in dataset, 1 if "binarized" in dataset else 3
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (2, 64, 64, channels), np.uint8)
    labels = random.integers(0, entities, (2, 64, 64))
    mask = one_hot(labels, entities, -1 if last else 1)
    path.write_bytes(
        b"".join(frame(example(image=bytes_of(i), mask=bytes_of(m))) for i, m in zip(image, mask, strict=True))
    )
    scenes = load(path, dataset=dataset, progress=False)
    got_image, got_labels = scenes.batch(torch.arange(2))
    backgrounds = 1 if last else 4
    assert (got_image.permute(0, 2, 3, 1).numpy() == image).all()
    assert (got_labels.numpy() == np.maximum(labels - backgrounds + 1, 0)).all()
    assert (scenes.name, scenes.size, scenes.num_entities) == (dataset, (64, 64), entities - backgrounds + 1)
    assert not isinstance(scenes, ObjectScenes)
    # The same as an .npz file.
    with path.open("wb") as file:
        np.savez(file, image=image, mask=mask == 255)
    again = load(path, dataset=dataset, progress=False)
    assert all(map(torch.equal, again.batch(torch.arange(2)), (got_image, got_labels)))


def test_clevr(path, monkeypatch):
    counts = (3, 6, 7, 10)
    scenes = [clevr(count, seed) for seed, count in enumerate(counts)]
    path.write_bytes(b"".join(frame(clevr_record(scene)) for scene in scenes))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3 << 20)  # two scenes
    ten = load(path, dataset="clevr10", progress=False)
    monkeypatch.setattr(conversion, "convert", None)
    six = load(path, dataset="clevr6", progress=False)  # from the same conversion
    assert (len(ten), ten.num_entities, ten.size, len(six), six.num_entities) == (4, 11, (128, 128), 2, 7)
    assert isinstance(six, ObjectScenes)
    for ours, theirs in zip((*six.batch(torch.arange(2)), six.properties(torch.arange(2))),
                            (*ten.batch(torch.arange(2)), ten.properties(torch.arange(2))), strict=True):  # fmt: skip
        assert torch.equal(ours, theirs)

    image, labels = ten.batch(torch.arange(4))
    for scene, got, segments, rows in zip(scenes, image, labels, ten.properties(torch.arange(4)), strict=True):
        # Three pixels of the crop become two, weighed by the distance of their centres.
        crop = scene["image"][29:221, 64:256].astype(float)
        for axis in (0, 1):
            a, b, c = np.moveaxis(crop, axis, 0).reshape(64, 3, *np.delete(crop.shape, axis)).swapaxes(0, 1)
            pairs = np.stack((0.75 * a + 0.25 * b, 0.25 * b + 0.75 * c), 1)
            crop = np.moveaxis(pairs.reshape(128, *pairs.shape[2:]), 0, axis)
        assert abs(got.permute(1, 2, 0).numpy() - crop).max() <= 0.51
        nearest = scene["mask"].argmax(0)[29:221, 64:256][(np.arange(128) * 3 + 1) // 2][
            :, (np.arange(128) * 3 + 1) // 2
        ]
        assert (segments.numpy() == nearest).all()

        count = int(scene["visibility"].sum()) - 1
        assert not rows[count:].any()
        for m, row in enumerate(rows[:count].numpy(), 1):
            place, size, material, shape, color, real = np.split(row, (3, 5, 7, 10, 18))
            assert np.allclose(place, [(scene[name][m] + 3) / 6 for name in "xyz"], atol=1e-6)
            assert size.tolist() == [scene["size"][m] == 2, scene["size"][m] == 1]  # 2 is small, 1 is large
            for name, vector in (("material", material), ("shape", shape), ("color", color)):
                assert vector.tolist() == [scene[name][m] == 1 + i for i in range(len(vector))]
            assert real == 1


def test_objects_outside_the_crop_are_neither_asked_for_nor_scored(path):
    """Of a scene's objects those remain that have a pixel of the resized square; which scenes there are stays."""
    scene = clevr(7, seed=1)
    labels = scene["mask"].argmax(0)
    labels[labels == 2] = 0
    labels[100:140, 10:60] = 2  # left of the square
    labels[labels == 5] = 0
    labels[225:, 100:140] = 5  # below it
    labels[labels == 7] = 0
    labels[99, 255:300] = 7  # one pixel is in it, of a row that resizing passes over
    scene["mask"] = one_hot(labels, 11, 0)
    path.write_bytes(b"".join(frame(clevr_record(each)) for each in (scene, clevr(6, seed=2))))
    ten, six = (load(path, dataset=name, progress=False) for name in ("clevr10", "clevr6"))
    rows = ten.properties(torch.tensor([0, 1]))
    assert rows[..., -1].sum(1).tolist() == [4, 6]
    assert not rows[0, 4:].any()
    expected = [(scene["x"][m] + 3) / 6 for m in (1, 3, 4, 6)]
    assert np.allclose(rows[0, :4, 0].numpy(), expected, atol=1e-6)
    # Of 7 objects, 4 of which can be seen, the scene has more than 6 as before.
    assert len(six) == 1
    assert torch.equal(six.properties(torch.tensor([0])), rows[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"color": np.full(11, 9, np.uint8)}, "record 0: color: expected 1 to 8 for every object, got 9"),
        ({"x": np.zeros(10, np.float32)}, "record 0: x: expected 11 floats, 11, got 10: another data set?"),
        ({"y": np.zeros(11, np.uint8)}, "record 0: y: expected a packed list of floats"),
        ({"size": np.zeros(11, np.float32)}, "record 0: size: expected a list of elements of one byte each"),
    ],
)
def test_other_properties(path, change, message):
    path.write_bytes(frame(clevr_record(clevr(3) | change)))
    refuse(path, re.escape(message), dataset="clevr10")


def test_strays(path):
    """Of a scene's pixels one in a hundred may belong to no entity, which is background, or to several: the first."""
    labels = np.random.default_rng(0).integers(0, 5, (1, 64, 64))
    mask = one_hot(labels, 5, -1)
    mask[0, 0, :20], mask[0, 1, :20, 2] = 0, 255
    image = np.zeros((1, 64, 64, 3), np.uint8)
    with path.open("wb") as file:
        np.savez(file, image=image, mask=mask)
    got = load(path, dataset="multi-dsprites-colored", progress=False).batch(torch.tensor([0]))[1][0].numpy()
    labels[0, 0, :20], labels[0, 1, :20] = 0, np.minimum(labels[0, 1, :20], 2)
    assert (got == labels[0]).all()
    mask[0, 2] = 0
    with path.open("wb") as file:
        np.savez(file, image=image, mask=mask)
    refuse(path, r"record 0: mask: .* fails at \d+ of 4096 pixels", dataset="multi-dsprites-colored")
