"""The parts of gpu.sh that are neither tests nor benchmarks: python3 -m bench.gpu PART FOLDER writes FOLDER/PART.json.

Where there is no GPU they run at toy sizes in Triton's interpreter, which proves that they work and no more.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

import iio_kernels
import iio_kernels.__main__
from iio_kernels import (
    SlotAttentionWeights,
    broadcast_conv2d,
    composition_error,
    iio_loss,
    slot_attention,
    slot_attention_module,
    spatial_mixture,
)
from iio_kernels.runtime.backends import BACKENDS
from iio_kernels.testing import broadcast_conv2d as broadcast_spec
from iio_kernels.testing import compose as composition_spec
from iio_kernels.testing import iio_loss as inpainting_spec
from iio_kernels.testing import slot_attention as attention_spec
from iio_kernels.testing import slot_attention_module as iterations_spec
from iio_kernels.testing import spatial_mixture as mixture_spec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = "cuda" if DEVICE == "cuda" else "toy"
#: Seconds that this part has.
LIMIT = float(os.environ.get("LIMIT", "60"))
BEGUN = time.monotonic()

Call = Callable[[], tuple[Tensor, ...]]


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def median_seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Of one call among many, with events on a GPU: calls queue behind each other."""
    call()
    synchronize()
    if DEVICE == "cpu":
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in events)[repeats // 2] / 1e3


# --- machine --------------------------------------------------------------------------------------------------------


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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


# --- build ----------------------------------------------------------------------------------------------------------


def build() -> dict[str, Any]:
    """The backends, after building what is built; on a GPU all are to be there."""
    print(iio_kernels.__main__.report())
    reasons = iio_kernels.backends()
    wanted = ("cpu", "triton", "cuda") if DEVICE == "cuda" else ("cpu", "triton")
    return {"backends": reasons, "seconds": time.monotonic() - BEGUN, "failed": any(reasons[name] for name in wanted)}


# --- calls of every operation ----------------------------------------------------------------------------------------


SPECS = {
    "slot_attention": attention_spec,
    "iio_loss": inpainting_spec,
    "compose": composition_spec,
    "broadcast_conv2d": broadcast_spec,
    "slot_attention_module": iterations_spec,
    "spatial_mixture": mixture_spec,
}
CASES = [(operation, case) for operation, spec in SPECS.items() for case in spec.BENCHMARKS[SIZES]]


def inputs_of(operation: str, case: Any) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The operation's inputs at a benchmark's size, in float32, and the gradient to a result that is no error."""
    random = torch.Generator(DEVICE).manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=DEVICE)

    if operation == "slot_attention":
        q, k, v, dU = (new(*case.batch, n, D) for n, D in (
            (case.K, case.Dk), (case.N, case.Dk), (case.N, case.Dv), (case.K, case.Dv)))  # fmt: skip
        return (q, k, v), dU
    if operation == "broadcast_conv2d":
        (z, weight, position_map), _ = case.make(torch.float32, DEVICE)
        return (z, weight, position_map), new(*case.batch, *case.result)
    if operation == "slot_attention_module":
        (x, slots, weights, _), _ = case.make(torch.float32, DEVICE)
        return (x, slots, *weights), new(*slots.shape)
    if operation == "spatial_mixture":
        return case.make(torch.float32, DEVICE)[0], None
    image = new(case.B, case.C, case.H, case.W).sigmoid()
    if operation == "iio_loss":
        return (image, new(case.B, case.K, case.H, case.W).softmax(1)), None
    decoded = new(case.B, case.K, case.H, case.W, case.C + 1).permute(0, 1, 4, 2, 3)
    return (image, decoded if case.channels_last else decoded.contiguous()), None


def mixture(image: Tensor, decoded: Tensor, **options: Any) -> Tensor:
    """All of its results in one tensor."""
    x = spatial_mixture(image, decoded, **options)
    planes = x.log_likelihood.unsqueeze(1), x.masks, x.posterior, x.leave_one_out, x.d_decoded.flatten(1, 2)
    return torch.cat(planes, 1)


def module(x: Tensor, slots: Tensor, *weights: Tensor, **options: Any) -> Tensor:
    return slot_attention_module(x, slots, SlotAttentionWeights(*weights), **options)


def call_of(operation: str, case: Any, dtype: torch.dtype, arithmetic: torch.dtype, backend: str) -> Call:
    """The value and the gradients to all inputs, which are rounded to `dtype` and then of type `arithmetic`."""
    tensors, incoming = inputs_of(operation, case)
    function = {
        "slot_attention": slot_attention,
        "iio_loss": functools.partial(iio_loss, reduction="none"),
        "compose": functools.partial(composition_error, reduction="none"),
        "broadcast_conv2d": broadcast_conv2d,
        "slot_attention_module": functools.partial(module, iterations=getattr(case, "T", None)),
        "spatial_mixture": mixture,
    }[operation]
    return differentiated(
        functools.partial(function, **case.options, backend=backend),
        tuple(x.to(dtype).to(arithmetic) for x in tensors),
        None if incoming is None else incoming.to(dtype),
    )


def differentiated(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], incoming: Tensor | None = None) -> Call:
    """A call that returns the function's value and its gradients to all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def call() -> tuple[Tensor, ...]:
        y = function(*leaves)
        grad = torch.ones_like(y) if incoming is None else incoming.to(y)
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    return call


def serving(operation: str) -> list[str]:
    """The kernels that there are for this device."""
    here = torch.device(DEVICE)
    return [
        name
        for name in ("triton", "cuda")
        if operation in BACKENDS[name].operations and BACKENDS[name].refuses(here) is None
    ]


# --- accuracy -------------------------------------------------------------------------------------------------------


def accuracy() -> dict[str, Any]:
    """Each result's largest error against float64, over twice the reference's own and 4 units in the last place."""
    results: dict[str, Any] = {}
    for (operation, case), dtype in itertools.product(CASES, (torch.float32, torch.bfloat16, torch.float16)):
        truth = call_of(operation, case, dtype, torch.float64, "reference")()
        eager = call_of(operation, case, dtype, dtype, "reference")()
        for backend in serving(operation):
            worst = max(
                (x.double() - t).abs().nan_to_num(nan=math.inf).max().item()
                / max(SPECS[operation].allowed_error(t, plain), 1e-300)
                for x, t, plain in zip(call_of(operation, case, dtype, dtype, backend)(), truth, eager, strict=True)
            )
            label = f"{operation}, {case.name}, {named(dtype)}, {backend}"
            results[label] = worst
            print(f"{label}: {worst:.3f} of the error allowed")
            if worst > 1:
                results["failed"] = True
        write("accuracy", results)
    return results


# --- memory and races, for compute-sanitizer ------------------------------------------------------------------------


def sanitize() -> dict[str, Any]:
    """One call of every kernel, with all options, at sizes that leave no tile full."""
    ran = []
    for backend in serving("slot_attention"):
        for dtype, joint in itertools.product((torch.float32, torch.bfloat16), (False, True)):
            case = attention_spec.Case("odd", batch=(2, 2), K=5, N=83, Dk=24, Dv=40, slots="some", inputs="some",
                                       options={"joint_heads": joint})  # fmt: skip
            inputs, options = case.make(dtype, DEVICE)
            differentiated(lambda *x, o=options, b=backend: slot_attention(*x, **o, backend=b), inputs)()
            ran.append(f"slot_attention, {dtype}, {backend}, joint heads: {joint}")
    for backend in serving("iio_loss"):
        for K, H, W in ((3, 37, 41), (9, 12, 13)):
            inputs, options = inpainting_spec.Case("odd", B=2, K=K, H=H, W=W).make(torch.float32, DEVICE)
            for name in ("iio_loss", "conditional_entropies", "inpaint"):
                function = getattr(iio_kernels, name)
                differentiated(lambda *x, o=options, f=function, b=backend: f(*x, **o, backend=b), inputs)()
                ran.append(f"{name}, K{K}, {backend}")
    for backend in serving("compose"):
        for channels_last in (False, True):
            case = composition_spec.Case("odd", K=5, H=35, W=37, channels_last=channels_last)
            inputs, _ = case.make(torch.float32, DEVICE)
            differentiated(lambda *x, b=backend: composition_error(*x, backend=b), inputs)()
            ran.append(f"composition, {backend}, channels last: {channels_last}")
    for backend in serving("spatial_mixture"):
        for channels_last in (False, True):
            case = mixture_spec.Case("odd", K=5, H=35, W=37, channels_last=channels_last)
            inputs, _ = case.make(torch.float32, DEVICE)
            differentiated(lambda *x, b=backend: mixture(*x, backend=b), inputs)()
            ran.append(f"mixture, {backend}, channels last: {channels_last}")
    for backend in serving("broadcast_conv2d"):
        for case in broadcast_spec.CASES[::6]:  # some of each kind
            inputs, options = case.make(torch.float32, DEVICE)
            differentiated(lambda *x, o=options, b=backend: broadcast_conv2d(*x, **o, backend=b), inputs)()
            ran.append(f"broadcast, {backend}, {case.name}")
    for backend in serving("slot_attention_module"):
        for dtype in (torch.float32, torch.bfloat16):
            (x, slots, weights, T), _ = iterations_spec.Case("odd", K=5, N=83, Dx=24, D=40).make(dtype, DEVICE)
            differentiated(lambda *x, b=backend, t=T: module(*x, iterations=t, backend=b), (x, slots, *weights))()
            ran.append(f"iterations, {dtype}, {backend}")
    synchronize()
    return {"ran": ran}


# --- repeats --------------------------------------------------------------------------------------------------------


def repeats() -> dict[str, Any]:
    """10,000 times the same call, bitwise: how often each ran in its time, and whether any result differed."""
    wanted = 10_000 if DEVICE == "cuda" else 3
    results: dict[str, Any] = {}
    for operation in SPECS:
        for backend in serving(operation):
            case = SPECS[operation].BENCHMARKS[SIZES][0]
            call = call_of(operation, case, torch.float32, torch.float32, backend)
            first = call()
            differs = torch.zeros((), dtype=torch.bool, device=DEVICE)
            begun, done = time.monotonic(), 0
            while done < wanted and time.monotonic() - begun < LIMIT / 8:
                for x, y in zip(call(), first, strict=True):
                    differs |= (x != y).any()
                done += 1
            results[f"{operation}, {backend}"] = {"calls": done, "differed": differs.item()}
            print(f"{operation}, {backend}: {done} calls, {'DIFFERED' if differs else 'all the same'}")
            if differs:
                results["failed"] = True
    return results


# --- launch settings ------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """An operation's call under other settings than the table's: names of its triton.py, and their values there."""

    label: str
    operation: str
    case: Any
    dtype: torch.dtype
    settings: dict[str, Any]


def variants() -> Iterator[Variant]:
    """The settings of the table, and one changed at a time."""
    for operation, case in CASES:
        for dtype in (torch.float32, torch.bfloat16) if operation == "slot_attention" else (torch.float32,):
            variant = Variant("table", operation, case, dtype, {})
            yield variant
            if operation == "slot_attention":
                fields = ("BLOCK_N", "num_warps", "num_stages", "WIDTH")
                for way, field, factor in itertools.product(("forward", "backward"), fields, (0.5, 2)):
                    yield variant._replace(label=f"{way} {field} x{factor:g}", settings={"tile": (way, field, factor)})
            else:
                several = {
                    "iio_loss": (
                        {"LINES": (32, 512)}, {"LINES": (128, 512)}, {"SETS": (256, 256)},
                    ),
                    "compose": (
                        {"NUMBERS": 1024}, {"NUMBERS": 4096}, {"WARPS": 2}, {"NUMBERS": 4096, "WARPS": 2},
                        {"NUMBERS": 8192, "WARPS": 4},
                    ),
                    "spatial_mixture": ({"NUMBERS": 256}, {"NUMBERS": 1024}, {"NUMBERS": 1024, "WARPS": 2}),
                    "broadcast_conv2d": (
                        {"NUMBERS": 1024}, {"NUMBERS": 4096}, {"WARPS": 2}, {"WARPS": 8}, {"GROUP": 4}, {"GROUP": 16},
                    ),
                    "slot_attention_module": (
                        {"SMALL": (32, 8)}, {"SMALL": (64, 4)}, {"LARGE": (32, 8)}, {"LARGE": (16, 4)},
                    ),
                }[operation]  # fmt: skip
                for settings in several:
                    yield variant._replace(label=f"{settings}", settings=settings)


def prepared(variant: Variant) -> tuple[Any, dict[str, Any]]:
    """The operation's triton.py, and what there to replace."""
    kernels = importlib.import_module(f"iio_kernels.ops.{variant.operation}.triton")
    if "tile" not in variant.settings:
        return kernels, variant.settings
    (changed_way, field, factor), tile = variant.settings["tile"], kernels.tile

    def changed(how: str, way: str, K: int, D: int) -> Any:
        chosen = tile(how, way, K, D)
        if way != changed_way:
            return chosen
        return chosen._replace(**{field: max(1, int(getattr(chosen, field) * factor))})

    return kernels, {"tile": changed}


def time_variant(variant: Variant, timed: bool = True) -> float | str:
    """Seconds of forward and backward together; or, where they do not run, why."""
    kernels, settings = prepared(variant)
    kept = {name: getattr(kernels, name) for name in settings}
    kernels.__dict__.update(settings)
    try:
        call = call_of(variant.operation, variant.case, variant.dtype, variant.dtype, "triton")
        return median_seconds(call) if timed else len(call())
    except Exception as error:  # whatever it is, it stands in the table, and the other variants are timed
        return (str(error).splitlines() or [type(error).__name__])[0][:200]
    finally:
        kernels.__dict__.update(kept)


def launch_settings() -> dict[str, Any]:
    """Times of the table's settings and of their neighbours, as far as the time goes; kernels are compiled ahead."""
    todo = list(variants())
    results: dict[str, Any] = {}
    if DEVICE == "cpu":
        todo = todo[:4]
    else:
        with ProcessPoolExecutor(8, multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(time_variant, variant, timed=False) for variant in todo]  # fills Triton's cache
            while time.monotonic() - BEGUN < 0.6 * LIMIT and not all(future.done() for future in futures):
                time.sleep(0.5)
            compiled = [variant for variant, future in zip(todo, futures, strict=True) if future.done()]
            for future in futures:
                future.cancel()
            todo = compiled
    for variant in todo:
        if time.monotonic() - BEGUN > 0.95 * LIMIT:
            break
        group = results.setdefault(f"{variant.operation}, {variant.case.name}, {named(variant.dtype)}", {})
        group[variant.label] = time_variant(variant)
        write("launch_settings", results)
    for group, times in results.items():
        numbers = {label: x for label, x in times.items() if isinstance(x, float)}
        if "table" in numbers and len(numbers) > 1:
            best = min(numbers, key=numbers.get)
            print(f"{group}: table {1e3 * numbers['table']:.4f} ms, best {best} {1e3 * numbers[best]:.4f} ms")
    return results


# --- training -------------------------------------------------------------------------------------------------------


def training() -> dict[str, Any]:
    """The paper's table 1, three seeds, as far as the time goes. It goes on from the archive named in
    IIO_KERNELS_TRAINING, if there is one, and leaves FOLDER/training.tar.gz, from which a later call goes on."""
    out = Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "table1"
        archive = os.environ.get("IIO_KERNELS_TRAINING")
        if archive:
            with tarfile.open(archive) as file:
                file.extractall(scratch, filter="data")
        if (run / "config.json").exists():
            arguments = ["--resume", str(run)]
        else:
            arguments = ["--table1", "--fine-tune", "iio", "--out", str(run), "--device", DEVICE]
            if DEVICE == "cuda":
                arguments += ["--preset", "paper", "--seeds", "3", "--log-every", "250", "--eval-every", "10000"]
            else:
                arguments += ["--preset", "smoke", "--steps", "4", "--fine-tune-steps", "2", "--num-scenes", "40"]
        process = subprocess.Popen([sys.executable, "train.py", *arguments])
        for seconds, number in ((max(5.0, LIMIT - 45), signal.SIGINT), (20, signal.SIGKILL)):
            try:
                process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(number)  # the first has it save all, and say so
        process.wait()
        run.mkdir(exist_ok=True)
        with tarfile.open(out / "training.tar.gz", "w:gz") as file:
            file.add(run, "table1", filter=lambda member: None if "tfevents" in member.name else member)
        finished = (run / "summary.json").exists()
        rows = json.loads((run / "summary.json").read_text())["rows"] if finished else None
        said = {name: json.loads((run / name / "summary.json").read_text()) for name in sorted(os.listdir(run))
                if (run / name / "summary.json").exists()}  # fmt: skip
    failed = process.returncode not in (0, 128 + signal.SIGINT)
    return {"finished": finished, "rows": rows, "runs": said, "status": process.returncode, "failed": failed}


# --- summary --------------------------------------------------------------------------------------------------------


def summary(folder: Path) -> dict[str, Any]:
    """How each part ended, and how many tests did what."""
    parts = [json.loads(line) for line in (folder / "parts.jsonl").read_text().splitlines()]
    result: dict[str, Any] = {"parts": parts}
    if (folder / "tests.xml").exists():
        suite = ET.parse(folder / "tests.xml").getroot().find("testsuite")
        result["tests"] = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
        result["failures"] = [
            f"{case.get('classname')}::{case.get('name')}" for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]  # fmt: skip
        (folder / "tests.xml").unlink()
    (folder / "parts.jsonl").unlink()
    for name in ("build", "sanitize"):  # files are few where they are fetched from afar
        if (folder / f"{name}.json").exists():
            result[name] = json.loads((folder / f"{name}.json").read_text())
            (folder / f"{name}.json").unlink()
    late = re.findall(r"SKIPPED \[(\d+)\].*no time left", (folder / "log.txt").read_text())
    result["benchmarks without time"] = sum(map(int, late))
    print(json.dumps(result, indent=1))
    return result


def write(part: str, result: dict[str, Any]) -> None:
    path = Path(sys.argv[2]) / f"{part}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    part = sys.argv[1]
    result = summary(Path(sys.argv[2])) if part == "summary" else globals()[part]()
    write(part, result)
    if part == "machine":
        print(json.dumps(result, indent=1))
    sys.exit(1 if result.get("failed") else 0)
