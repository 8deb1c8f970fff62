"""Every failure of an .npz file says what is wrong and leaves nothing behind."""

import contextlib
import io
import re
import struct
import zipfile

import numpy as np
import pytest
import torch
from written_files import clevr, generated, npy, refuse, same

from data import (
    DataError,
    formats,
    load,
)


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
    for name in formats.NUMBERS:
        arrays[name] = arrays[name].astype(">f4")
    with path.open("wb") as file:
        np.savez(file, **arrays)
    got = load(path, dataset="clevr10", progress=False).properties(torch.arange(2))
    assert np.allclose(got[0, 0, :3].numpy(), [(scenes[0][name][1] + 3) / 6 for name in "xyz"], atol=1e-6)


def test_no_scenes_in_npz(path):
    with path.open("wb") as file:
        np.savez(file, image=np.zeros((0, 35, 35, 3), np.uint8), mask=np.zeros((0, 4, 35, 35), bool))
    refuse(path, "the file holds no scenes")
