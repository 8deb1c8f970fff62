"""Folders of converted scenes: they appear whole or not at all, and a conversion that was killed goes on.

A folder holds arrays as .npy files and source.json, which says what they were made from, how many rows they have and
their checksums. While it is made it lies inside a hidden folder beside its place.
"""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.errors import DataError

try:
    import fcntl
except ImportError:  # Windows: conversions start from the beginning
    fcntl = None

__all__ = ["GrowingArrays", "build", "folders", "open_arrays", "stamp"]

CHECKED = 1 << 24  # bytes read at a time for a checksum
TRIES = 100  # to lock a folder that others remove meanwhile


def folders(path: Path, cache_dir: str | os.PathLike | None) -> list[Path]:
    """List where the converted scenes of `path` may lie, best first."""
    path = path.resolve()
    # In a folder shared by files from many places, names alone could clash.
    unique = f"{path.name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}.cache"
    if cache_dir is not None:
        return [Path(cache_dir).absolute() / unique]
    beside = path.with_name(f"{path.name}.cache")
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    # "~" stays where there is no home, as for a user id without an entry in passwd.
    return [beside] if home.startswith("~") else [beside, Path(home).absolute() / "iio_kernels" / unique]


def stamp(cache: Path) -> dict | None:
    """Tell what the converted scenes in `cache` were made from; None where there are none."""
    about = _about(cache)
    return about and about.get("stamp")


def open_arrays(
    cache: Path, wanted: dict, rows: dict[str, tuple[np.dtype, tuple[int, ...]]], verify: bool = False
) -> dict[str, np.ndarray]:
    """Map the arrays of a folder into memory, by name.

    Args:
        cache: the folder.
        wanted: what they were made from.
        rows: by name, the type and shape of a row.
        verify: compare them with their checksums, which reads them all.

    Raises:
        DataError: they were made from something else, an array is missing or of another size than it was, source.json
            does not say what it should or, with `verify`, an array fails its checksum.
    """
    about, arrays = _about(cache), {}
    if about is None or about.get("stamp") != wanted:
        raise DataError(f"{cache}: the converted scenes are gone, or were made anew from another file; load them again")
    try:
        if not _is_complete(about, rows):
            raise ValueError("source.json does not say how many there are or lacks a checksum")
        for name, (dtype, shape) in rows.items():
            file = cache / f"{name}.npy"
            array = arrays[name] = np.lib.format.open_memmap(file, mode="r")
            if array.dtype != dtype or array.shape[1:] != shape:
                raise ValueError(f"{file.name} is no array of {dtype} and rows of {shape}")
            if len(array) != about["rows"] or file.stat().st_size != array.offset + array.nbytes:
                raise ValueError(f"{file.name} is not as long as it was")
            if verify and _checksum(file, array.offset) != about["checksums"][name]:
                raise ValueError(f"{file.name} fails its checksum")
    except Exception as error:  # NumPy has no one type of error for what is no array
        raise DataError(f"{cache}: the converted scenes are damaged ({error}); delete this folder") from None
    return arrays


def build(path: Path, wanted: dict, caches: list[Path], convert: Callable[[Path], None]) -> Path:
    """Make the first of `caches` whose place can be written, and say which.

    `convert` fills a folder with arrays by a `GrowingArrays` of the stamp `wanted`. It finds there what an earlier
    process left that was interrupted or killed. One process converts at a time: others wait, and take what it made.
    """
    with contextlib.ExitStack() as stack:
        work, cache = _work_folder(path, caches, stack)
        new, keep = work / "new", False
        try:
            if stamp(cache) == wanted:  # another process was first
                return cache
            new.mkdir(exist_ok=True)
            convert(new)
            _install(new, cache, wanted)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        except OSError as error:
            message = f"cannot convert {path} ({error.strerror or error})"
            raise OSError(error.errno, message, error.filename or str(cache.parent)) from None
        except KeyboardInterrupt:
            keep = _about(new) is not None  # it is written after the first rows
            raise
        finally:
            if not keep:
                # The lock goes last: who makes a new one meets nothing that is still being removed.
                for left in [path for path in work.glob("*") if path.name != "lock"]:
                    shutil.rmtree(left, ignore_errors=True)
                shutil.rmtree(work, ignore_errors=True)
    return cache


