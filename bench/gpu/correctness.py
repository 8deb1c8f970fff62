"""Whether the kernels are right: their errors, their memory and races, and the same bits every time."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import torch

from bench.gpu.calls import CASES, call_of, differentiated, serving
from bench.gpu.part import DEVICE, LIMIT, SIZES, named, synchronize, write
from bench.operations import MEASURED, TESTED


def accuracy() -> dict[str, Any]:
    """Each result's largest error against float64, over twice the reference's own and 4 units in the last place."""
    results: dict[str, Any] = {}
    for (operation, case), dtype in itertools.product(CASES, (torch.float32, torch.bfloat16, torch.float16)):
        truth = call_of(operation, case, dtype, torch.float64, "reference")()
        eager = call_of(operation, case, dtype, dtype, "reference")()
        for backend in serving(operation):
            worst = max(
                (x.double() - t).abs().nan_to_num(nan=math.inf).max().item()
                / max(TESTED[operation].allowed_error(t, plain), 1e-300)
                for x, t, plain in zip(call_of(operation, case, dtype, dtype, backend)(), truth, eager, strict=True)
            )
            label = f"{operation}, {case.name}, {named(dtype)}, {backend}"
            results[label] = worst
            print(f"{label}: {worst:.3f} of the error allowed")
            if worst > 1:
                results["failed"] = True
        write("accuracy", results)
    return results


def sanitize() -> dict[str, Any]:
    """One call of every kernel, with all options, at sizes that leave no tile full: for compute-sanitizer."""
    ran = []
    for operation, measured in MEASURED.items():
        for backend in serving(operation):
            for label, function, inputs in measured.odd_calls(backend, DEVICE):
                differentiated(function, inputs)()
                ran.append(label)
    synchronize()
    return {"ran": ran}


def repeats() -> dict[str, Any]:
    """10,000 times the same call, bitwise: how often each ran in its time, and whether any result differed."""
    wanted = 10_000 if DEVICE == "cuda" else 3
    results: dict[str, Any] = {}
    for operation in TESTED:
        for backend in serving(operation):
            case = TESTED[operation].BENCHMARKS[SIZES][0]
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
