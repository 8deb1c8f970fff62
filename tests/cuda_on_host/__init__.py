"""The CUDA backend on a CPU, for machines without a GPU: its kernels and bindings, compiled as they are for the host.

`cuda_runtime.h` beside this file takes the place of CUDA's own, `torch.h` that of torch's functions for CUDA. The
operators are then torch.ops.iio_kernels_on_host, and a backend "cuda_on_host" serves CPU tensors with them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import torch

from iio_kernels.ops.iio_loss import compiled
from iio_kernels.runtime import compilation, libraries
from iio_kernels.runtime.backends import BACKENDS, Backend
from iio_kernels.runtime.compilers import find_compiler
from iio_kernels.runtime.libraries import Edge

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-ffp-contract=off",
         "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # fmt: skip


def build(folder: Path, *flags: str) -> Path:
    """Compile the library, with more flags if wanted."""
    compiler = [*find_compiler(), *FLAGS, *flags]
    kernels = [*compiler, "-I", str(HERE), "-x", "c++"]
    bindings = [*compiler, *libraries.TORCH_HEADERS, "-include", str(HERE / "torch.h")]
    objects = {
        "float.o": ("csrc/iio_loss.cu", [*kernels, "-DIIO_REAL=float"]),
        "double.o": ("csrc/iio_loss.cu", [*kernels, "-DIIO_REAL=double"]),
        "bindings.o": ("csrc/iio_loss_cuda_bindings.cpp", bindings),
    }
    edges = [Edge(name, (file,), (*command, "-c", file, "-o", name)) for name, (file, command) in objects.items()]
    link = (*compiler, "-shared", *objects, *libraries.TORCH_LIBRARIES, "-o", libraries.LINKED)
    compilation.make(folder, libraries.CUDA.sources(), [*edges, Edge(libraries.LINKED, tuple(objects), link)])
    return folder / libraries.LINKED


def load(path: Path) -> None:
    """Define the operators, load their library, and register the backend."""
    name = "iio_kernels.ops.iio_loss.cuda_on_host"
    module = sys.modules[name] = ModuleType(name)
    source = Path(compiled.__file__).read_text()
    assert '"iio_kernels"' in source
    source = source.replace('"iio_kernels"', '"iio_kernels_on_host"')
    exec(compile(source, compiled.__file__, "exec"), module.__dict__)
    torch.ops.load_library(path)
    BACKENDS["cuda_on_host"] = Backend(("cpu",), lambda: None, operations=("iio_loss",))
