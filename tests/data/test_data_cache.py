"""Files are converted once, and what is converted is checked."""

import errno
import io
import json
import os
import pickle
import pwd
import shutil
import sys

import numpy as np
import pytest
import torch
from written_files import clevr, clevr_record, frame, npy, refuse, same, write

from data import (
    DataError,
    ResidentScenes,
    cache,
    conversion,
    load,
)


def test_converted_once(path, monkeypatch):
    write(path)
    load(path, progress=False)
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, f"{path.name}.cache"]
    monkeypatch.setattr(conversion, "convert", None)
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
    monkeypatch.setattr(conversion, "convert", None)
    assert same(load(path, progress=False), 6)


@pytest.mark.long
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


@pytest.mark.long
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
    convert = conversion.convert

    def overtaken(*arguments):
        monkeypatch.setattr(conversion, "convert", convert)
        load(path, progress=False)
        convert(*arguments)

    monkeypatch.setattr(conversion, "convert", overtaken)
    assert same(load(path, progress=False), 6)
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.parametrize("about", ["[]", "1", "null", "{"])
def test_a_cache_that_says_nothing_is_made_anew(path, about):
    write(path)
    load(path, progress=False)
    (path.parent / f"{path.name}.cache" / "source.json").write_text(about)
    assert same(load(path, progress=False), 6)


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


def test_images_are_read_without_labels(path):
    write(path)
    scenes = load(path, progress=False)
    read, first = scenes.batch(torch.arange(6)), torch.tensor([3, 0])
    scenes._arrays["labels"] = None
    assert torch.equal(scenes.images(first), read[0][first])
    with pytest.raises(IndexError, match=r"indices: expected values in \[0, 6\), got 6 to 6"):
        scenes.images(torch.tensor([6]))


def test_resident_images(path):
    write(path)
    source = load(path, progress=False)
    scenes, some = ResidentScenes(source, "cpu", progress=False), torch.tensor([5, 1])
    assert torch.equal(scenes.images(some), source.images(some))
