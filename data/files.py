"""Opens the scenes of a file, which the first call converts to arrays that later calls map into memory."""

import errno
import os
from pathlib import Path

from data import conversion
from data.cache import build, folders, stamp
from data.datasets import DATASETS, clevr
from data.formats import PictureFolder
from data.scenes import Scenes
from data.stored import StoredObjectScenes, StoredScenes, UnlabeledStoredScenes

__all__ = ["load"]


def load(
    path: str | os.PathLike,
    *,
    dataset: str = "tetrominoes",
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
    verify: bool = False,
) -> Scenes:
    """Open the scenes of a file of Multi-Object Datasets, or of the folder of the original CLEVR.

    The first call converts the file and keeps the result in a folder `<file name>.cache`; later calls open that at
    once. It lies beside the file or, where that place cannot be written, in `$XDG_CACHE_HOME/iio_kernels`
    (`~/.cache/iio_kernels`), and is rebuilt when the file's size or time changes. It appears whole or not at all:
    processes may load the same file at the same time. One that is interrupted or killed leaves a hidden folder
    `.<file name>.cache.part`, and the next goes on from there; it may be deleted, and so may `.<file name>.*.tmp`.

    Args:
        path: a TFRecord file as published, compressed with gzip or not, or an `.npz` file with the features as arrays
            of n rows: `image`, uint8 (n, H, W, 3), and `mask`, bool or uint8 in 0 and 255, of the data set's shape with
            or without the trailing 1, entities before or behind H and W as published (read into memory whole). The
            contents decide, not the name. Of "clevr" the folder with `images` and `scenes`.
        dataset: which data set it is, a name in `DATASETS` whose entry has a `file`.
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
        1 is large, as z shows; material, shape and color number i is entry i of the one-hot vector. The square cuts
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
    forms = {name: entry.file for name, entry in DATASETS.items() if entry.file is not None}
    if dataset not in forms:
        raise ValueError(f"dataset: expected one of {', '.join(map(repr, forms))}, got {dataset!r}")
    path, form = Path(path), forms[dataset]
    if isinstance(form, PictureFolder):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "expected the folder of images/ and scenes/, got a file", str(path))
        wanted, convert, scenes = clevr.stamp(path), clevr.convert, UnlabeledStoredScenes
    else:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "expected a file, got a folder", str(path))
        wanted, convert = conversion.stamp(path, form), conversion.convert
        scenes = StoredObjectScenes if form.properties else StoredScenes

    caches = folders(path, cache_dir)
    cache = next((cache for cache in caches if stamp(cache) == wanted), None)
    if cache is None:
        cache = build(path, wanted, caches, lambda folder: convert(path, form, folder, wanted, progress))
    return scenes(dataset, form, cache, wanted, verify)
