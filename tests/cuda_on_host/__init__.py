"""The CUDA backend on a CPU, for machines without a GPU: its kernels and bindings, compiled as they are for the host.

`cuda_runtime.h` beside this file takes the place of CUDA's own, `torch.h` that of torch's functions for CUDA. The
operators are then torch.ops.iio_kernels_on_host, and a backend "cuda_on_host" serves CPU tensors with them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from iio_kernels.ops.iio_loss import compiled
from iio_kernels.runtime import build as compilation
from iio_kernels.runtime.backends import BACKENDS, Backend
from iio_kernels.runtime.build import libraries

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-ffp-contract=off",
         "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # fmt: skip


def build(folder: Path, *flags: str) -> Path:
    """Compile the library, with more flags if wanted."""
    compiler, csrc = [*compilation.find_compiler(), *FLAGS, *flags], compilation.sources()
    kernels = [*compiler, "-I", str(HERE), "-x", "c++", "-c", str(csrc / "iio_loss.cu")]
    bindings = [*compiler, *libraries.TORCH_HEADERS, "-include", str(HERE / "torch.h"), "-c"]
    objects = [str(folder / f"{name}.o") for name in ("float", "double", "bindings")]
    compile_all = [
        [*kernels, "-DIIO_REAL=float", "-o", objects[0]],
        [*kernels, "-DIIO_REAL=double", "-o", objects[1]],
        [*bindings, str(csrc / "iio_loss_cuda_bindings.cpp"), "-o", objects[2]],
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(partial(subprocess.run, check=True), compile_all))
    path = folder / "cuda_on_host.so"
    subprocess.run([*compiler, "-shared", *objects, *libraries.TORCH_LIBRARIES, "-o", str(path)], check=True)
    return path


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
