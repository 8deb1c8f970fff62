"""Where compiled libraries lie, and how one gets there: built in a folder of its own and renamed.

A kill at any moment leaves either nothing or all of a library. Processes that start together wait for the first of them
by a lock that the operating system drops when its holder dies: it cannot go stale. The name in the cache is three
hashes: of the sources, flags and torch's version, of the compiler, and of the library itself. What does not match is
not found; where there is no compiler, any compiler's serves.

The objects stay in the cache beside the library, for the next build with the same compilers: then only what has changed
is compiled. A build takes their folder away while it lasts, so that no two use it, and a kill costs them alone.

The cache is $IIO_KERNELS_CACHE, or iio_kernels in the user's cache folder. Where a library is not there and cannot be
built there, the next folder serves in its place: iio_kernels in the user's cache folder, and one of the user's own in
the folder for temporary files.

A library runs with all that its user may do. So none is loaded, and no folder is used, that another user than root and
this one has written or could have (`trust` has the rule). A cache is shared on purpose as a folder that root fills and
others read. With IIO_KERNELS_TRUST_CACHE=1 the first folder is used whoever may write there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from iio_kernels.runtime import compilation
from iio_kernels.runtime.build_errors import BuildError, LinkError, say, say_once
from iio_kernels.runtime.compilers import compilers_hash
from iio_kernels.runtime.libraries import LINKED, Library
from iio_kernels.runtime.trust import open_to_others

#: How the folder of a library begins that only its own process can use.
PRIVATE = "iio_kernels-once-"


def built(library: Library) -> Path:
    """The compiled library, built now if the cache does not have it."""
    folders, name = cache_folders(), f"{library.name}-{library.fingerprint()}"
    try:
        compilers = library.compilers()
        name += f"-{compilers_hash(compilers)}"  # behind the last dash: `_objects` reads it there
    except BuildError:
        for folder in folders:
            if path := _cached(folder, name):
                return path
        raise
    refused: list[str] = []
    for folder in folders:
        if path := _cached(folder, name):
            return path
        if _trusted(folder) is None:
            continue
        try:
            _make(folder)
            with exclusive(folder / "lock") as alone:
                if alone:
                    for left in folder.glob("build-*"):  # by a process that was killed
                        shutil.rmtree(left, ignore_errors=True)
                if path := _cached(folder, name):
                    return path
                for damaged in folder.glob(f"{name}-*.so"):
                    damaged.unlink()
                _build(library, compilers, folder, name, refused)
                if path := _cached(folder, name):
                    return path
        except OSError as error:
            refused.append(f"{folder} cannot be used ({error.strerror or error})")
    try:
        with ExitStack() as on_failure:
            private = Path(os.path.realpath(tempfile.mkdtemp(prefix=PRIVATE)))
            on_failure.callback(shutil.rmtree, private, ignore_errors=True)
            if reason := open_to_others(private):
                raise BuildError(f"no folder to build them in is safe from other users: {reason}")
            path = _build(library, compilers, private, name, [*refused, "the next process compiles anew"])
            on_failure.pop_all()
            return path
    except OSError as error:
        raise BuildError(f"no folder to build them in: {error.strerror or error}") from None


def _cached(folder: Path, name: str) -> Path | None:
    """A library of that name that is trusted, in a folder that is, and undamaged: its path without links."""
    if _trusted(folder) is None:
        return None
    for entry in sorted(folder.glob(f"{name}-*.so")):
        with contextlib.suppress(OSError):  # this user may not read it, or another process has removed it
            path = _trusted(entry)
            if path is not None and content_hash(path) in entry.name:
                return path
    return None


def _trusted(path: Path) -> Path | None:
    """The path without links of a cache folder, or of a library in one; None unless it is safe from other users.

    This path is judged, so it is the one to open: a link may lead elsewhere by then. The link itself is judged too.
    Where the user trusts the others, all is safe. Of the first folder, which the user knows, a line says why it is not.
    """
    cache, real = cache_folders()[0], Path(os.path.realpath(path))
    is_first = cache in (path, path.parent)
    if is_first and os.environ.get("IIO_KERNELS_TRUST_CACHE") == "1":
        return real
    reason = open_to_others(path) or open_to_others(real)
    if reason is not None and is_first:
        say_once(
            f"nothing is loaded from {cache}: {reason}. Share a cache by letting root own it and others only read it, "
            f"or trust whoever can write it by IIO_KERNELS_TRUST_CACHE=1"
        )
    return real if reason is None else None


def cache_folders() -> list[Path]:
    """Where compiled libraries may lie, best first."""
    home = _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    folders = [_expanded(os.environ.get("IIO_KERNELS_CACHE")), home and home / "iio_kernels"]
    with contextlib.suppress(OSError):  # there is no folder for temporary files
        user = os.geteuid() if os.name == "posix" else "user"
        folders.append(Path(os.path.realpath(tempfile.gettempdir()), f"iio_kernels-{user}"))
    return list(dict.fromkeys(folder for folder in folders if folder is not None))


def _expanded(folder: str | None) -> Path | None:
    """A folder as an environment variable names it, absolute and without links; None without one, or without a home."""
    folder = os.path.expanduser(folder or "")
    return Path(os.path.realpath(folder)) if folder and not folder.startswith("~") else None


def _make(folder: Path) -> None:
    """Make a folder and what is missing above it, to be written by this user alone whatever the umask."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(mode=0o755, exist_ok=True)


