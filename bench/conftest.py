"""What every benchmark shares: contenders on the same inputs, timed side by side, and their ratios at the end.

`pytest bench --benchmark-only` prints the table; `--benchmark-json=FILE` keeps it. Times are medians of one call, in
float32, with the threads that torch uses. As in train.py, memory that a call frees stays with the process: without
that, half of the time and most of its spread are the kernel's, zeroing pages, for every contender.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import iio_kernels

if not torch.cuda.is_available():
    from training.memory import keep_freed_memory

    keep_freed_memory()

BEGUN = time.monotonic()

#: The machine's own speed, for the file of results.
SPEED: dict[str, float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=math.inf, help="skip benchmarks that would begin later than this")


@pytest.fixture(autouse=True)
def _in_time(request: pytest.FixtureRequest) -> None:
    if time.monotonic() - BEGUN > request.config.getoption("--seconds"):
        pytest.skip("no time left")


@pytest.fixture(params=["cuda"] if torch.cuda.is_available() else ["cpu"], scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def machine(device: str) -> dict[str, float]:
    """What bounds every kernel here, measured: bytes copied and multiply-adds (as two operations) a second.

    On a GPU those of bfloat16 as well, which tensor cores multiply.
    """

    def fastest(call: Callable[[], object]) -> float:
        return min(seconds(call, device) for _ in range(5))

    size, width = (256 << 20, 8192) if device == "cuda" else (64 << 20, 2048)
    source = torch.rand(size, device=device)
    target = torch.empty_like(source)
    SPEED["bytes_per_second"] = 2 * source.nbytes / fastest(lambda: target.copy_(source))
    a, b = (torch.rand(width, width, device=device) for _ in range(2))
    SPEED["operations_per_second"] = 2 * width**3 / fastest(lambda: a @ b)
    if device == "cuda":
        a, b = a.bfloat16(), b.bfloat16()
        SPEED["bfloat16_operations_per_second"] = 2 * width**3 / fastest(lambda: a @ b)
    return SPEED


@pytest.fixture
def race(benchmark, device: str) -> Callable[..., None]:
    """Time the calls of `steps`, which do the same to inputs of their own, under the group and name given.

    On a GPU they are captured in a graph, so that no launch waits for Python, and `calls` says how many of them one
    timing is of. Noted beside it: the floor of any such call, in seconds, and the memory one takes.
    A contender of ours that raises fails; another is left out, in its own words.
    """

    def run(steps: list[Callable[[], object]], *, group: str, name: str, floor: float) -> None:
        benchmark.group, benchmark.name = group, name
        try:
            steps[0]()  # compiles what has to be compiled
            with peak_memory(device) as memory:
                once = seconds(steps[0], device)
            call, calls = graph(steps, once) if device == "cuda" else (steps[0], 1)
        except Exception as error:  # whatever stops a contender, the others are measured
            if name == "ours":
                raise
            pytest.skip(f"{group}, {name} failed: {str(error).splitlines()[0]}")
        benchmark.extra_info |= {"floor_ms": 1e3 * floor, "extra_mib": memory[0], "calls": calls}
        budget = 0.5 if device == "cuda" else 2
        rounds = 3 if once > 5 else 5 if once > 0.5 else min(1000, max(9, int(budget / once / calls)))
        benchmark.pedantic(lambda: seconds(call, device), warmup_rounds=0 if once > 5 else 3, rounds=rounds)

    return run


def graph(steps: list[Callable[[], object]], once: float) -> tuple[Callable[[], object], int]:
    """Some milliseconds of calls as CUDA graphs, and how many calls they are."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for step in steps:
            step()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        for step in steps:
            step()
    captured.replay()
    replays = max(1, int(5e-3 / seconds(captured.replay, "cuda")))

    def call() -> None:
        for _ in range(replays):
            captured.replay()

    return call, replays * len(steps)


def seconds(call: Callable[[], object], device: str) -> float:
    """One call, waiting for the device."""
    begun = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


@pytest.fixture(scope="session")
def sets_of_inputs(device: str) -> Callable[[int], range]:
    """Seeds for as many inputs of so many bytes as make a GPU's second cache forget the first of them."""
    if device != "cuda":
        return lambda nbytes: range(1)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return lambda nbytes: range(min(64, 1 + 2 * cache // nbytes))


@contextmanager
def peak_memory(device: str) -> Iterator[list[float]]:
    """[MiB beyond what was in use before]; NaN where the system does not tell."""
    result, clear, status = [float("nan")], Path("/proc/self/clear_refs"), Path("/proc/self/status")
    release_freed = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's

    def resident(field: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield result
        result[0] = (torch.cuda.max_memory_allocated() - before) / 2**20
    elif clear.exists() and release_freed is not None:
        release_freed(0)  # or the call would take from memory that an earlier one left with the process
        clear.write_text("5")  # the high-water mark starts anew
        before = resident("VmRSS")
        yield result
        result[0] = (resident("VmHWM") - before) / 2**10
    else:
        yield result


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info |= {
        "torch": torch.__version__,
        "iio_kernels": iio_kernels.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": os.environ.get("IIO_KERNELS_COMMIT"),
    }


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict[str, Any]) -> None:
    """The machine's speed, but not its name and flags, nor each single timing."""
    machine_info = output_json["machine_info"]
    machine_info.pop("node", None)
    machine_info["cpu"] = {key: machine_info.get("cpu", {}).get(key) for key in ("brand_raw", "count")}
    machine_info |= SPEED
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)


def pytest_terminal_summary(terminalreporter) -> None:
    """Each contender's median; ours against the best of those in PyTorch, and against the floor."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    groups: dict[str, dict[str, Any]] = {}
    for done in getattr(session, "benchmarks", []):
        if done.stats is not None and not done.has_error:
            groups.setdefault(done.group, {})[done.name] = done
    for group, contenders in groups.items():
        medians = {name: done.stats.median / done.extra_info["calls"] for name, done in contenders.items()}
        others = [medians[name] for name in ("einsums", "eager", "split", "torch.compile") if name in medians]
        terminalreporter.write_line(f"\n{group}")
        for name, done in contenders.items():
            line = f"  {name:16}{1e3 * medians[name]:12.3f} ms{done.extra_info['extra_mib']:10.1f} MiB"
            if name.startswith("ours") and others:
                line += f"  {min(others) / medians[name]:7.1f}x the best of the others"
            elif name != "ours" and "ours" in medians:
                line += f"  {medians[name] / medians['ours']:7.1f}x ours"
            if name == "ours":
                line += f", {done.extra_info['floor_ms'] / (1e3 * medians[name]):.0%} of the floor's speed"
            terminalreporter.write_line(line)
