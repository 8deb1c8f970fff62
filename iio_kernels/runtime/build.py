"""Compiles csrc on first use, caches the result, and loads it: a library for CPUs, and one for NVIDIA GPUs.

A library is built in a folder of its own and renamed into the cache, so that a kill at any moment leaves either
nothing or all of it. Processes that start together wait for the first of them by a lock that the operating system
drops when its holder dies: it cannot go stale. The name in the cache is three hashes: of the sources, flags and torch's
version, of the compiler, and of the library itself. What does not match is not found; where there is no compiler, any
compiler's serves.

The cache is $IIO_KERNELS_CACHE, or iio_kernels in the user's cache folder. Where a library is not there and cannot be
built there, the next folder serves in its place: iio_kernels in the user's cache folder, and one of the user's own in
the folder for temporary files.

A library runs with all that its user may do. So none is loaded, and no folder is used, that another user than root and
this one has written or could have (`trust` has the rule). A cache is shared on purpose as a folder that root fills and
others read. With IIO_KERNELS_TRUST_CACHE=1 the first folder is used whoever may write there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from iio_kernels.runtime.compile import constant_when_compiled
from iio_kernels.runtime.trust import open_to_others

#: Flags for each instruction set that the kernels are compiled for; which one runs is decided at run time.
INSTRUCTION_SETS: dict[str, list[str]] = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma"]
    avx512 = [*avx2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS |= {"avx2": avx2, "avx512": avx512}

#: No fast math, which some compilers take for granted: a NaN has to travel, and an empty mask's sum is compared with 0.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-fast-math", "-fno-math-errno", "-fno-trapping-math",
         "-ffp-contract=fast", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # fmt: skip

#: For nvcc. Quotients may be off by a unit or two in the last place.
CUDA_FLAGS = ["-std=c++17", "-O3", "-prec-div=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "--split-compile=0"]

TORCH = Path(torch.__file__).parent
TORCH_HEADERS = ["-isystem", str(TORCH / "include")]
TORCH_LIBRARIES = ["-L" + str(TORCH / "lib"), "-ltorch", "-ltorch_cpu", "-lc10"]

#: How the folder of a library begins that only its own process can use.
PRIVATE = "iio_kernels-once-"

#: Compilation takes seconds, of CUDA code about a minute; a compiler that has not ended by then never will.
TIMEOUT = 600.0


class BuildError(Exception):
    """The kernels cannot be built or loaded here, for a reason told in one line."""


class NoCompiler(BuildError):
    """There is nothing to build them with, or nothing to build them for."""


@dataclass(frozen=True)
class Library:
    """A library of kernels: what the user reads of it, and how it is made."""

    name: str
    kernels: str
    instead: str
    time: str
    #: The files of csrc that it depends on, by their suffixes, and what else it depends on but the compilers.
    suffixes: tuple[str, ...]
    settings: Callable[[], list]
    #: The compilers, and with these and a folder to build in the commands: those that compile, and the one that links.
    compilers: Callable[[], list[list[str]]]
    commands: Callable[..., tuple[list[list[str]], list[str]]]


#: The libraries that are loaded.
_loaded: dict[str, ctypes.CDLL] = {}


@constant_when_compiled
def missing() -> str | None:
    """None where the compiled CPU kernels are loaded, after building them if need be; otherwise why they are not."""
    error = _load(CPU)
    if error is not None:
        _warn(CPU, str(error))
    return None if error is None else str(error)


@constant_when_compiled
def cuda_missing() -> str | None:
    """The same of the CUDA kernels. No warning where there is no GPU or no nvcc, as on most machines: others serve."""
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if not _has_gpu():
        return "there is no GPU"
    error = _load(CUDA)
    if error is not None and not isinstance(error, NoCompiler):
        _warn(CUDA, str(error))
    return None if error is None else str(error)


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()


@functools.cache
def _load(library: Library) -> BuildError | None:
    path = None
    try:
        path = built(library)
        torch.ops.load_library(path)
        _loaded[library.name] = ctypes.CDLL(str(path))
    except BuildError as error:
        return error
    except OSError as error:
        reason = one_line(f"{error}: {error.__cause__ or ''}")
        return BuildError(f"the compiled kernels cannot be loaded: {reason}")
    finally:
        if path is not None and path.parent.name.startswith(PRIVATE):
            shutil.rmtree(path.parent, ignore_errors=True)  # what is loaded needs no file any more
    if library is CUDA and (trouble := said_by(CUDA, "iio_kernels_cuda_trouble")):
        return BuildError(f"the compiled kernels do not run: {trouble}")
    return None


@functools.cache
def _warn(library: Library, reason: str) -> None:
    warnings.warn(
        f"iio_kernels: the {library.kernels} are not available, and {library.instead}: {reason}. "
        f"`python -m iio_kernels` shows what was found",
        RuntimeWarning,
        stacklevel=2,
    )


def said_by(library: Library, function: str) -> str:
    """What a function of a loaded library returns."""
    call = getattr(_loaded[library.name], function)
    call.restype = ctypes.c_char_p
    return (call() or b"").decode()


def instruction_set() -> str | None:
    """Which of `INSTRUCTION_SETS` runs on this machine, as the library itself decides; None if it is not loaded."""
    return None if missing() else said_by(CPU, "iio_kernels_instruction_set")


def built(library: Library) -> Path:
    """The compiled library, built now if the cache does not have it."""
    folders, name = cache_folders(), f"{library.name}-{fingerprint(library)}"
    try:
        compilers = library.compilers()
        name += f"-{compilers_hash(compilers)}"
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
        _say_once(
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


def sources() -> Path:
    """The folder csrc: inside the package where it is installed, beside it in the repository."""
    here = Path(__file__).parents[1]
    for folder in (here / "csrc", here.parent / "csrc"):
        if (folder / "simd.h").exists():
            return folder
    raise BuildError(f"the sources are not there: {here / 'csrc'} does not exist")


def find_compiler() -> list[str]:
    """The C++ compiler, with arguments if it has any: $CXX, or the first of c++, g++ and clang++."""
    if os.name == "nt":
        raise NoCompiler("they are built on Linux and macOS only")
    asked = os.environ.get("CXX", "").strip()
    try:
        candidates = ([asked], shlex.split(asked)) if asked else (["c++"], ["g++"], ["clang++"])
    except ValueError as error:
        raise NoCompiler(f"CXX is {asked!r}, which is not a command: {error}") from None
    for command in candidates:
        if path := shutil.which(os.path.expanduser(command[0])):
            return [path, *command[1:]]
    if asked:
        raise NoCompiler(f"CXX names {asked!r}, which is not a program that can be run")
    how = "`xcode-select --install`" if sys.platform == "darwin" else "`apt install g++` or your system's like of it"
    raise NoCompiler(f"there is no C++ compiler: install one with {how}, or name it in CXX")


def find_nvcc() -> list[str]:
    """CUDA's compiler: in $CUDA_HOME, on the PATH, or where CUDA puts it."""
    home = os.path.expanduser(os.environ.get("CUDA_HOME", ""))
    for folders in (home and os.path.join(home, "bin"), os.environ.get("PATH"), "/usr/local/cuda/bin"):
        if folders and (path := shutil.which("nvcc", path=folders)):
            return [path]
    raise NoCompiler("there is no nvcc: install the CUDA toolkit, or name its folder in CUDA_HOME")


