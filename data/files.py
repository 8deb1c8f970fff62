"""Scenes from the files of Multi-Object Datasets (github.com/deepmind/multi_object_datasets), and from CLEVR's folder.

A file is converted once, to arrays that later runs map into memory. The conversion streams: it holds a few scenes at a
time, however long the file.
"""

import errno
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from . import clevr
from .cache import GrowingArrays, build, folders, open_arrays, stamp
from .properties import COLOURS, MATERIALS, MAX_OBJECTS, NUM_PROPERTIES, SHAPES, SIZES, encode
from .scenes import Scenes, check_indices, progress_bar
from .tfrecord import DataError, byte_feature, float_feature, is_gzip, is_tfrecord, read_examples

__all__ = ["FORMATS", "DataError", "Format", "load"]

VERSION = 2  # of the cache; another one is rebuilt
BLOCK = 512  # scenes converted at a time, fewer where they take more than
BLOCK_BYTES = 1 << 25


@dataclass(frozen=True)
class Format:
    """How one data set stores its scenes, and which part of them is used.

    Attributes:
        image: shape of the record's `image` feature, (H, W, 3) or (H, W, 1).
        mask: shape of its `mask` feature: a trailing 1, and otherwise H, W and the entities.
        entity_axis: which axis of `mask` counts the entities.
        backgrounds: how many of the entities, the first ones, are background: all of them become label 0.
        strays: up to which fraction of a scene's pixels may belong to no entity or to several.
        crop: the first row and column and the side of the square that is cut out; None: all.
        side: the side that it is resized to.
        properties: the properties of objects are there, too, as CLEVR's.
        masks: which pixels are whose is known; always, of these files.
        most: only scenes with at most so many objects are used; None: all.
    """

    image: tuple[int, int, int]
    mask: tuple[int, int, int, int]
    entity_axis: int
    backgrounds: int = 1
    strays: float = 0.01
    crop: tuple[int, int, int] | None = None
    side: int | None = None
    properties: bool = False
    masks: ClassVar[bool] = True
    most: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.image[:2] if self.crop is None else (self.side, self.side)

    @property
    def num_entities(self) -> int:
        objects = self.mask[self.entity_axis] - self.backgrounds
        return 1 + (objects if self.most is None else self.most)

    @property
    def arrays(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """The arrays of converted scenes, by name: type and shape of a scene's row."""
        byte, number = np.dtype(np.uint8), np.dtype(np.float32)
        arrays = {"image": (byte, (3, *self.size)), "labels": (byte, self.size)}
        return arrays | ({"properties": (number, (MAX_OBJECTS, NUM_PROPERTIES))} if self.properties else {})


def _multi_dsprites(channels: int, entities: int) -> Format:
    return Format(image=(64, 64, channels), mask=(64, 64, entities, 1), entity_axis=2)


def _objects_room(entities: int) -> Format:
    # Sky, floor and the two halves of the wall.
    return Format(image=(64, 64, 3), mask=(entities, 64, 64, 1), entity_axis=0, backgrounds=4)


def _clevr(most: int | None) -> Format:
    return Format(
        image=(240, 320, 3),
        mask=(11, 240, 320, 1),
        entity_axis=0,
        crop=(29, 64, 192),
        side=128,
        properties=True,
        most=most,
    )


FORMATS: dict[str, Format | clevr.PictureFolder] = {
    "tetrominoes": Format(image=(35, 35, 3), mask=(4, 35, 35, 1), entity_axis=0, strays=0.0),
    "multi-dsprites": _multi_dsprites(3, 6),
    "multi-dsprites-binarized": _multi_dsprites(1, 4),
    "multi-dsprites-colored": _multi_dsprites(3, 5),
    "objects-room": _objects_room(7),
    "objects-room-six-objects": _objects_room(10),
    "objects-room-empty-room": _objects_room(4),
    "objects-room-identical-color": _objects_room(10),
    "clevr6": _clevr(6),
    "clevr10": _clevr(None),
    "clevr": clevr.CLEVR,
}

# The records of CLEVR with masks hold these features of 11 entities each, the background first.
NUMBERS = ("x", "y", "z", "visibility")  # floats
CODES = {"size": SIZES, "material": MATERIALS, "shape": SHAPES, "color": COLOURS}  # bytes: 0 for none, or 1 and on


def load(
    path: str | os.PathLike,
    *,
    dataset: str = "tetrominoes",
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
    verify: bool = False,
) -> Scenes:
    """The scenes of a file of Multi-Object Datasets, or of the folder of the original CLEVR.

    The first call converts the file and keeps the result in a folder ``<file name>.cache``; later calls open that at
    once. It lies beside the file or, where that place cannot be written, in ``$XDG_CACHE_HOME/iio_kernels``
    (``~/.cache/iio_kernels``), and is rebuilt when the file's size or time changes. It appears whole or not at all:
    processes may load the same file at the same time. One that is interrupted or killed leaves a hidden folder
    ``.<file name>.cache.part``, and the next goes on from there; it may be deleted, and so may ``.<file name>.*.tmp``.

    Args:
        path: a TFRecord file as published, compressed with gzip or not, or an ``.npz`` file with the features as arrays
            of n rows: `image`, uint8 (n, H, W, 3), and `mask`, bool or uint8 in 0 and 255, of the data set's shape with
            or without the trailing 1, entities before or behind H and W as published (read into memory whole). The
            contents decide, not the name. Of "clevr" the folder with `images` and `scenes`.
        dataset: which data set it is, a name in `FORMATS`.
        cache_dir: the folder to keep the converted scenes in instead; made when missing.
        progress: show a progress bar during the conversion, on a terminal.
        verify: compare the converted scenes with their checksums, which reads them all. Their sizes are always checked.

    Returns:
        The scenes in the order of the file. Label 0 is the background: the mask's first entity or, of Objects Room, the
        first four (sky, floor and walls); pixels of no entity are background, too, and pixels of several belong to the
        first of these. Images of one channel have it three times. Pickled, as for the workers of a DataLoader, they are
        but their place: the other process opens the converted scenes again.

        "clevr6" and "clevr10" are CLEVR with masks, the scenes of at most 6 objects and all; both are served from one
        conversion, and follow `ObjectScenes`. Rows 29 to 220 and columns 64 to 255 are resized to 128 x 128 as by the
        code of Slot Attention: images bilinearly between pixel centres without antialiasing (here rounded to bytes),
        labels to the nearest. The file writes factors as numbers from 1 on and does not say which means what. Of sizes
        1 is large, as z shows; material, shape and colour number i is entry i of the one-hot vector. The square cuts
        off what stands at the sides: `properties` has the objects that can be seen in it, those of at least one of its
        pixels by the resized mask. "At most 6 objects" counts all of the scene.

        "clevr" is the original CLEVR, for set prediction: the training scenes and behind them the validation scenes, as
        far as they are there. Whole pictures are resized to 128 x 128 likewise; all labels are 0, since nothing says
        which pixels are whose. The cache is rebuilt when a list of scenes changes in size or time.

    Raises:
        ValueError: no such data set.
        DataError: the file is damaged, of another format or of another data set, or the converted scenes are
            damaged; a `ValueError`.
        OSError: the file cannot be read, or the converted scenes cannot be written.
    """
    if dataset not in FORMATS:
        raise ValueError(f"dataset: expected one of {', '.join(map(repr, FORMATS))}, got {dataset!r}")
    path, form = Path(path), FORMATS[dataset]
    if form is clevr.CLEVR:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "expected the folder of images/ and scenes/, got a file", str(path))
        wanted, convert, scenes = clevr.stamp(path), clevr.convert, _ClevrScenes
    else:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "expected a file, got a folder", str(path))
        status = path.stat()
        # Data sets that differ in `most` alone share what is converted.
        files = {name: each for name, each in FORMATS.items() if isinstance(each, Format)}
        source = min(name for name, each in files.items() if replace(each, most=None) == replace(form, most=None))
        wanted = {"version": VERSION, "dataset": source, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
        convert, scenes = _convert, _StoredObjectScenes if form.properties else _StoredScenes

    caches = folders(path, cache_dir)
    cache = next((cache for cache in caches if stamp(cache) == wanted), None)
    if cache is None:
        cache = build(path, wanted, caches, lambda folder: convert(path, form, folder, wanted, progress))
    return scenes(dataset, cache, wanted, verify)


class _StoredScenes:
    """The scenes of a data set in a folder of arrays: image uint8 (n, 3, H, W) and labels uint8 (n, H, W)."""

    def __init__(self, name: str, cache: Path, wanted: dict, verify: bool = False) -> None:
        self.name = name
        self.size = FORMATS[name].size
        self.num_entities = FORMATS[name].num_entities
        self._arrays = open_arrays(cache, wanted, FORMATS[name].arrays, verify)
        self._rows = np.arange(len(self._arrays["image"]))
        self._opened = name, cache, wanted

    def __reduce__(self) -> tuple[type, tuple]:
        """Pickled, as for a worker of a DataLoader, they are where the arrays lie: another process opens these again.

        It raises a `DataError` if the scenes have been made anew from another file in the meantime.
        """
        return type(self), self._opened

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Copies the scenes out of the file; see `Scenes.batch`."""
        return self._take("image", indices, device), self._take("labels", indices, device)

    def _take(self, name: str, indices: Tensor, device: torch.device | str | None) -> Tensor:
        check_indices(indices, len(self))
        rows = self._rows[indices.numpy(force=True)]
        return torch.from_numpy(self._arrays[name][rows]).to(indices.device if device is None else device)


class _StoredObjectScenes(_StoredScenes):
    """The same with properties, float32 (n, 10, 19); only the scenes with no more objects than the data set has."""

    num_properties = NUM_PROPERTIES

    def __init__(self, *opened: object) -> None:
        super().__init__(*opened)
        self._rows = np.flatnonzero(self._arrays["properties"][..., -1].sum(1) < self.num_entities)

    def properties(self, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Copies the objects out of the file, those that have a pixel in the image; see `ObjectScenes.properties`."""
        objects, labels = self._take("properties", indices, device), self._take("labels", indices, device)
        # Object number m has the label m + 1. As a scene's objects are counted before, all of them stay in the file.
        seen = torch.zeros(len(labels), 256, dtype=torch.bool, device=labels.device)
        seen = seen.scatter_(1, labels.flatten(1).long(), True)[:, 1 : 1 + MAX_OBJECTS]
        first = (~seen).to(torch.uint8).argsort(dim=1, stable=True)  # rows of zeros come last
        return (objects * seen.unsqueeze(2)).take_along_dim(first.unsqueeze(2), 1)


class _ClevrScenes(_StoredScenes):
    """Scenes of the original CLEVR: image uint8 (n, 3, H, W) and properties float32 (n, 10, 19), but no labels."""

    num_properties = NUM_PROPERTIES

    def batch(self, indices: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Copies the images out of the file; all labels are 0; see `Scenes.batch`."""
        image = self._take("image", indices, device)
        return image, torch.zeros_like(image[:, 0])

    def properties(self, indices: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Copies the objects out of the file; see `ObjectScenes.properties`."""
        return self._take("properties", indices, device)


# The conversion


def _convert(path: Path, form: Format, folder: Path, wanted: dict, progress: bool) -> None:
    """Writes the arrays into `folder`, or those that are missing there."""
    # The number of scenes is not known beforehand, so progress is told in bytes of the file.
    with path.open("rb") as file, GrowingArrays(folder, wanted, form.arrays) as arrays:
        size = os.fstat(file.fileno()).st_size
        with progress_bar(progress, total=size, desc=path.name, unit="B", unit_scale=True) as bar:
            for features in _blocks(file, form, arrays.rows):
                image, labels = _images(features["image"], form), _labels(features["mask"], arrays.rows, form)
                arrays.append(image=image, labels=labels, **_properties(features, arrays.rows))
                bar.update(file.tell() - bar.n)
        if not arrays.rows:
            raise DataError("the file holds no scenes")


def _images(image: np.ndarray, form: Format) -> np.ndarray:
    """Images uint8 (m, 3, h, w) of what the file holds, uint8 (m, H, W, 3) or (m, H, W, 1)."""
    image = image.transpose(0, 3, 1, 2)
    if form.crop is not None:
        top, left, side = form.crop
        pixels = torch.from_numpy(image[..., top : top + side, left : left + side].astype(np.float32))
        pixels = interpolate(pixels, size=form.size, mode="bilinear", align_corners=False, antialias=False)
        image = pixels.round().to(torch.uint8).numpy()
    return np.broadcast_to(image, (len(image), 3, *form.size))


def _labels(mask: np.ndarray, first: int, form: Format) -> np.ndarray:
    """Labels uint8 (m, h, w) of masks uint8 (m, K, H, W), which belong to the scenes from `first` on."""
    if form.crop is not None:
        top, left, side = form.crop
        nearest = ((np.arange(form.side) + 0.5) * (side / form.side)).astype(int)
        mask = mask[:, :, top + nearest[:, None], left + nearest]
    one_hot = (mask.max(1) == 255) & (mask.sum(1, dtype=np.uint32) == 255)
    strays = (~one_hot).sum((1, 2))
    if (bad := strays > form.strays * one_hot[0].size).any():
        scene = int(bad.argmax())
        raise DataError(
            f"record {first + scene}: mask: expected 255 for one entity at every pixel and 0 for the others, "
            f"which fails at {strays[scene]} of {one_hot[scene].size} pixels"
        )
    entity = mask.argmax(1)  # of several the first, and of none the background
    return (entity + 1 - form.backgrounds).clip(0).astype(np.uint8)


def _properties(features: dict[str, np.ndarray], first: int) -> dict[str, np.ndarray]:
    """The array `properties`, float32 (m, 10, 19), where the features have them: (m, 11) each."""
    if "visibility" not in features:
        return {}
    features = {name: values[:, 1:] for name, values in features.items() if name not in ("image", "mask")}
    real, codes = features["visibility"] > 0.5, []
    for name, table in CODES.items():
        code = features[name].astype(np.int64) - 1
        wrong = real & ((code < 0) | (code >= len(table)))
        if wrong.any():
            scene = int(wrong.any(1).argmax())
            found = features[name][scene][wrong[scene]][0]
            raise DataError(f"record {first + scene}: {name}: expected 1 to {len(table)} for every object, got {found}")
        codes.append(torch.from_numpy(code))
    codes[0] = len(SIZES) - 1 - codes[0]  # 1 is large: so much shows in z
    coordinates = torch.from_numpy(np.stack([features[name] for name in "xyz"], -1))
    return {"properties": encode(coordinates, *codes, torch.from_numpy(real)).numpy()}


def _blocks(file: BinaryIO, form: Format, skip: int) -> Iterator[dict[str, np.ndarray]]:
    """The scenes of an open file but the first `skip`, some at a time.

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
    """The elements of one feature, uint8 or float32 (prod(shape),)."""
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
    """The arrays of these names in an open .npz file.

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
