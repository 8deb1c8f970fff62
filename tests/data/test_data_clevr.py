"""The original CLEVR is read as published: whole pictures, every object, and every failure named."""

import errno
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clevr_folder import COLORS, MATERIALS, SHAPES, SIZES, write
from PIL import Image

from data import DATASETS, DataError, ObjectScenes, load
from data.datasets import clevr

ROOT = Path(__file__).parents[2]


def change(folder, edit):
    """The list of training scenes, after `edit` of its scenes."""
    path = folder / "scenes" / "CLEVR_train_scenes.json"
    about = json.loads(path.read_text())
    edit(about["scenes"])
    path.write_text(json.dumps(about))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "data" / "CLEVR_v1.0").mkdir(parents=True)
    return tmp_path / "data" / "CLEVR_v1.0"


def read(folder, **options):
    return load(folder, dataset="clevr", progress=False, **options)


def refuse(folder, message, error=DataError):
    """Loading fails with one clear line that names the folder, and leaves nothing behind."""
    with pytest.raises(error, match=message) as caught:
        read(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(folder.parent.iterdir()) == [folder]


def resized(pixels):
    """Bilinear between pixel centres, without antialiasing, in float64: (320, 480, 3) -> (128, 128, 3)."""
    for axis in (0, 1):
        length = pixels.shape[axis]
        place = (np.arange(128) + 0.5) * length / 128 - 0.5
        low = np.floor(place).astype(int)
        weight = (place - low).reshape(-1, 1, 1) if axis == 0 else (place - low).reshape(1, -1, 1)
        pixels = pixels.take(low, axis) * (1 - weight) + pixels.take((low + 1).clip(max=length - 1), axis) * weight
    return pixels


def test_scenes_are_those_of_the_folder(folder):
    """Training scenes, then validation scenes: pictures resized whole, all objects of each, rows of zeros behind."""
    pictures, scenes = write(folder)
    source = read(folder)
    assert isinstance(source, ObjectScenes)
    assert (source.name, len(source), source.size, source.num_entities) == ("clevr", 4, (128, 128), 11)
    indices = torch.tensor([3, 0, 1, 2])
    image, labels = source.batch(indices)
    assert (image.shape, image.dtype) == ((4, 3, 128, 128), torch.uint8)
    assert (labels.shape, labels.dtype, int(labels.sum())) == ((4, 128, 128), torch.uint8, 0)
    for got, rows, index in zip(image, source.properties(indices), indices.tolist(), strict=True):
        assert abs(got.permute(1, 2, 0).numpy() - resized(pictures[index][..., :3].astype(float))).max() <= 0.51
        objects = scenes[index]["objects"]
        assert not rows[len(objects) :].any()
        for row, thing in zip(rows.numpy(), objects, strict=False):
            place, size, material, shape, color, real = np.split(row, (3, 5, 7, 10, 18))
            assert np.allclose(place, [(x + 3) / 6 for x in thing["3d_coords"]], atol=1e-6)
            assert size.tolist() == [thing["size"] == name for name in SIZES]
            assert material.tolist() == [thing["material"] == name for name in MATERIALS]
            assert shape.tolist() == [thing["shape"] == name for name in SHAPES]
            assert color.tolist() == [thing["color"] == name for name in COLORS]
            assert real == 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_split_alone(folder, split):
    write(folder, {split: (3, 4)})
    assert read(folder).properties(torch.arange(2))[..., -1].sum(1).tolist() == [3, 4]


def test_converted_once_and_again_when_a_list_changes(folder, monkeypatch):
    write(folder)
    source = read(folder)
    assert len(source) == 4
    again = pickle.loads(pickle.dumps(source))  # as for a worker of a DataLoader
    assert torch.equal(again.properties(torch.arange(4)), source.properties(torch.arange(4)))
    with monkeypatch.context() as patch:
        patch.setattr(clevr, "convert", None)
        assert len(read(folder, verify=True)) == 4
    change(folder, lambda scenes: scenes.pop())
    assert len(read(folder)) == 3
    assert sorted(path.name for path in folder.parent.iterdir()) == ["CLEVR_v1.0", "CLEVR_v1.0.cache"]


@pytest.mark.long
def test_killed_during_the_conversion(folder):
    """The next process goes on with the block where it was killed."""
    _, scenes = write(folder, {"train": (3, 4, 5), "val": (6, 7)})
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from data import load
from data.datasets import clevr
clevr.BLOCK, read = 2, clevr.read_picture
def read_until(folder, name, size):
    if name.name == "CLEVR_val_000001.png":
        os.kill(os.getpid(), 9)
    return read(folder, name, size)
clevr.read_picture = read_until
load({str(folder)!r}, dataset="clevr", progress=False)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert not folder.with_name("CLEVR_v1.0.cache").exists()
    for picture in (folder / "images" / "train").iterdir():
        picture.write_text("of the blocks that are done, no picture is read again") if picture.stem[-1] < "2" else None
    source = read(folder, verify=True)
    assert source.properties(torch.arange(5))[..., -1].sum(1).tolist() == [len(each["objects"]) for each in scenes]


def thing(**fields):
    """An edit of the first object of the first scene."""
    return lambda scenes: scenes[0]["objects"][0].update(fields)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s[1].pop("objects"), "scene 1: expected 'objects', got .*'image_filename'"),
        (lambda s: s.__setitem__(1, 5), "scene 1: expected 'image_filename', got 5"),
        (lambda s: s[1].update(objects={}), "scene 1: objects: expected a list of at most 10, got {}"),
        (lambda s: s[1]["objects"].append(s[0]["objects"][0]), "scene 1: objects: .* at most 10, got 11 of them"),
        (lambda s: s[0]["objects"][2].pop("color"), "scene 0: object 2: expected 'color', got"),
        (thing(color="pink"), "scene 0: object 0: color: expected one of gray, .* yellow, got 'pink'"),
        (thing(shape=["cube"]), r"scene 0: object 0: shape: expected one of .* got \['cube'\]"),
        (thing(**{"3d_coords": [0, 1]}), r"object 0: 3d_coords: expected three numbers in \[-3, 3\], got \[0, 1\]"),
        (thing(**{"3d_coords": [0, 1, 3.5]}), "object 0: 3d_coords: expected three numbers"),
        (thing(**{"3d_coords": [0, 1, True]}), "object 0: 3d_coords: expected three numbers"),
        (lambda s: s[2].update(image_filename="../x.png"), "scene 2: image_filename: expected the name of a .png"),
        (lambda s: s[2].update(image_filename=".."), "scene 2: image_filename: expected the name of a .png"),
        (
            lambda s: s[2].update(image_filename=7),
            "scene 2: image_filename: expected the name of a .png picture, got 7",
        ),
        (lambda s: s[2].update(image_filename="x.png"), "images/train/x.png is missing"),
        (lambda s: s.clear(), "the lists of scenes are empty"),
    ],
)
def test_scenes_that_are_none(folder, edit, message):
    write(folder, {"train": (3, 10, 5)})
    change(folder, edit)
    refuse(folder, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "scenes/CLEVR_train_scenes.json: cut off, or no JSON"),
        (b"[]", "the lists of scenes are empty"),
        (b"\xff\xfe\x00", "scenes/CLEVR_train_scenes.json: cut off, or no JSON"),
        (b'{"scenes": [NaN]}', "scenes/CLEVR_train_scenes.json: cut off, or no JSON"),
        (None, "scenes/CLEVR_train_scenes.json: cut off, or no JSON"),
    ],
)
def test_lists_that_are_none(folder, content, message):
    write(folder, {"train": (3, 10, 5)})
    path = folder / "scenes" / "CLEVR_train_scenes.json"
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    refuse(folder, message)


