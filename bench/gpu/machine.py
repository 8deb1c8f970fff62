"""What the machine is, and which backends it has."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from typing import Any

import torch
import triton

import iio_kernels
import iio_kernels.__main__
from bench.gpu.part import DEVICE, elapsed, median_seconds


def said_by(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()


def machine() -> dict[str, Any]:
    """What it is, what runs on it, and the rates that bound every kernel, measured."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": os.environ.get("IIO_KERNELS_COMMIT"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "iio_kernels": iio_kernels.__version__,
        "nvcc": (said_by("nvcc", "--version") or "none").splitlines()[-1],
    }
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2": properties.L2_cache_size,
            "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    size, width = (2**28, 8192) if DEVICE == "cuda" else (2**20, 256)
    source = torch.rand(size, device=DEVICE)
    target = torch.empty_like(source)
    facts["bytes_per_second"] = 2 * source.nbytes / median_seconds(lambda: target.copy_(source))
    for name, dtype, tf32 in (("float32", torch.float32, False), ("tf32", torch.float32, True),
                              ("bfloat16", torch.bfloat16, False)):  # fmt: skip
        a, b = (torch.rand(width, width, device=DEVICE).to(dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        seconds = median_seconds(lambda a=a, b=b: a @ b, repeats=5)
        facts[f"{name}_operations_per_second"] = 2 * width**3 / seconds
    torch.backends.cuda.matmul.allow_tf32 = False
    return facts


def build() -> dict[str, Any]:
    """The backends, after building what is built; on a GPU all are to be there."""
    print(iio_kernels.__main__.report())
    reasons = iio_kernels.backends()
    wanted = ("cpu", "triton", "cuda") if DEVICE == "cuda" else ("cpu", "triton")
    return {"backends": reasons, "seconds": elapsed(), "failed": any(reasons[name] for name in wanted)}
