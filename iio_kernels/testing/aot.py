"""Compiles Triton kernels for GPUs that are not here, and says what each would take of one.

Nothing is said twice: an operation is called as on a GPU, but with tensors on the meta device, and each kernel that it
launches is compiled for the `Architecture` instead, for exactly the arguments and options of that launch.

    python -m iio_kernels.testing.aot            # every operation's `LAUNCHES`: a few minutes on two cores
    python -m iio_kernels.testing.aot "SAVi"     # those with this in their names
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iio_kernels import testing
from iio_kernels.runtime.backends import OPERATIONS


@dataclass(frozen=True)
class Architecture:
    """A kind of GPU: how Triton names it, and what a multiprocessor has to share among thread blocks."""

    name: str
    target: tuple[str, int | str, int]  # backend, architecture, threads in a warp
    registers: int  # 32 bits wide
    shared: int  # bytes of shared memory
    shared_by_one: int  # the most that one thread block may have of it
    warps: int
    blocks: int


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("sm_80", ("cuda", 80, 32), 65536, 164 << 10, 163 << 10, 64, 32),
        Architecture("sm_90", ("cuda", 90, 32), 65536, 228 << 10, 227 << 10, 64, 32),
        Architecture("sm_100", ("cuda", 100, 32), 65536, 228 << 10, 227 << 10, 64, 32),
        Architecture("gfx942", ("hip", "gfx942", 64), 4 * 512 * 64, 64 << 10, 64 << 10, 32, 32),
    )
}


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one of a call's launches."""

    call: str
    kernel: str
    architecture: str
    warps: int
    registers: int  # of a thread
    spilled: int  # bytes of local memory (NVIDIA) or registers (AMD) of a thread, because it has too few registers
    shared: int  # bytes of shared memory
    blocks: int  # thread blocks that a multiprocessor holds at a time
    occupancy: float  # warps that it then holds, of those it could
    tensor_cores: tuple[str, ...]  # which of the instructions mma, wgmma, tcgen05 and mfma there are

    def __str__(self) -> str:
        return (
            f"{self.architecture:7} {self.call:56} {self.kernel.strip('_'):20} {self.warps:2} warps "
            f"{self.registers:3} registers {self.spilled:3} spilled {self.shared:6} B shared {self.blocks:2} blocks "
            f"{self.occupancy:4.0%} {' '.join(self.tensor_cores)}"
        )


def all_calls() -> list[tuple[str, str]]:
    """The operation and the name of every call."""
    return [(operation, name) for operation in OPERATIONS for name in testing.launches(operation)]


def on_meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without numbers."""
    return torch.empty(shape, dtype=dtype, device="meta")


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """What numbers stored in `dtype` are added up in."""
    return torch.promote_types(dtype, torch.float32)


def compile_calls(calls: Sequence[tuple[str, str]], architectures: list[str]) -> list[Compiled]:
    """What calls, each an operation and a name, launch on all of these architectures, in as many processes as cores.

    The processes are new ones in which Triton compiles, whether or not it interprets in this one.
    """
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            jobs = [(*call, architecture) for architecture in architectures for call in calls]
            return [compiled for launches in pool.map(_compile_call, *zip(*jobs, strict=True)) for compiled in launches]
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def _compile_call(operation: str, name: str, architecture: str) -> list[Compiled]:
    chosen = ARCHITECTURES[architecture]
    with _compiling_for(chosen) as kernels:
        testing.launches(operation)[name]()
    return [_examine(f"{operation}, {name}", kernel, chosen) for kernel in kernels]


@contextmanager
def _compiling_for(architecture: Architecture) -> Iterator[list[Any]]:
    """Within it a launch compiles a kernel for this architecture and adds it to the list."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        get_current_device = staticmethod(lambda: architecture.name)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget(*architecture.target))

    kernels: list[Any] = []

    def run(self: Any, *args: Any, warmup: bool, **options: Any) -> None:
        kernels.append(run_here(self, *args, warmup=True, **options))

    run_here: Callable[..., Any] = JITFunction.run
    hip = torch.version.hip
    JITFunction.run = run
    torch.version.hip = architecture.name if architecture.target[0] == "hip" else None
    driver.set_active(Driver())
    try:
        yield kernels
    finally:
        JITFunction.run, torch.version.hip = run_here, hip


def _examine(call: str, kernel: Any, architecture: Architecture) -> Compiled:
    warps, threads, shared = kernel.metadata.num_warps, architecture.target[2], kernel.metadata.shared
    if architecture.target[0] == "cuda":
        usage = _cuobjdump(kernel.asm["cubin"])
        registers, spilled = int(usage["REG"]), int(usage["STACK"])
        allocated = 8 * -(-registers // 8)
        instructions = {"mma": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma", "tcgen05": r"\btcgen05\.mma"}
        text, reserved = kernel.asm["ptx"], 1024
    else:
        text, reserved = kernel.asm["amdgcn"], 0
        counts = dict(re.findall(r"\.(vgpr|vgpr_spill)_count: +(\d+)", text)[::-1])  # the first of each name
        registers, spilled = int(counts["vgpr"]), int(counts["vgpr_spill"])
        allocated = 8 * -(-registers // 8)
        instructions = {"mfma": r"\bv_mfma"}
    blocks = min(
        architecture.registers // (allocated * warps * threads),
        architecture.shared // (shared + reserved) if shared + reserved else architecture.warps,
        architecture.warps // warps,
        architecture.blocks,
    )
    return Compiled(
        call=call,
        kernel=kernel.metadata.name,
        architecture=architecture.name,
        warps=warps,
        registers=registers,
        spilled=spilled,
        shared=shared,
        blocks=blocks,
        occupancy=blocks * warps / architecture.warps,
        tensor_cores=tuple(name for name, pattern in instructions.items() if re.search(pattern, text)),
    )


def _cuobjdump(cubin: bytes) -> dict[str, str]:
    """What ptxas gave the kernel: REG, STACK, SHARED, ..."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"\b([A-Z]+):(\d+)", report))


if __name__ == "__main__":
    asked = [call for call in all_calls() if all(word in ", ".join(call) for word in sys.argv[1:])]
    if not asked:
        sys.exit(f"there is no call of that name, only: {'; '.join(map(', '.join, all_calls()))}")
    for compiled in compile_calls(asked, list(ARCHITECTURES)):
        print(compiled)
