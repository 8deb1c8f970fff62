"""The libraries of kernels: which files of csrc they are made of, and with which flags.

A library is edges of a graph, as ninja calls them: commands that make one file of others. They run in a folder that has
a copy of the sources as `csrc`, and name all but the compilers relative to it.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from iio_kernels.runtime.build_errors import BuildError, NoCompiler, one_line
from iio_kernels.runtime.compilers import find_compiler, find_nvcc

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

#: What the last edge makes.
LINKED = "library.so"


@dataclass(frozen=True)
class Edge:
    """One command, and the files it makes one of: a source of csrc (which includes headers), or objects to link."""

    output: str
    inputs: tuple[str, ...]
    command: tuple[str, ...]

    @property
    def compiles(self) -> bool:
        return self.output != LINKED


@dataclass(frozen=True)
class Library:
    """A library of kernels: what the user reads of it, and how it is made."""

    name: str
    kernels: str
    instead: str
    time: str
    #: The files of csrc that it depends on, by their suffixes, and what else it depends on but the compilers.
    suffixes: tuple[str, ...]
    settings: Callable[[], list[str]]
    #: The compilers, and with these the edges, the one that links last.
    compilers: Callable[[], list[list[str]]]
    edges: Callable[..., list[Edge]]

    def sources(self) -> list[Path]:
        """The files of csrc that it depends on."""
        return sorted(path for path in csrc().iterdir() if path.suffix in self.suffixes)

    def fingerprint(self) -> str:
        """A hash of all that it depends on but the compilers."""
        parts = [torch.__version__, platform.machine(), sys.platform, *FLAGS, *self.settings()]
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=8)
        for path in self.sources():
            digest.update(repr((path.name, path.read_bytes())).encode())
        return digest.hexdigest()


def csrc() -> Path:
    """The folder csrc: inside the package where it is installed, beside it in the repository."""
    package = Path(__file__).parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "simd.h").exists():
            return folder
    raise BuildError(f"the sources are not there: {package / 'csrc'} does not exist")


def cpu_edges(compiler: list[str], flags: list[str] = FLAGS) -> list[Edge]:
    """A kernel file is compiled for each instruction set, the bindings to torch once."""
    edges = []
    for source in sorted(csrc().glob("*.cpp")):
        if source.stem.endswith("_cuda_bindings"):
            continue
        if source.stem.endswith("_bindings"):
            targets = {"": TORCH_HEADERS}
        else:
            targets = {name: [f"-DIIO_ISA={name}", *own] for name, own in INSTRUCTION_SETS.items()}
        edges += [_compile(source, name, [*compiler, *flags, *own]) for name, own in targets.items()]
    shared = ["-dynamiclib", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    return [*edges, _link(edges, [*compiler, *flags, *shared], TORCH_LIBRARIES)]


def cuda_edges(compiler: list[str], nvcc: list[str]) -> list[Edge]:
    """A kernel file is compiled for each type of its numbers, the bindings to torch once."""
    host = [f"-ccbin={compiler[0]}"] if len(compiler) == 1 else []  # nvcc takes no arguments for it
    edges = []
    for source in sorted([*csrc().glob("*.cu"), *csrc().glob("*_cuda_bindings.cpp")]):
        if source.suffix == ".cpp":
            targets = {"": [*compiler, *FLAGS, *TORCH_HEADERS]}
        else:
            flags = [*nvcc, *host, *CUDA_FLAGS, *architectures()]
            targets = {real: [*flags, f"-DIIO_REAL={real}"] for real in ("float", "double")}
        edges += [_compile(source, name, command) for name, command in targets.items()]
    return [*edges, _link(edges, [*nvcc, *host, "-shared"], [*TORCH_LIBRARIES, "-ltorch_cuda"])]


def _compile(source: Path, name: str, command: list[str]) -> Edge:
    file, output = f"csrc/{source.name}", f"{source.stem}-{name}.o"
    # The compiler also writes which headers it read: ninja compiles again what includes one that has changed.
    return Edge(output, (file,), (*command, "-MMD", "-MF", f"{output}.d", "-c", file, "-o", output))


def _link(objects: list[Edge], command: list[str], libraries: list[str]) -> Edge:
    outputs = [edge.output for edge in objects]
    return Edge(LINKED, tuple(outputs), (*command, *outputs, *libraries, "-o", LINKED))


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


CPU = Library(
    name="cpu",
    kernels="CPU kernels",
    instead="plain PyTorch serves instead, several times slower",
    time="15 to 90 seconds",
    suffixes=(".cpp", ".h"),
    settings=lambda: [repr(INSTRUCTION_SETS)],
    compilers=lambda: [find_compiler()],
    edges=cpu_edges,
)
CUDA = Library(
    name="cuda",
    kernels="CUDA kernels",
    instead="Triton or plain PyTorch serves instead",
    time="about a minute",
    suffixes=(".cu", ".cpp", ".h"),
    settings=lambda: [*CUDA_FLAGS, *architectures()],
    compilers=lambda: [find_compiler(), find_nvcc()],
    edges=cuda_edges,
)