def damaged(data):
    """One byte of the compressed pixels is another."""
    place = data.index(b"IDAT") + 100
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: b"", "CLEVR_train_000001.png: expected a PNG picture, got another file"),
        (lambda data: b"GIF89a" + data, "expected a PNG picture, got another file"),
        (lambda data: data[:-2000], "CLEVR_train_000001.png: the picture is damaged"),
        (damaged, "CLEVR_train_000001.png: the picture is damaged"),
        # Pixels by the header alone: nothing is decoded, so no memory is asked for.
        (lambda data: data[:16] + b"\x7f" * 8 + data[24:], "expected 480 x 320 pixels, got 2139062143 x 2139062143"),
    ],
)
def test_pictures_that_are_none(folder, spoil, message):
    write(folder)
    path = folder / "images" / "train" / "CLEVR_train_000001.png"
    path.write_bytes(spoil(path.read_bytes()))
    refuse(folder, message)


@pytest.mark.parametrize(("mode", "size"), [("L", (480, 320)), ("RGB", (320, 240))])
def test_pictures_of_another_kind(folder, mode, size):
    write(folder)
    Image.new(mode, size).save(folder / "images" / "val" / "CLEVR_val_000000.png")
    refuse(folder, "images/val/CLEVR_val_000000.png: expected")


def test_no_such_folder(folder):
    refuse(folder, "expected scenes/CLEVR_train_scenes.json or", FileNotFoundError)
    (folder / "scenes").mkdir()
    refuse(folder, "expected scenes/CLEVR_train_scenes.json or", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        read(folder.parent / "elsewhere")
    (folder / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="expected the folder of images/ and scenes/, got a file"):
        read(folder / "file")
    with pytest.raises(IsADirectoryError, match="expected a file, got a folder"):
        load(folder, dataset="clevr10")


def test_what_the_disk_says_is_told(folder, monkeypatch):
    write(folder)

    def broken(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "x.png")

    monkeypatch.setattr(Image, "open", broken)
    refuse_disk = re.escape(f"cannot convert {folder} ({os.strerror(errno.EIO)})")
    with pytest.raises(OSError, match=refuse_disk):
        read(folder)
    assert list(folder.parent.iterdir()) == [folder]


def test_the_table_of_data_sets_says_that_there_are_no_masks():
    assert [name for name, each in DATASETS.items() if not each.masks] == ["clevr"]
    assert DATASETS["clevr"].properties
