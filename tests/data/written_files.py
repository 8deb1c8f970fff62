"""Writes files as published, from the formats' descriptions alone, and compares what is read of them."""

import gzip
import io
import struct

import google_crc32c
import numpy as np
import pytest
import torch

from data import (
    DataError,
    TetrominoesGenerator,
    load,
)


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


def bytes_of(array):
    """The `BytesList` of an array of bytes, one a byte, as `byte_list` makes it, in no time."""
    elements = np.empty((array.size, 3), np.uint8)
    elements[:, :2], elements[:, 2] = (0x0A, 1), array.ravel()
    return field(1, elements.tobytes())


def one_hot(labels, entities, axis):
    return np.moveaxis(np.eye(entities, dtype=np.uint8)[labels] * np.uint8(255), -1, axis)


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


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def refuse(path, message, error=DataError, **options):
    """Loading fails with one clear line that names the file, and leaves nothing behind."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(error, match=message) as caught:
        load(path, progress=False, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.parent.iterdir()) == before
