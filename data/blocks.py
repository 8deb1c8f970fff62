"""Reads the features of scenes from a TFRecord or .npz file, some scenes at a time."""

import errno
import itertools
from collections.abc import Iterator
from math import prod
from typing import BinaryIO

import numpy as np

from data.errors import DataError
from data.formats import CODES, NUMBERS, Format
from data.tfrecord import byte_feature, float_feature, is_gzip, is_tfrecord, read_examples

__all__ = ["read_blocks"]

BLOCK = 512  # scenes read at a time, fewer where they take more than
BLOCK_BYTES = 1 << 25


def read_blocks(file: BinaryIO, form: Format, skip: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the scenes of an open file but the first `skip`, some at a time.

    Yields:
        image uint8 (m, H, W, C) and mask uint8 (m, K, H, W); where the format has properties the features for them,
        too, float32 or uint8 (m, 11).
    """
    head = file.read(12)
    file.seek(0)
    if head.startswith(b"PK"):
        return _npz_blocks(file, form, skip)
    if is_gzip(head) or is_tfrecord(head):
        return _tfrecord_blocks(file, form, skip, is_gzip(head))
    found = f"begins with {head!r}" if head else "is empty"
    raise DataError(f"expected a TFRecord file (compressed with gzip or not) or an .npz file; this one {found}")


def _block_rows(form: Format) -> int:
    return max(1, min(BLOCK, BLOCK_BYTES // (prod(form.image) + prod(form.mask))))


def _tfrecord_blocks(file: BinaryIO, form: Format, skip: int, compressed: bool) -> Iterator[dict[str, np.ndarray]]:
    shapes = {"image": form.image, "mask": form.mask}
    if form.properties:
        shapes |= dict.fromkeys((*NUMBERS, *CODES), (form.mask[form.entity_axis],))
    size = _block_rows(form)
    block = {name: np.empty((size, prod(shape)), _dtype(name)) for name, shape in shapes.items()}
    examples = read_examples(file, compressed=compressed, skip=skip)
    for number in itertools.count():
        row = number % size
        try:
            example = next(examples, None)
            if example is not None:
                for name, shape in shapes.items():
                    block[name][row] = _feature(example, name, shape)
        except DataError as error:
            raise DataError(f"record {skip + number}: {error}") from None
        rows = row if example is None else row + 1
        if rows and (example is None or rows == size):
            features = {name: values[:rows].reshape(rows, *shapes[name]) for name, values in block.items()}
            features["mask"] = np.moveaxis(features["mask"].squeeze(-1), 1 + form.entity_axis, 1)
            yield features
        if example is None:
            return


def _dtype(name: str) -> type:
    return np.float32 if name in NUMBERS else np.uint8


def _feature(example: dict[str, bytes], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read the elements of one feature, uint8 or float32 (prod(shape),)."""
    if name not in example:
        raise DataError(f"expected a feature {name!r}, got {sorted(example)}")
    try:
        values = float_feature(example[name]) if name in NUMBERS else byte_feature(example[name])
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    if len(values) != prod(shape):
        unit = "floats" if name in NUMBERS else "bytes"
        raise DataError(f"{name}: expected {prod(shape)} {unit}, {_shape(shape)}, got {len(values)}: another data set?")
    return values


def _npz_blocks(file: BinaryIO, form: Format, skip: int) -> Iterator[dict[str, np.ndarray]]:
    names = ("image", "mask", *((*NUMBERS, *CODES) if form.properties else ()))
    arrays = dict(zip(names, _npz_arrays(file, names), strict=True))
    mask = arrays["mask"]
    if mask.ndim == 5 and mask.shape[-1] == 1:
        mask = arrays["mask"] = mask.squeeze(-1)
    for name, array in arrays.items():
        entities = (form.mask[form.entity_axis],)
        shape = {"image": form.image, "mask": form.mask[:-1]}.get(name, entities)
        if array.shape[1:] != shape or array.ndim != 1 + len(shape):
            raise DataError(f"{name}: expected shape n x {_shape(shape)}, got {_shape(array.shape)}")
        if len(array) != (count := len(arrays["image"])):
            raise DataError(f"image and {name}: expected as many of one as of the other, got {count} and {len(array)}")
        types = ("uint8", "bool") if name == "mask" else (np.dtype(_dtype(name)).name,)
        if array.dtype.name not in types:
            raise DataError(f"{name}: expected {' or '.join(types)}, got {array.dtype}")
        arrays[name] = array.astype(array.dtype.newbyteorder("="), copy=False)
    size = _block_rows(form)
    for start in range(skip, len(mask), size):
        features = {name: array[start : start + size] for name, array in arrays.items()}
        block = np.moveaxis(features["mask"], 1 + form.entity_axis, 1)
        features["mask"] = block * np.uint8(255) if block.dtype == np.bool_ else block
        yield features


def _npz_arrays(file: BinaryIO, names: tuple[str, ...]) -> list[np.ndarray]:
    """Read the arrays of these names from an open .npz file.

    Raises:
        DataError: one is missing or is no array, or the file is damaged.
        OSError: it cannot be read.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            if not set(names) <= set(archive.files):
                expected = " and ".join(map(repr, names))
                raise DataError(f"expected the arrays {expected}, got {archive.files}")
            arrays = []
            for name in names:
                array = archive[name]
                if not isinstance(array, np.ndarray):
                    raise DataError(f"{name}: expected an array, got a member of the archive that is none")
                arrays.append(array)
            return arrays
    except DataError:
        raise
    # A header may ask for terabytes, and a member for a compression or encryption that no one knows: zipfile, its
    # decompressors and NumPy raise a dozen types of errors. Among them are OSErrors, without a number or, where a
    # member would lie before the file, with that of an invalid argument.
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        what = "is damaged or does not fit into memory" if isinstance(error, MemoryError) else "is damaged"
        raise DataError(f"the .npz file {what} ({' '.join(str(error).split())})") from None


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
