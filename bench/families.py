"""How much faster other people's slot attention becomes: python3 -m bench.families [NAME...] [--json FILE]

For each module of the field (iio_kernels/testing/families) at its published size: whether `accelerate` finds and
proves it, and forward and backward of the module's own code against the accelerated one, medians of interleaved rounds
on this machine. "Bound" is the ratio that would be reached if attention and projections took no time at all: what is
left is the normalisation of inputs, GRU and MLP, which are the module's own.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import cpuinfo
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from iio_kernels import accelerate, restore
from iio_kernels.acceleration.replacement.call import Call, Result, arranged
from iio_kernels.testing.families import FAMILIES, OUTSIDE
from iio_kernels.testing.families.family import Family
from training.files import write
from training.memory import keep_freed_memory
from training.versions import versions

ROUNDS = 5


def step(model: nn.Module, args: tuple, kwargs: dict) -> float:
    """Seconds of one forward and backward pass."""
    model.zero_grad()
    start = time.perf_counter()
    outputs = [x for x in tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor) and x.requires_grad]
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    return time.perf_counter() - start


def nothing(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    """In the place of attention: results of its shapes that depend on its operands, without its work."""
    sizes = call.sizes_of(tensors)
    some = sum(x.flatten()[0] for x in tensors if x.is_floating_point())

    def like(result: Result) -> Tensor:
        own = (
            sizes if result.part is None else sizes | dict.fromkeys(result.layout[-2], result.part[1] - result.part[0])
        )
        have = tuple((axis,) for dim in result.wanted for axis in dim)
        return arranged(some.to(result.dtype).expand([own[axis] for (axis,) in have]), have, result.wanted, own).clone()

    return tuple(map(like, (*call.updates, *((call.attention,) if call.return_attention else ()))))


def measure(family: Family) -> dict[str, Any]:
    torch.manual_seed(0)
    size = family.published
    model = family.make(size)
    args, kwargs = family.arguments(size)
    args, kwargs = tree_map_only(Tensor, lambda x: x.requires_grad_() if x.is_floating_point() else x, (args, kwargs))
    row: dict[str, Any] = {"module": type(model).__name__, "source": family.source, "size": size._asdict()}
    (entry,) = accelerate(model, *args, **kwargs).entries
    row |= {"accelerated": entry.accelerated, "what": entry.what, "difference": entry.difference}
    if not entry.accelerated:
        return row
    fast = model.forward
    times: dict[str, list[float]] = {"plain": [], "ours": [], "without attention": []}
    own = Call.__call__
    step(model, args, kwargs)
    for _ in range(ROUNDS):
        model.forward = fast
        times["ours"].append(step(model, args, kwargs))
        Call.__call__ = nothing
        try:
            times["without attention"].append(step(model, args, kwargs))
        finally:
            Call.__call__ = own
        restore(model)
        times["plain"].append(step(model, args, kwargs))
    ms = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    ratio, bound = ms["plain"] / ms["ours"], ms["plain"] / ms["without attention"]
    return row | {"ms": ms, "ratio": ratio, "bound": bound}


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| | size | found and proved | plain, ms | accelerated, ms | ratio | bound |", "|---|" + 6 * "---|"]
    for row in rows.values():
        s = row["size"]
        size = f"{s['B']} x {s['N']}, {s['K']} slots, {s['Dx']} to {s['D']} wide"
        if row["accelerated"]:
            ms = row["ms"]
            end = f"yes | {ms['plain']:,.0f} | {ms['ours']:,.0f} | {row['ratio']:.1f}x | {row['bound']:.1f}x |"
        else:
            end = f"left alone: {row['what']} | | | | |"
        lines.append(f"| {row['source']} | {size} | {end}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="How much faster other people's slot attention becomes.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FAMILIES | OUTSIDE)}")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    unknown = set(options.names) - set(FAMILIES | OUTSIDE)
    if unknown:
        parser.error(f"NAME: expected one of {', '.join(FAMILIES | OUTSIDE)}, got {', '.join(sorted(unknown))}")
    keep_freed_memory()
    rows = {}
    about = versions() | {"cpu": cpuinfo.get_cpu_info()["brand_raw"]}
    for name, family in (FAMILIES | OUTSIDE).items():
        if not options.names or name in options.names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows[name] = measure(family)
            gc.collect()
            if options.json:
                write(options.json, json.dumps({"rows": rows, "about": about}, indent=2) + "\n")
    print(markdown(rows), end="")


if __name__ == "__main__":
    main()
