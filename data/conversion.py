"""Converts a file of Multi-Object Datasets to the arrays that later runs map into memory."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from data.blocks import read_blocks
from data.cache import GrowingArrays
from data.errors import DataError
from data.formats import CODES, Format
from data.properties import SIZES, encode
from data.scenes import progress_bar

__all__ = ["convert", "stamp"]

VERSION = 2  # of the cache; another one is rebuilt


def stamp(path: Path, form: Format) -> dict[str, Any]:
    """Tell what the scenes of the file `path` are converted from."""
    status = path.stat()
    return {"version": VERSION, "dataset": form.stored_as, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def convert(path: Path, form: Format, folder: Path, wanted: dict, progress: bool) -> None:
    """Write the arrays of all scenes of the file `path` into `folder`, or those that are missing there.

    Holds a few scenes at a time in memory, however long the file.

    Raises:
        DataError: the file is damaged, of another format or of another data set.
    """
    # The number of scenes is not known beforehand, so progress is told in bytes of the file.
    with path.open("rb") as file, GrowingArrays(folder, wanted, form.arrays) as arrays:
        size = os.fstat(file.fileno()).st_size
        with progress_bar(progress, total=size, desc=path.name, unit="B", unit_scale=True) as bar:
            for features in read_blocks(file, form, arrays.rows):
                image, labels = _images(features["image"], form), _labels(features["mask"], arrays.rows, form)
                arrays.append(image=image, labels=labels, **_properties(features, arrays.rows))
                bar.update(file.tell() - bar.n)
        if not arrays.rows:
            raise DataError("the file holds no scenes")


def _images(image: np.ndarray, form: Format) -> np.ndarray:
    """Cut and resize to images uint8 (m, 3, h, w) what the file holds, uint8 (m, H, W, 3) or (m, H, W, 1)."""
    image = image.transpose(0, 3, 1, 2)
    if form.crop is not None:
        top, left, side = form.crop
        pixels = torch.from_numpy(image[..., top : top + side, left : left + side].astype(np.float32))
        pixels = interpolate(pixels, size=form.size, mode="bilinear", align_corners=False, antialias=False)
        image = pixels.round().to(torch.uint8).numpy()
    return np.broadcast_to(image, (len(image), 3, *form.size))


def _labels(mask: np.ndarray, first: int, form: Format) -> np.ndarray:
    """Find the labels uint8 (m, h, w) of masks uint8 (m, K, H, W), which belong to the scenes from `first` on."""
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
    """Encode the array `properties`, float32 (m, 10, 19), where the features have them: (m, 11) each."""
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
