"""Files are read exactly, converted once, and every failure says what is wrong and leaves nothing behind."""

import contextlib
import errno
import gzip
import io
import json
import os
import pickle
import pwd
import re
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch

from data import (
    DATASETS,
    DataError,
    ObjectScenes,
    ResidentScenes,
    Scenes,
    TetrominoesGenerator,
    cache,
    files,
    load,
    tfrecord,
)

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT.parent / "shared" / "data"


# A writer of such files, made from the format's description alone.


def varint(value):
    low, high = value & 127, value >> 7
    return bytes([low | 128]) + varint(high) if high else bytes([low])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def byte_list(values):
    elements = [field(1, bytes([value])) for value in range(256)]
    return field(1, b"".join(elements[value] for value in values))


def example(**features):
    entries = (field(1, field(1, name.encode()) + field(2, value)) for name, value in features.items())
    return field(1, b"".join(entries))


def checksum(data):
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def header(length):
    length = struct.pack("<Q", length)
    return length + checksum(length)


def frame(payload):
    return header(len(payload)) + payload + checksum(payload)


def record(image, labels):
    """A Tetrominoes record of an image (3, 35, 35) and labels (35, 35)."""
    mask = np.stack([labels == entity for entity in range(4)])[..., None] * np.uint8(255)
    numbers = field(2, field(1, struct.pack("<4f", *range(4))))  # a FloatList
    image = image.transpose(1, 2, 0)
    return example(x=numbers, image=byte_list(image.tobytes()), mask=byte_list(mask.tobytes()), y=numbers)


def generated(count, seed=0):
    image, labels = TetrominoesGenerator(count, seed=seed).batch(torch.arange(count))
    return image.numpy(), labels.numpy()


def write(path, count=6, seed=0, compress=True):
    data = b"".join(frame(record(*scene)) for scene in zip(*generated(count, seed), strict=True))
    path.write_bytes(gzip.compress(data, 1, mtime=0) if compress else data)
    return data


def same(scenes, count, seed=0):
    batch = scenes.batch(torch.arange(count))
    return len(scenes) == count and all(
        np.array_equal(a.numpy(), b) for a, b in zip(batch, generated(count, seed), strict=True)
    )


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Where a test writes its file: an empty folder, beside an empty cache of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "files").mkdir()
    return tmp_path / "files" / "train.tfrecords"