class GrowingArrays:
    """Arrays in .npy files of one folder, which grow by the same number of rows.

    Args:
        folder: where they lie. What is there of the same stamp is continued; anything else is overwritten.
        stamp: what the rows are made from.
        rows: by name, the type and shape of a row.

    Attributes:
        rows: how many rows there are.
    """

    def __init__(self, folder: Path, stamp: dict, rows: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> None:
        self._folder, self._stamp, self._types = folder, stamp, rows
        self._files: dict[str, BinaryIO] = {}
        self._checksums = dict.fromkeys(rows, 0)
        self.rows = 0

    def __enter__(self) -> "GrowingArrays":
        about = _about(self._folder)
        is_ours = about is not None and about.get("stamp") == self._stamp and _is_complete(about, self._types)
        if is_ours and all(self._holds(name, about["rows"]) for name in self._types):
            self.rows, self._checksums = about["rows"], about["checksums"]
        with contextlib.ExitStack() as stack:
            for name in self._types:
                file = self._files[name] = stack.enter_context(self._path(name).open("r+b" if self.rows else "wb"))
                file.write(self._header(name))
                if self.rows:
                    file.truncate(file.seek(self._size(name, self.rows)))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._open:
            for name, file in self._files.items():
                file.seek(0)
                file.write(self._header(name))

    def append(self, **rows: np.ndarray) -> None:
        """Add rows to every array and note that they are there."""
        for name, array in rows.items():
            data = np.ascontiguousarray(array).data
            self._files[name].write(data)
            self._files[name].flush()
            self._checksums[name] = zlib.crc32(data, self._checksums[name])
        self.rows += len(array)
        about = {"stamp": self._stamp, "rows": self.rows, "checksums": self._checksums}
        (self._folder / "source.part").write_text(json.dumps(about))
        os.replace(self._folder / "source.part", self._folder / "source.json")

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npy"

    def _holds(self, name: str, rows: int) -> bool:
        return self._path(name).is_file() and self._path(name).stat().st_size >= self._size(name, rows)

    def _size(self, name: str, rows: int) -> int:
        dtype, shape = self._types[name]
        return len(self._header(name)) + rows * dtype.itemsize * prod(shape)

    def _header(self, name: str) -> bytes:
        # NumPy pads the header so that it keeps its length when the number of rows grows.
        dtype, shape = self._types[name]
        descr, header = np.lib.format.dtype_to_descr(dtype), io.BytesIO()
        about = {"descr": descr, "fortran_order": False, "shape": (self.rows, *shape)}
        np.lib.format.write_array_header_1_0(header, about)
        return header.getvalue()


def _about(folder: Path) -> dict | None:
    """Read what source.json of a folder says; None where there is none."""
    try:
        about = json.loads((folder / "source.json").read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return about if isinstance(about, dict) else None


def _is_complete(about: dict, names: Iterable[str]) -> bool:
    """Tell whether source.json says how many rows there are, and the checksum of each of these arrays."""
    rows, checksums = about.get("rows"), about.get("checksums")
    numbers = [rows, *(checksums.get(name) for name in names)] if isinstance(checksums, dict) else [None]
    return all(type(number) is int and number >= 0 for number in numbers)


def _checksum(file: Path, offset: int) -> int:
    checksum = 0
    with file.open("rb") as stream:
        stream.seek(offset)
        while data := stream.read(CHECKED):
            checksum = zlib.crc32(data, checksum)
    return checksum


def _work_folder(path: Path, caches: list[Path], stack: contextlib.ExitStack) -> tuple[Path, Path]:
    """Find a folder beside the first of `caches` whose place can be written, for this process alone, and that one."""
    for cache in caches:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            # The folder that a killed process left, or an empty one; another where nothing says whose it is.
            kept = cache.with_name(f".{cache.name}.part")
            if _lock(kept, stack):
                return kept, cache
            return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=cache.parent)), cache
        except OSError as error:
            refused = error
    message = f"no place to keep the scenes of {path}, pass another cache_dir ({refused.strerror})"
    raise OSError(refused.errno, message, str(caches[-1].parent))


def _lock(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Make `folder` this process's own until `stack` ends, once no other lives that has it; False without locks."""
    if fcntl is None:
        return False
    waits = False
    for _ in range(TRIES):
        folder.mkdir(exist_ok=True)
        with contextlib.ExitStack() as attempt:
            try:
                file = attempt.enter_context((folder / "lock").open("w"))
                fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
                if os.path.samestat(os.fstat(file.fileno()), (folder / "lock").stat()):
                    stack.push(attempt.pop_all())
                    return True
            except BlockingIOError:
                waits = True
                if sys.stderr is not None:  # print would take stdout
                    message = f"{folder}: another process converts these scenes; waiting for it"
                    print(message, file=sys.stderr, flush=True)
            except FileNotFoundError:
                pass  # the other process is done, and has removed it
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
                shutil.rmtree(folder, ignore_errors=True)  # the file system knows no locks
                return False
    return False


def _install(new: Path, cache: Path, wanted: dict) -> None:
    """Rename `new` to `cache`; a stale folder of that name is moved out of the way, beside `new`."""
    for attempt in itertools.count():
        try:
            os.rename(new, cache)
            return
        except OSError:
            if attempt == 10 or not cache.exists():
                raise
        if stamp(cache) == wanted:
            return  # another process converted the same file and was first
        with contextlib.suppress(FileNotFoundError):  # another process moved it
            os.rename(cache, new.with_name(f"stale{attempt}"))
