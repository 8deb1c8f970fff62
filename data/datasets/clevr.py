"""The original CLEVR (Johnson et al., 2017): whole pictures, and what each object in them is.

A folder as published holds two splits whose scenes are known; the third one has pictures alone, and is not read:

    images/train/CLEVR_train_000000.png  and on: 480 pixels wide and 320 high
    images/val/CLEVR_val_000000.png      and on
    scenes/CLEVR_train_scenes.json       {"info": ..., "scenes": [scene, ...]}
    scenes/CLEVR_val_scenes.json         likewise

A scene names its picture as `image_filename` and lists `objects`, each with `3d_coords`, `size`, `material`, `shape`
and `color`. Nothing says which pixels are whose.
"""

import errno
import itertools
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from tqdm import tqdm

from data.cache import GrowingArrays
from data.dataset import Dataset
from data.errors import DataError
from data.formats import PictureFolder
from data.properties import COLORS, MATERIALS, MAX_OBJECTS, SHAPES, SIZES, encode
from data.scenes import progress_bar

__all__ = ["ENTRIES", "convert", "stamp"]

VERSION = 1  # of the cache; another one is rebuilt
SPLITS = ("train", "val")
WIDTH, HEIGHT = 480, 320  # of a picture, in pixels
BLOCK = 64  # scenes converted at a time

ENTRIES = (
    Dataset(
        "clevr",
        citation='Johnson et al., "CLEVR: A Diagnostic Dataset for Compositional Language and Elementary Visual '
        'Reasoning", 2017',
        origin="cs.stanford.edu/people/jcjohns/clevr, CLEVR v1.0",
        file=PictureFolder(),
    ),
)

KINDS = {"size": SIZES, "material": MATERIALS, "shape": SHAPES, "color": COLORS}


def stamp(folder: Path) -> dict[str, Any]:
    """Tell what the scenes of a folder are converted from.

    Raises:
        FileNotFoundError: no split has a list of its scenes there.
    """
    files = scene_files(folder)
    if not files:
        message = "expected scenes/CLEVR_train_scenes.json or scenes/CLEVR_val_scenes.json, and images/, there"
        raise FileNotFoundError(errno.ENOENT, message, str(folder))
    about = {split: file.stat() for split, file in files.items()}
    return {
        "version": VERSION,
        "dataset": "clevr",
        "scenes": {split: [status.st_size, status.st_mtime_ns] for split, status in about.items()},
    }


def scene_files(folder: Path) -> dict[str, Path]:
    """Find the lists of scenes that are there, by split, the training scenes first."""
    files = {split: folder / "scenes" / f"CLEVR_{split}_scenes.json" for split in SPLITS}
    return {split: file for split, file in files.items() if file.exists()}


def convert(folder: Path, form: PictureFolder, work: Path, wanted: dict, progress: bool) -> None:
    """Write the arrays of all scenes into the folder `work`, or those that are missing there."""
    files = scene_files(folder)
    total = sum(file.stat().st_size for file in files.values())
    # The number of scenes is not known beforehand, so progress is told in bytes of their lists.
    bar = progress_bar(progress, total=total, desc=folder.name, unit="B", unit_scale=True)
    with bar, GrowingArrays(work, wanted, form.arrays) as arrays:
        scenes = itertools.islice(read_scenes(folder, files, bar), arrays.rows, None)
        while block := list(itertools.islice(scenes, BLOCK)):
            image = np.stack([read_picture(folder, picture, form.size) for picture, _ in block])
            arrays.append(image=image, properties=np.stack([objects for _, objects in block]))
        if not arrays.rows:
            raise DataError("the lists of scenes are empty")


def read_scenes(folder: Path, files: dict[str, Path], bar: tqdm) -> Iterator[tuple[Path, np.ndarray]]:
    """Yield each scene's picture, a path within the folder, and objects, float32 (10, 19): one scene is in memory."""
    for split, path in files.items():
        name = path.relative_to(folder)
        with path.open("rb") as file:
            before = bar.n
            for number, scene in enumerate(read_list(name, file)):
                try:
                    yield picture_of(scene, split), objects_of(scene)
                except DataError as error:
                    raise DataError(f"{name}: scene {number}: {error}") from None
                bar.update(before + file.tell() - bar.n)