def refuse(path, message, error=DataError, **options):
    """Loading fails with one clear line that names the file, and leaves nothing behind."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(error, match=message) as caught:
        load(path, progress=False, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.parent.iterdir()) == before


# What is read


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


def bytes_of(array):
    """The `BytesList` of an array of bytes, one a byte, as `byte_list` makes it, in no time."""
    elements = np.empty((array.size, 3), np.uint8)
    elements[:, :2], elements[:, 2] = (0x0A, 1), array.ravel()
    return field(1, elements.tobytes())


def one_hot(labels, entities, axis):
    return np.moveaxis(np.eye(entities, dtype=np.uint8)[labels] * np.uint8(255), -1, axis)


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


def clevr(count, seed=0):
    """The features of a scene of CLEVR with masks: blocks in a row, all visible in the crop."""
    random = np.random.default_rng(seed)
    labels = np.zeros((240, 320), int)
    for m in range(count):
        labels[100:140, 70 + 18 * m : 80 + 18 * m] = 1 + m
    floats = {name: random.uniform(-3, 3, 11).astype(np.float32) for name in "xyz"}
    codes = {"size": 2, "material": 2, "shape": 3, "color": 8}
    codes = {name: random.integers(1, 1 + most, 11).astype(np.uint8) for name, most in codes.items()}
    for values in (*floats.values(), *codes.values()):
        values[0] = values[1 + count :] = 0
    visibility = (np.arange(11) <= count).astype(np.float32)
    image = random.integers(0, 256, (240, 320, 3), np.uint8)
    return {"image": image, "mask": one_hot(labels, 11, 0), **floats, **codes, "visibility": visibility}


def clevr_record(features):
    numbers = {"pixel_coords": np.zeros(33, np.float32), "rotation": np.zeros(11, np.float32)}
    return example(
        **{
            name: field(2, field(1, values.tobytes())) if values.dtype == np.float32 else bytes_of(values)
            for name, values in (features | numbers).items()
        }
    )


def test_clevr(path, monkeypatch):
    counts = (3, 6, 7, 10)
    scenes = [clevr(count, seed) for seed, count in enumerate(counts)]
    path.write_bytes(b"".join(frame(clevr_record(scene)) for scene in scenes))
    monkeypatch.setattr(files, "BLOCK_BYTES", 3 << 20)  # two scenes
    ten = load(path, dataset="clevr10", progress=False)
    monkeypatch.setattr(files, "_convert", None)
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
            place, size, material, shape, colour, real = np.split(row, (3, 5, 7, 10, 18))
            assert np.allclose(place, [(scene[name][m] + 3) / 6 for name in "xyz"], atol=1e-6)
            assert size.tolist() == [scene["size"][m] == 2, scene["size"][m] == 1]  # 2 is small, 1 is large
            for name, vector in (("material", material), ("shape", shape), ("color", colour)):
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


# The cache


def test_converted_once(path, monkeypatch):
    write(path)
    load(path, progress=False)
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, f"{path.name}.cache"]
    monkeypatch.setattr(files, "_convert", None)
    assert same(load(path, progress=False), 6)


def test_stale_cache_is_rebuilt(path):
    write(path, 6)
    old = load(path, progress=False)
    write(path, 7, seed=1)
    assert same(load(path, progress=False), 7, seed=1)
    assert same(old, 6)  # what was open stays readable
    assert len(list(path.parent.iterdir())) == 2


def test_same_size_but_newer_is_rebuilt(path):
    write(path, 1, seed=0, compress=False)
    load(path, progress=False)
    write(path, 1, seed=1, compress=False)
    os.utime(path, ns=(0, 1))
    assert same(load(path, progress=False), 1, seed=1)


def test_cache_dir(path, tmp_path):
    write(path)
    other = path.parent / "more" / path.name
    other.parent.mkdir()
    write(other, 3, seed=2)
    cache = tmp_path / "made" / "here"
    assert same(load(path, cache_dir=cache, progress=False), 6)
    assert same(load(other, cache_dir=cache, progress=False), 3, seed=2)
    assert same(load(path, cache_dir=cache, progress=False), 6)
    assert len(list(cache.iterdir())) == 2
    assert len(list(path.parent.iterdir())) == 2


def test_user_cache_where_the_folder_is_read_only(path, tmp_path, monkeypatch):
    write(path)
    lock = cache._lock

    def read_only(folder, stack):
        if folder.parent == path.parent:
            raise OSError(errno.EROFS, "Read-only file system", str(folder))
        return lock(folder, stack)

    monkeypatch.setattr(cache, "_lock", read_only)
    assert same(load(path, progress=False), 6)
    assert list(path.parent.iterdir()) == [path]
    assert len(list((tmp_path / "home" / "iio_kernels").iterdir())) == 1
    monkeypatch.setattr(files, "_convert", None)
    assert same(load(path, progress=False), 6)


@pytest.mark.parametrize("writable", [True, False])
def test_no_home(path, monkeypatch, writable):
    """As under a bare user id in a container: beside the file is a place all the same."""

    def unknown(user):
        raise KeyError(user)

    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    write(path)
    if writable:
        assert same(load(path, progress=False), 6)
    else:
        monkeypatch.setattr(cache, "_lock", denied)
        refuse(path, "no place to keep the scenes of .*, pass another cache_dir", OSError)


def test_user_cache_below_home(path, tmp_path, monkeypatch):
    """Where no shell has put the home in place of "~"."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "~/mine")
    assert tmp_path / "mine" / "iio_kernels" == cache.folders(path, None)[1].parent


@pytest.mark.parametrize("closed", [None, io.StringIO()], ids=["before Python started", "since"])
def test_a_stderr_that_is_closed(path, monkeypatch, capsys, closed):
    write(path)
    if closed is not None:
        closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    scenes = load(path)
    assert same(ResidentScenes(scenes, "cpu"), 6)
    assert capsys.readouterr().out == ""


