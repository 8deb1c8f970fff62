"""Times of the launch settings that the kernels have, and of their neighbours."""

from __future__ import annotations

import importlib
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch

from bench.gpu.calls import CASES, call_of
from bench.gpu.part import DEVICE, LIMIT, elapsed, median_seconds, named, write
from bench.operations import MEASURED

#: The label of the settings that the kernels have.
TABLE = "table"


class Variant(NamedTuple):
    """An operation's call under the settings that its file in bench/operations has by this label."""

    label: str
    operation: str
    case: Any
    dtype: torch.dtype


def variants() -> Iterator[Variant]:
    """The settings of the table, and one changed at a time."""
    for operation, case in CASES:
        for dtype in MEASURED[operation].DTYPES:
            for label in (TABLE, *MEASURED[operation].launch_settings()):
                yield Variant(label, operation, case, dtype)


def time_variant(variant: Variant, timed: bool = True) -> float | str:
    """Seconds of forward and backward together; or, where they do not run, why."""
    kernels = importlib.import_module(f"iio_kernels.ops.{variant.operation}.triton")
    settings = {} if variant.label == TABLE else MEASURED[variant.operation].launch_settings()[variant.label]
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
            while elapsed() < 0.6 * LIMIT and not all(future.done() for future in futures):
                time.sleep(0.5)
            compiled = [variant for variant, future in zip(todo, futures, strict=True) if future.done()]
            for future in futures:
                future.cancel()
            todo = compiled
    for variant in todo:
        if elapsed() > 0.95 * LIMIT:
            break
        group = results.setdefault(f"{variant.operation}, {variant.case.name}, {named(variant.dtype)}", {})
        group[variant.label] = time_variant(variant)
        write("launch_settings", results)
    for group, times in results.items():
        numbers = {label: x for label, x in times.items() if isinstance(x, float)}
        if TABLE in numbers and len(numbers) > 1:
            best = min(numbers, key=numbers.get)
            print(f"{group}: table {1e3 * numbers[TABLE]:.4f} ms, best {best} {1e3 * numbers[best]:.4f} ms")
    return results