def compiler_version(compiler: list[str]) -> str:
    """The line that tells the version in what the compiler says of itself."""
    try:
        done = _run([*compiler, "--version"], timeout=60)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"the compiler {' '.join(compiler)} does not run: {one_line(str(error))}") from None
    if done.returncode != 0:
        raise BuildError(f"the compiler {' '.join(compiler)} does not run: {one_line(done.stderr)}")
    lines = done.stdout.splitlines() or [""]
    return next((line for line in lines if "release" in line), lines[0])  # nvcc's own; elsewhere the first


def compilers_hash(compilers: list[list[str]]) -> str:
    parts = [(compiler, compiler_version(compiler)) for compiler in compilers]
    return hashlib.blake2b(repr(parts).encode(), digest_size=4).hexdigest()


def content_hash(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def fingerprint(library: Library) -> str:
    """A hash of all that a library depends on but the compilers."""
    parts = [torch.__version__, platform.machine(), sys.platform, *FLAGS, *library.settings()]
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8)
    for path in sorted(sources().iterdir()):
        if path.suffix in library.suffixes:
            digest.update(repr((path.name, path.read_bytes())).encode())
    return digest.hexdigest()


def commands(compiler: list[str], build: Path, flags: list[str] = FLAGS) -> tuple[list[list[str]], list[str]]:
    """The commands that compile each file for CPUs, and the one that links them to `build`/library.so.

    A kernel file is compiled for each instruction set, the bindings to torch once.
    """
    compile_all, objects = [], []
    for source in sorted(sources().glob("*.cpp")):
        if source.stem.endswith("_cuda_bindings"):
            continue
        if source.stem.endswith("_bindings"):
            targets = {"": TORCH_HEADERS}
        else:
            targets = {name: [f"-DIIO_ISA={name}", *flags_] for name, flags_ in INSTRUCTION_SETS.items()}
        for name, more in targets.items():
            objects.append(str(build / f"{source.stem}-{name}.o"))
            compile_all.append([*compiler, *flags, *more, "-c", str(source), "-o", objects[-1]])
    shared = ["-dynamiclib", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    return compile_all, [*compiler, *flags, *shared, *objects, *TORCH_LIBRARIES, "-o", str(build / "library.so")]


def cuda_commands(compiler: list[str], nvcc: list[str], build: Path) -> tuple[list[list[str]], list[str]]:
    """The commands that compile each file for GPUs, and the one that links them to `build`/library.so.

    A kernel file is compiled for each type of its numbers, the bindings to torch once.
    """
    host = [f"-ccbin={compiler[0]}"] if len(compiler) == 1 else []  # nvcc takes no arguments for it
    compile_all, objects = [], []
    for source in sorted([*sources().glob("*.cu"), *sources().glob("*_cuda_bindings.cpp")]):
        if source.suffix == ".cpp":
            targets = {"": [*compiler, *FLAGS, *TORCH_HEADERS]}
        else:
            flags = [*nvcc, *host, *CUDA_FLAGS, *architectures()]
            targets = {real: [*flags, f"-DIIO_REAL={real}"] for real in ("float", "double")}
        for name, command in targets.items():
            objects.append(str(build / f"{source.stem}-{name}.o"))
            compile_all.append([*command, "-c", str(source), "-o", objects[-1]])
    libraries = [*TORCH_LIBRARIES, "-ltorch_cuda"]
    return compile_all, [*nvcc, *host, "-shared", *objects, *libraries, "-o", str(build / "library.so")]


def architectures() -> list[str]:
    """Flags of nvcc that ask for code for this machine's GPUs."""
    try:
        capabilities = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
    except RuntimeError as error:
        raise BuildError(f"CUDA does not start: {one_line(str(error))}") from None
    if min(capabilities) < (8, 0):
        raise NoCompiler("they need GPUs of compute capability 8.0 or more")
    names = [f"{major}{minor}" for major, minor in sorted(capabilities)]
    return [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]


def _build(library: Library, compilers: list[list[str]], folder: Path, name: str, refused: list[str]) -> Path:
    """Compile, into `folder`: the library's path. `refused` tells why not elsewhere."""
    build = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    used = " and ".join(" ".join(compiler) for compiler in compilers)
    reason = f": {'; '.join(refused)}. IIO_KERNELS_CACHE can name another folder" if refused else ""
    say(f"compiling the {library.kernels} with {used}, once, in {library.time}, to {folder}{reason}")
    try:
        compile_all, link = library.commands(*compilers, build)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_call, compile_all))
        _call(link)
        linked, path = build / "library.so", folder / f"{name}-{content_hash(build / 'library.so')}.so"
        linked.chmod(linked.stat().st_mode & ~0o022)  # with a umask of 0 anyone could write it: it would not be loaded
        os.replace(linked, path)
        return path
    finally:
        shutil.rmtree(build, ignore_errors=True)