def test_pickled_scenes_are_opened_again(path, tmp_path, monkeypatch):
    """As in the workers of a DataLoader that are spawned, which may be elsewhere."""
    write(path, 40)
    monkeypatch.chdir(tmp_path)
    scenes = load(path.relative_to(tmp_path), cache_dir="here", progress=False)
    data = pickle.dumps(scenes)
    assert len(data) < 1000  # a scene has 4900 bytes
    monkeypatch.chdir("/")
    again = pickle.loads(data)
    assert same(again, 40)
    assert again._arrays["image"].filename == scenes._arrays["image"].filename
    assert type(again) is type(scenes)
    # Never other scenes than those that were pickled.
    write(path, 41, seed=1)
    load(path, cache_dir=tmp_path / "here", progress=False)
    with pytest.raises(DataError, match=r"were made anew from another file; load them again"):
        pickle.loads(data)
    shutil.rmtree(tmp_path / "here")
    with pytest.raises(DataError, match=r"the converted scenes are gone"):
        pickle.loads(data)


def test_pickled_scenes_of_some_objects(path):
    path.write_bytes(b"".join(frame(clevr_record(clevr(count, seed))) for seed, count in enumerate((7, 3))))
    scenes = load(path, dataset="clevr6", progress=False)
    again = pickle.loads(pickle.dumps(scenes))
    assert (len(again), again.num_entities, again.name) == (1, 7, "clevr6")
    first = torch.tensor([0])
    assert torch.equal(again.batch(first)[1], scenes.batch(first)[1])
    assert torch.equal(again.properties(first), scenes.properties(first))


def test_no_place_for_the_cache(path, tmp_path):
    write(path)
    (tmp_path / "plain").write_text("")
    refuse(
        path,
        "no place to keep the scenes of .*, pass another cache_dir",
        OSError,
        cache_dir=tmp_path / "plain",
    )


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz_of_nothing(_):
    file = io.BytesIO()
    np.savez(file, image=np.zeros(6))
    return file.getvalue()


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda data: data[:-1], ""),
        (lambda data: data + b"x", "as long as"),
        (lambda data: b"", ""),
        (lambda data: data[:20], ""),
        (lambda data: data.replace(b"(6, ", b"(6_,"), ""),
        (lambda data: npy(np.zeros((6, 3, 35, 35), np.int8)), "is no array of uint8"),
        (lambda data: npy(np.zeros((6, 3, 35, 30), np.uint8)), "is no array of uint8"),
        (lambda data: npy(np.float32(1)), "is no array of uint8"),
        (npz_of_nothing, ""),
    ],
)
def test_damaged_cache(path, damage, what):
    write(path)
    load(path, progress=False)
    image = path.parent / f"{path.name}.cache" / "image.npy"
    image.write_bytes(damage(image.read_bytes()))
    refuse(path, f"the converted scenes are damaged .*{what}.*; delete this folder")


def test_checksums_where_asked_for(path):
    write(path)
    assert same(load(path, progress=False, verify=True), 6)
    labels = path.parent / f"{path.name}.cache" / "labels.npy"
    data = bytearray(labels.read_bytes())
    data[-1] ^= 1
    labels.write_bytes(data)
    load(path, progress=False)
    refuse(path, "the converted scenes are damaged .labels.npy fails its checksum.; delete this folder", verify=True)


@pytest.mark.parametrize("stale", [False, True])
def test_another_process_is_first(path, monkeypatch, stale):
    """Where files cannot be locked: while this process converts, another one finishes."""
    monkeypatch.setattr(cache, "_lock", lambda *_: False)
    if stale:
        write(path, 2, seed=5)
        load(path, progress=False)
    write(path)
    convert = files._convert

    def overtaken(*arguments):
        monkeypatch.setattr(files, "_convert", convert)
        load(path, progress=False)
        convert(*arguments)

    monkeypatch.setattr(files, "_convert", overtaken)
    assert same(load(path, progress=False), 6)
    assert len(list(path.parent.iterdir())) == 2


