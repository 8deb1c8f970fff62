"""Every failure of a file says what is wrong and leaves nothing behind."""

import gzip
import re

import numpy as np
import pytest
from written_files import byte_list, example, field, frame, generated, header, record, refuse, write

from data import (
    load,
)


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


def test_every_single_damaged_byte_is_noticed(path):
    """Any one byte of an uncompressed file changed is an error, never other pixels."""
    data = write(path, 1, compress=False)
    for position in np.random.default_rng(0).integers(0, len(data), 30):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        refuse(path, re.escape(str(path)))