def read_list(name: Path, file: BinaryIO) -> Iterator[Any]:
    """Yield the members of "scenes" of an open file, as they are parsed."""
    import ijson  # no other data set needs it

    try:
        yield from ijson.items(file, "scenes.item", use_float=True)
    except (ijson.JSONError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: cut off, or no JSON ({reason})") from None


def picture_of(scene: Any, split: str) -> Path:
    """Tell where a scene's picture lies in the folder."""
    name = field(scene, "image_filename")
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".png") or "\0" in name:
        raise DataError(f"image_filename: expected the name of a .png picture, got {name!r}")
    return Path("images", split, name)


def objects_of(scene: Any) -> np.ndarray:
    """Encode a scene's objects, float32 (10, 19)."""
    objects = field(scene, "objects")
    if not isinstance(objects, list) or len(objects) > MAX_OBJECTS:
        found = f"{len(objects)} of them" if isinstance(objects, list) else repr(objects)
        raise DataError(f"objects: expected a list of at most {MAX_OBJECTS}, got {found}")
    places = torch.zeros(MAX_OBJECTS, 3)
    kinds = {name: torch.zeros(MAX_OBJECTS, dtype=torch.int64) for name in KINDS}
    for number, thing in enumerate(objects):
        try:
            places[number] = torch.tensor(place_of(thing))
            for name, table in KINDS.items():
                kind = field(thing, name)
                if kind not in table:
                    raise DataError(f"{name}: expected one of {', '.join(table)}, got {kind!r}")
                kinds[name][number] = table.index(kind)
        except DataError as error:
            raise DataError(f"object {number}: {error}") from None
    return encode(places, *kinds.values(), torch.arange(MAX_OBJECTS) < len(objects)).numpy()


def place_of(thing: Any) -> list[float]:
    place = field(thing, "3d_coords")
    numbers = place if isinstance(place, list) else []
    if len(numbers) != 3 or any(type(x) not in (int, float) or not math.fabs(x) <= 3 for x in numbers):
        raise DataError(f"3d_coords: expected three numbers in [-3, 3], got {place!r}")
    return numbers


def field(record: Any, name: str) -> Any:
    if not isinstance(record, dict) or name not in record:
        found = sorted(record) if isinstance(record, dict) else repr(record)
        raise DataError(f"expected {name!r}, got {found}")
    return record[name]


def read_picture(folder: Path, name: Path, size: tuple[int, int]) -> np.ndarray:
    """Read a picture, resized to `size` without regard to its shape: uint8 (3, *size).

    As in the program of Slot Attention: bilinearly between pixel centres, without antialiasing. Here rounded to bytes.
    """
    try:
        with (folder / name).open("rb") as file:
            head = file.read(24)
            if not head.startswith(b"\x89PNG\r\n\x1a\n") or len(head) < 24:
                raise DataError(f"{name}: expected a PNG picture, got another file")
            # Before anything is decoded: a few bytes can ask for any amount of memory.
            if (found := struct.unpack(">II", head[16:])) != (WIDTH, HEIGHT):
                raise DataError(f"{name}: expected {WIDTH} x {HEIGHT} pixels, got {found[0]} x {found[1]}")
            file.seek(0)
            Image.open(file, formats=["PNG"]).verify()  # decoding alone passes over checksums
            file.seek(0)
            picture = Image.open(file, formats=["PNG"])
            if picture.mode not in ("RGB", "RGBA"):
                raise DataError(f"{name}: expected red, green and blue, got the mode {picture.mode}")
            pixels = np.asarray(picture.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"{name} is missing") from None
    except (OSError, SyntaxError) as error:  # Pillow's own are OSErrors without a number, or SyntaxErrors
        if getattr(error, "errno", None) is not None:
            raise
        raise DataError(f"{name}: the picture is damaged ({error})") from None
    resized = interpolate(
        torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None],
        size=size, mode="bilinear", align_corners=False, antialias=False,
    )  # fmt: skip
    return resized[0].round().to(torch.uint8).numpy()