RUN = f"import sys, os, signal; sys.path.insert(0, {str(ROOT)!r}); from data import files; "
LOAD = "print(len(files.load(sys.argv[1], progress=False)))"


def test_processes_at_the_same_time(path):
    """One converts, and the others wait for what it makes."""
    write(path, 600)
    tell = "convert = files._convert; files._convert = lambda *a: print('converts') or convert(*a); "
    command = [sys.executable, "-c", RUN + tell + LOAD, str(path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = [process.communicate()[0].split() for process in started]
    assert sorted(printed, key=len) == [["600"], ["600"], ["converts", "600"]]
    assert len(list(path.parent.iterdir())) == 2


def test_waiting_for_a_process_that_is_killed(path):
    """Its place is taken, and what it had converted kept."""
    write(path, 600)
    slow = "import time; labels = files._labels; "
    slow += "files._labels = lambda *a: labels(*a) if a[1] < 512 else print('half', flush=True) or time.sleep(600); "
    first = subprocess.Popen([sys.executable, "-c", RUN + slow + LOAD, str(path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "half\n"
    tell = "labels = files._labels; files._labels = lambda mask, *a: print(len(mask)) or labels(mask, *a); "
    second = subprocess.Popen(
        [sys.executable, "-c", RUN + tell + LOAD, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert "another process converts these scenes; waiting for it" in second.stderr.readline()
    first.kill()
    first.communicate()
    assert second.communicate()[0].split() == ["88", "600"]
    assert len(list(path.parent.iterdir())) == 2


def test_a_lock_that_is_never_the_folders_own(tmp_path, monkeypatch):
    """As on file systems that number their files anew: no lock, and no waiting for oneself."""
    monkeypatch.setattr(cache.os.path, "samestat", lambda *_: False)
    with contextlib.ExitStack() as stack:
        assert not cache._lock(tmp_path / "part", stack)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks(path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache.fcntl, "flock", flock)
    write(path)
    assert same(load(path, progress=False), 6)
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.parametrize("about", ["[]", "1", "null", "{"])
def test_a_cache_that_says_nothing_is_made_anew(path, about):
    write(path)
    load(path, progress=False)
    (path.parent / f"{path.name}.cache" / "source.json").write_text(about)
    assert same(load(path, progress=False), 6)


WHOLE = {"rows": 6, "checksums": {"image": 1, "labels": 1}}


@pytest.mark.parametrize(
    "change",
    [
        {"rows": None},
        {"rows": -6},
        {"rows": "6"},
        {"rows": True},
        {"checksums": None},
        {"checksums": []},
        {"checksums": {}},
        {"checksums": {"image": 1}},
        {"checksums": {"image": 1, "labels": "1"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("lacks", [False, True])
def test_a_cache_that_says_too_little(path, change, lacks):
    """The arrays of it are damaged; those of an interrupted conversion are made anew."""
    write(path)
    load(path, progress=False)
    folder = path.parent / f"{path.name}.cache"
    about = json.loads((folder / "source.json").read_text()) | change
    if lacks:
        about = {name: value for name, value in about.items() if name not in change}
    (folder / "source.json").write_text(json.dumps(about))
    refuse(path, "the converted scenes are damaged .source.json does not say .*; delete this folder")
    part = path.parent / f".{path.name}.cache.part"
    part.mkdir()
    folder.rename(part / "new")
    assert same(load(path, progress=False), 6)
    assert len(list(path.parent.iterdir())) == 2


def test_killed_during_the_conversion(path, monkeypatch):
    """The next process goes on with the block where it was killed."""
    write(path, 600)
    kill = "labels = files._labels; files._labels = lambda *a: labels(*a) if a[1] < 512 else os.kill(os.getpid(), 9); "
    process = subprocess.run([sys.executable, "-c", RUN + kill + LOAD, str(path)])
    assert process.returncode == -signal.SIGKILL
    assert not (path.parent / f"{path.name}.cache").exists()
    with (path.parent / f".{path.name}.cache.part" / "new" / "image.npy").open("ab") as file:
        file.write(b"half a block")
    done, labels = [], files._labels
    monkeypatch.setattr(files, "_labels", lambda mask, *rest: done.append(len(mask)) or labels(mask, *rest))
    assert same(load(path, progress=False, verify=True), 600)
    assert done == [88]
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.parametrize("kind", ["tfrecord", "npz"])
def test_interrupted_later(path, monkeypatch, kind):
    """What was interrupted goes on, unless the file changed or what is there is too short."""
    if kind == "npz":
        image, labels = generated(9)
        with path.open("wb") as file:
            np.savez(file, image=image.transpose(0, 2, 3, 1), mask=np.stack([labels == k for k in range(4)], 1))
    else:
        write(path, 9, compress=False)
    monkeypatch.setattr(files, "BLOCK", 4)
    labels, done = files._labels, []

    def interrupt(mask, first, *rest):
        if done == [0]:
            raise KeyboardInterrupt
        done.append(first)
        return labels(mask, first, *rest)

    part = path.parent / f".{path.name}.cache.part" / "new"
    for change, expected in (
        (lambda: None, [0, 4, 8]),
        (lambda: os.truncate(part / "labels.npy", 4000), [0, 0, 4, 8]),
        (lambda: os.utime(path, ns=(0, 1)), [0, 0, 4, 8]),
    ):
        monkeypatch.setattr(files, "_labels", interrupt)
        done.clear()
        with pytest.raises(KeyboardInterrupt):
            load(path, progress=False)
        change()
        monkeypatch.setattr(
            files, "_labels", lambda mask, first, *rest: done.append(first) or labels(mask, first, *rest)
        )
        assert same(load(path, progress=False), 9)
        assert done == expected
        assert len(list(path.parent.iterdir())) == 2
        cache.shutil.rmtree(path.parent / f"{path.name}.cache")


def test_interrupted(path, monkeypatch):
    write(path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_labels", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(path, progress=False)
    assert list(path.parent.iterdir()) == [path]


def test_full_disk(path, monkeypatch):
    write(path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.GrowingArrays, "append", full)
    refuse(path, "cannot convert .*train.tfrecords .No space left on device", OSError)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("count", [1, 600])  # a small block and a large one
def test_really_full_disk(path, monkeypatch, count):
    write(path, count)
    monkeypatch.setattr(cache.GrowingArrays, "_path", lambda *_: Path("/dev/full"))
    refuse(path, "cannot convert .*train.tfrecords .No space left on device", OSError)


# Bad files


def test_missing(path):
    refuse(path, "No such file or directory", FileNotFoundError)


def test_folder(path):
    refuse(path.parent, "expected a file, got a folder", IsADirectoryError)


def test_unknown_dataset(path):
    with pytest.raises(ValueError, match=r"dataset: expected one of 'tetrominoes', .*, got 'clever'"):
        load(path, dataset="clever")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a TFRecord file .*; this one is empty"),
        (b"hello", "this one begins with b'hello'"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "this one begins with b'.x89PNG"),
        (gzip.compress(b"", mtime=0), "the file holds no scenes"),
        (gzip.compress(b"no record at all", mtime=0), "record 0: the length fails its checksum"),
        (gzip.compress(bytes(5), mtime=0), "record 0: the file ends within the record's length: 5 of 12 bytes"),
        (gzip.compress(frame(b"\xff\xff"), mtime=0), "record 0: the 2 bytes of the record are no tf.train.Example"),
        (frame(b""), r"record 0: expected a feature 'image', got \[\]"),
        (frame(example(image=b"")), "record 0: image: expected 3675 bytes, 35 x 35 x 3, got 0: another"),
        (
            frame(example(image=byte_list(bytes(3675)), m=b"")),
            r"expected a feature 'mask', got \['image', 'm'\]",
        ),
        (
            frame(example(image=field(1, field(1, bytes(3675))))),
            "record 0: image: expected a list of elements of",
        ),
        (
            frame(example(image=field(1, field(1, bytes(2)) * 3))),
            "record 0: image: expected a list of elements of",
        ),
        (b"PK\x03\x04" + bytes(40), "the .npz file is damaged"),
    ],
)
def test_other_content(path, content, message):
    path.write_bytes(content)
    refuse(path, f"train.tfrecords: .*{message}")


def test_another_data_set(path):
    path.write_bytes(frame(example(image=byte_list(bytes(64 * 64 * 3)), mask=byte_list(bytes(64 * 64 * 6)))))
    refuse(path, "record 0: image: expected 3675 bytes, 35 x 35 x 3, got 12288: another data set")


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("keep", [-1, -3, -5, -20_000, 600 * 1000])
def test_cut_off(path, keep, compress):
    data = write(path, 30, compress=False)[:keep]
    path.write_bytes(gzip.compress(data, 1, mtime=0) if compress else data)
    number = 29 if keep < 0 else 600 * 1000 // RECORD
    refuse(path, f"record {number}: the file ends within the record: .* bytes are there")


RECORD = len(frame(record(*(part[0] for part in generated(1)))))


def test_cut_off_gzip(path):
    write(path)
    path.write_bytes(path.read_bytes()[:-500])
    refuse(path, r"record \d: the gzip compression is cut off or damaged \(Compressed file ended before")


@pytest.mark.parametrize("position", [-3, -6, 1000, 20])
def test_damaged_gzip(path, position):
    write(path)
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)
    refuse(path, r"record \d: ")


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (0, "the length fails"),
        (9, "the length fails"),
        (5000, "fail their checksum"),
        (RECORD - 1, "fail their"),
    ],
)
def test_damaged_record(path, offset, message):
    data = bytearray(write(path, compress=False))
    data[3 * RECORD + offset] ^= 0x10
    path.write_bytes(gzip.compress(data, 1, mtime=0))
    refuse(path, f"record 3: .*{message}")


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("length", [2**62, 2**63 - 1, 2**64 - 1])
def test_a_record_of_more_bytes_than_there_can_be(path, length, compress):
    data = write(path, 1, compress=False) + header(length) + bytes(100)
    path.write_bytes(gzip.compress(data, 1, mtime=0) if compress else data)
    refuse(path, f"record 1: the record says that it has {length} bytes, which do not fit into memory")


@pytest.mark.parametrize("entity", [0, 3])
def test_masks_must_be_one_hot(path, entity):
    image, labels = generated(600)
    mask = np.stack([labels == k for k in range(4)], 1)
    mask[555, entity, :, 3] ^= True
    with path.open("wb") as file:
        np.savez_compressed(file, image=image.transpose(0, 2, 3, 1), mask=mask)
    refuse(path, "record 555: mask: expected 255 for one entity at every pixel .* fails at 35 of 1225 pixels")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": np.zeros(3)}, r"expected the arrays 'image' and 'mask', got \['image'\]"),
        (
            {"image": np.zeros((2, 64, 64, 3), np.uint8)},
            "image: expected shape n x 35 x 35 x 3, got 2 x 64 x 64 x 3",
        ),
        (
            {"mask": np.zeros((2, 35, 35, 4), bool)},
            "mask: expected shape n x 4 x 35 x 35, got 2 x 35 x 35 x 4",
        ),
        ({"mask": np.zeros((3, 4, 35, 35), bool)}, "as many of one as of the other, got 2 and 3"),
        ({"image": np.zeros((2, 35, 35, 3))}, "image: expected uint8, got float64"),
        ({"image": np.array([{}])}, "the .npz file is damaged .Object arrays"),
        (
            {"image": np.zeros(()), "mask": np.zeros(())},
            "image: expected shape n x 35 x 35 x 3, got a scalar",
        ),
    ],
)
def test_bad_npz(path, arrays, message):
    whole = {"image": np.zeros((2, 35, 35, 3), np.uint8), "mask": np.zeros((2, 4, 35, 35), bool)}
    if len(arrays) == 1 and "expected the arrays" not in message:
        arrays = whole | arrays
    with path.open("wb") as file:
        np.savez(file, **arrays)
    refuse(path, message)


def test_cut_off_npz(path):
    with path.open("wb") as file:
        np.savez_compressed(file, image=np.zeros((9, 35, 35, 3), np.uint8), mask=np.zeros((9, 4, 35, 35), bool))
    path.write_bytes(path.read_bytes()[:200])
    refuse(path, "the .npz file is damaged")


def written_npz(count=2, compression=zipfile.ZIP_STORED):
    """An .npz file of Tetrominoes."""
    image, labels = generated(count)
    mask = np.stack([labels == entity for entity in range(4)], 1)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("image.npy", npy(np.ascontiguousarray(image.transpose(0, 2, 3, 1))))
        archive.writestr("mask.npy", npy(mask))
    return file.getvalue()


def patched(offset, value):
    """A zip file whose members' headers have `value` at `offset`, and two bytes later in the archive's directory."""
    data = bytearray(written_npz())
    for signature, at in ((b"PK\x03\x04", offset), (b"PK\x01\x02", offset + 2)):
        for found in re.finditer(signature, bytes(data)):
            struct.pack_into("<H", data, found.start() + at, value)
    return bytes(data)


def with_header(about):
    """An .npz file whose image's header says this."""
    header = about.encode("latin1").ljust(117) + b"\n"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(100)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("image.npy", member)
        archive.writestr("mask.npy", npy(np.zeros((2, 4, 35, 35), bool)))
    return file.getvalue()


TERABYTES = "{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000, 35, 35, 3)}"


@pytest.mark.parametrize(
    "content",
    [
        patched(8, 9),  # Deflate64
        patched(8, 99),  # a compression that there is not
        patched(6, 1),  # encrypted
        patched(6, 1 << 5),  # compressed patches
        patched(6, 1 << 6),  # encrypted otherwise
        patched(4, 99),  # of a later version
        *(patched(8, method) for method in (8, 12, 14)),  # never compressed at all
        with_header(TERABYTES),
        with_header(TERABYTES.replace("10000000000", "4611686018427387904")),
        with_header(TERABYTES.replace("10000000000", "-1")),
        with_header(TERABYTES.replace("10000000000", "'a'")),
        with_header(TERABYTES.replace("|u1", "|u99")),
        with_header(TERABYTES[:40]),
        with_header("(" * 5000),
        with_header("[" + "{" * 100),
        with_header("\xff" * 50),
        with_header("1" * 9000),
    ],
)
def test_damaged_npz(path, content):
    path.write_bytes(content)
    refuse(path, "train.tfrecords: the .npz file is damaged")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("position", [60, 100, 150, 400])
def test_damaged_compression(path, compression, position):
    data = bytearray(written_npz(5, compression))
    data[position] ^= 0x5A
    path.write_bytes(data)
    refuse(path, "the .npz file is damaged")


def test_any_damaged_byte_of_an_npz_is_noticed_or_means_nothing(path):
    data = written_npz(1)
    for position in (*range(0, 250, 7), *range(len(data) - 200, len(data), 7)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):
            assert same(load(path, progress=False), 1)


def test_npz_of_another_byte_order(path):
    scenes = [clevr(3), clevr(4)]
    arrays = {name: np.stack([scene[name] for scene in scenes]) for name in scenes[0]}
    for name in files.NUMBERS:
        arrays[name] = arrays[name].astype(">f4")
    with path.open("wb") as file:
        np.savez(file, **arrays)
    got = load(path, dataset="clevr10", progress=False).properties(torch.arange(2))
    assert np.allclose(got[0, 0, :3].numpy(), [(scenes[0][name][1] + 3) / 6 for name in "xyz"], atol=1e-6)


def test_no_scenes_in_npz(path):
    with path.open("wb") as file:
        np.savez(file, image=np.zeros((0, 35, 35, 3), np.uint8), mask=np.zeros((0, 4, 35, 35), bool))
    refuse(path, "the file holds no scenes")


def test_every_single_damaged_byte_is_noticed(path):
    """Any one byte of an uncompressed file changed is an error, never other pixels."""
    data = write(path, 1, compress=False)
    for position in np.random.default_rng(0).integers(0, len(data), 30):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        refuse(path, re.escape(str(path)))