def _build(library: Library, compilers: list[list[str]], folder: Path, name: str, refused: list[str]) -> Path:
    """Compile, into `folder`: the library's path. `refused` tells why not elsewhere."""
    build = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    used = " and ".join(" ".join(compiler) for compiler in compilers)
    reason = f": {'; '.join(refused)}. IIO_KERNELS_CACHE can name another folder" if refused else ""
    say(f"compiling the {library.kernels} with {used}, once, in {library.time}, to {folder}{reason}")
    objects = _objects(folder, name)
    try:
        sources, edges = library.sources(), library.edges(*compilers)
        taken = _take(objects, build)
        try:
            compilation.make(build, sources, edges)
        except LinkError:
            if not taken:
                raise
            # As where a crash has left an object without its content: once more, from nothing.
            shutil.rmtree(build)
            build.mkdir(mode=0o700)
            compilation.make(build, sources, edges)
        except BuildError:
            _keep(build, objects)  # what did compile
            raise
        linked = build / LINKED
        path = folder / f"{name}-{content_hash(linked)}.so"
        linked.chmod(linked.stat().st_mode & ~0o022)  # with a umask of 0 anyone could write it: it would not be loaded
        os.replace(linked, path)
        _keep(build, objects)
        return path
    finally:
        shutil.rmtree(build, ignore_errors=True)


def _objects(folder: Path, name: str) -> Path:
    """Where the objects of a library lie: those of other compilers or headers of torch's, which ninja does not see, lie
    elsewhere."""
    library, _, compilers = name.split("-")
    made_with = hashlib.blake2b(f"{torch.__version__} {compilers}".encode(), digest_size=4).hexdigest()
    return folder / f"objects-{library}-{made_with}"


def _take(objects: Path, build: Path) -> bool:
    """Make an empty folder that of the objects of the last build; False where there is none of this user's."""
    with contextlib.suppress(OSError):
        if os.name == "posix" and objects.stat().st_uid == os.geteuid():
            os.replace(objects, build)
            return True
    return False


def _keep(build: Path, objects: Path) -> None:
    """Leave the objects for the next build, in place of all others of this library."""
    library = objects.name.rpartition("-")[0]
    for others in objects.parent.glob(f"{library}-*"):
        shutil.rmtree(others, ignore_errors=True)
    with contextlib.suppress(OSError):  # another process left its own just now
        os.rename(build, objects)


def content_hash(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


@contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Hold the lock on a file: True. Where files cannot be locked, or its holder never ends, go on without: False."""
    import fcntl

    held = told = False
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except PermissionError:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # another user's: it may be a pipe
    try:
        end = time.monotonic() + compilation.TIMEOUT
        while time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
                break
            except BlockingIOError:
                if not told:
                    say(f"another process compiles to {path.parent}; waiting for it")
                    told = True
                time.sleep(0.05)
            except OSError:
                break
        yield held
    finally:
        os.close(file)
