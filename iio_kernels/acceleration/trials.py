"""Tries on an example which modules can be replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from iio_kernels.acceleration.comparison import deviation
from iio_kernels.acceleration.forward import Accelerated, with_cache_of_its_own
from iio_kernels.acceleration.graph import TORCH
from iio_kernels.acceleration.quiet import quiet
from iio_kernels.acceleration.replacement.call import counted
from iio_kernels.acceleration.report import ESCAPES, OTHERWISE, Entry, Report
from iio_kernels.acceleration.softmaxes import Softmaxes, Watch
from iio_kernels.acceleration.state import as_before
from iio_kernels.acceleration.tracing import our_rules

#: How many of a module's ancestors are tried where it is given keys and values, for the one that makes them.
LEVELS = 2


#: Why a ScriptModule is left alone.
SCRIPTED = "it is a ScriptModule, whose code torch.compile cannot trace: accelerate the module before torch.jit.script"


#: What is said where torch.compile runs the code around a softmax as it is, and would trace it as a whole.
UNSAID = "torch.compile runs its softmax as it is, and does not say why"


def accelerate_on(model: nn.Module, args: tuple, kwargs: dict, report: Report) -> None:
    """Replace what can be replaced of a model, on an example of its call, and add to the report what became of each."""
    paths = {module: path for path, module in model.named_modules()}
    watch, replaced = Watch(model), []
    taken = {module for module in paths if isinstance(vars(module).get("forward"), Accelerated)}
    report.entries += [Entry(paths[module], type(module).__name__, True, "already") for module in taken]
    with as_before(model, args, kwargs), quiet():
        with torch.no_grad(), watch:
            model(*args, **kwargs)
        # From the inside out: a module is traced without those inside it that are accelerated.
        for stack in sorted(watch.softmaxes, key=len, reverse=True):
            if taken.isdisjoint(stack):
                with _opaque(taken):
                    fast, entry = _best(stack, watch, paths)
                report.entries.append(entry)
                if entry.accelerated:
                    replaced.append(fast)
                    fast.module.forward = fast
                    taken.add(fast.module)
    for fast in replaced:
        fast.module.forward = fast
    order = list(paths.values())
    report.entries.sort(key=lambda entry: order.index(entry.path))


def _best(stack: tuple[nn.Module, ...], watch: Watch, paths: dict[nn.Module, str]) -> tuple[Accelerated, Entry]:
    """Of the module that takes a softmax and those around it, the one to replace: that which makes keys and values."""
    if isinstance(stack[-1], torch.jit.ScriptModule):
        path, kind = paths[stack[-1]], stack[-1].original_name
        return Accelerated(stack[-1]), Entry(path, kind, accelerated=False, what=SCRIPTED)
    best: tuple[Accelerated, Entry] | None = None
    for module in stack[: -2 - LEVELS : -1]:
        fast = Accelerated(module)
        entry = _tried(fast, paths[module], watch.softmaxes[stack], *watch.calls[module])
        if best is None or (entry.accelerated and ("_from_inputs" in entry.what or not best[1].accelerated)):
            best = fast, entry
        if "_from_inputs" in entry.what or not (entry.accelerated or ESCAPES in entry.what):
            break
    assert best is not None  # a stack holds a module
    return best


def _tried(fast: Accelerated, path: str, softmaxes: Softmaxes, args: tuple, kwargs: dict) -> Entry:
    module = fast.module
    left = Entry(path, type(module).__name__, accelerated=False, what="")
    try:
        with torch.inference_mode(False), counted() as made:
            difference = deviation(module, fast.plain, fast, args, kwargs)
    except Exception as error:  # whatever it is, the module is left as it was, with the reason in the report
        left.what = f"it could not be traced: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}"
        return left
    # What became of other modules' softmaxes, inside this one, is not said of its own.
    done: Counter[str] = Counter()
    for call, times in made.items():
        done[str(call)] += times if softmaxes.holds(call.place) else 0
    whys = [why for _, reasons in fast.log for why in reasons if softmaxes.holds(why.place)]
    reasons = list(dict.fromkeys(why.text for why in whys))
    missed = softmaxes.times[module] - done.total()
    if (missed > 0 and (not reasons or ESCAPES in reasons)) or not (done.total() or reasons):
        stop = _stop(fast, args, kwargs)
        reasons = [*reasons, *([stop] if stop else [])] or [UNSAID if softmaxes.times[module] else OTHERWISE]
    left.what = "; ".join(reasons)
    if not done.total():
        return left
    if not difference < 1:
        left.what = f"outputs or gradients differ by {difference:.2g} times rounding"
        return left
    what = ", ".join(f"{times} x {call}" for call, times in done.items() if times)
    if missed > 0:
        what = f"{done.total()} of {softmaxes.times[module]}: {what}; the others: {left.what}"
    return Entry(path, type(module).__name__, True, what, difference)


def _stop(fast: Accelerated, args: tuple, kwargs: dict) -> str | None:
    """Where in a module's code torch.compile stops, and at what."""
    traced = torch.compile(with_cache_of_its_own(fast.plain), backend="eager", fullgraph=True)
    try:
        with as_before(fast.module, args, kwargs), torch.inference_mode(False), our_rules(traced):
            traced(*args, **kwargs)
    except torch._dynamo.exc.TorchDynamoException as error:
        frames = [f for f in getattr(error, "real_stack", None) or () if not f.filename.startswith(TORCH)]
        at = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "a place it does not name"
        return f"torch.compile stops at {at}: {str(error).strip().splitlines()[0]}"
    except Exception:  # of the module's own, which it raises at other times
        return None
    return None


@contextmanager
def _opaque(modules: set[nn.Module]) -> Iterator[None]:
    """Have torch.compile not look into accelerated modules."""
    forwards = [(module, module.forward) for module in modules]
    for module, forward in forwards:
        module.forward = torch._dynamo.disable(forward)
    try:
        yield
    finally:
        for module, forward in forwards:
            module.forward = forward