def _run(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a compiler. What it says need not be UTF-8: it may quote any file."""
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout
        )
    except OSError as error:
        raise BuildError(f"the compiler {command[0]} does not run: {one_line(str(error))}") from None


def _call(command: list[str]) -> None:
    try:
        done = _run(command, TIMEOUT)
    except subprocess.TimeoutExpired:
        raise BuildError(f"the compiler {command[0]} did not end within {TIMEOUT:.0f} s") from None
    if done.returncode != 0:
        if "No space left on device" in done.stderr:
            raise OSError(errno.ENOSPC, "No space left on device")
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise BuildError(f"the compiler {command[0]} failed: {one_line(errors[0]) if errors else 'it says nothing'}")


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
        end = time.monotonic() + TIMEOUT
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


def say(text: str) -> None:
    """A line on stderr, if anyone hears it: it may be closed."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(f"iio_kernels: {text}\n")
        sys.stderr.flush()


_say_once = functools.cache(say)


def one_line(text: str) -> str:
    return " ".join(text.split())[:300]


CPU = Library(
    name="cpu",
    kernels="CPU kernels",
    instead="plain PyTorch serves instead, several times slower",
    time="15 to 90 seconds",
    suffixes=(".cpp", ".h"),
    settings=lambda: [repr(INSTRUCTION_SETS)],
    compilers=lambda: [find_compiler()],
    commands=commands,
)
CUDA = Library(
    name="cuda",
    kernels="CUDA kernels",
    instead="Triton or plain PyTorch serves instead",
    time="about a minute",
    suffixes=(".cu", ".cpp", ".h"),
    settings=lambda: [*CUDA_FLAGS, *architectures()],
    compilers=lambda: [find_compiler(), find_nvcc()],
    commands=cuda_commands,
)
