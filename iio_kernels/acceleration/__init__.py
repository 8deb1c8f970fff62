"""Other people's slot models made faster: `accelerate` finds slot attention in any module and replaces it."""

from __future__ import annotations

import logging
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from iio_kernels.acceleration.quiet import quiet, quiet_traces
from iio_kernels.acceleration.recognition import ESCAPES, OTHERWISE, TORCH, Reason
from iio_kernels.acceleration.rewriting import counted
from iio_kernels.acceleration.state import as_before
from iio_kernels.acceleration.tracing import CheckFailed, modes_as_before, our_rules

#: How many of a module's ancestors are tried where it is given keys and values, for the one that makes them.
LEVELS = 2


@dataclass
class Entry:
    """What became of one module that takes a softmax."""

    path: str
    kind: str
    """The name of its class."""
    accelerated: bool
    what: str
    """The calls that replace its own steps, or why it was left alone."""
    difference: float | None = None
    """The largest deviation of an output or gradient on the example, of what changing the last bits of its inputs and
    parameters makes; below 1 it is rounding."""

    @property
    def status(self) -> str:
        """One of `STATUSES`."""
        if self.accelerated:
            return "accelerated"
        others = all(reason.startswith(NO_PRODUCT) for reason in self.what.split("; "))
        return "other softmax" if others else "left alone"


#: What becomes of modules, in the order of a report. Other softmaxes are of no queries and keys, such as a decoder's
#: over its masks.
STATUSES = ("accelerated", "left alone", "other softmax")

#: What is said of other softmaxes.
NO_PRODUCT = "its logits are not a product"


@dataclass
class Report:
    """What `accelerate` replaced, what it left alone, and why: an `Entry` each. It prints as a table, in this order."""

    entries: list[Entry] = field(default_factory=list)
    pending: bool = False
    """Whether the model has yet to be called for the first time."""

    @property
    def accelerated(self) -> list[str]:
        """The paths of the modules that were replaced."""
        return [entry.path for entry in self.entries if entry.accelerated]

    def __str__(self) -> str:
        if self.pending:
            return "accelerate: waits for the model's first call"
        if not self.entries:
            return "accelerate: no module of the model takes a softmax"
        rows = [
            (entry.path or "(the model)", entry.kind, entry.status, entry.what)
            for entry in sorted(self.entries, key=lambda entry: STATUSES.index(entry.status))
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join("  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows)


def accelerate(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Find the slot attention in a model, prove for each module that ours is the same, and put it in its place.

    A module is recognised by what it computes, not by its name: softmax over slots of the products of queries with
    keys, perhaps in heads, masked or biased by slot, of several kinds of queries, written as `softmax`, by exponentials
    or logarithms; with an epsilon or two, normalised over inputs or by a sum bounded from below, times values; in any
    order of dimensions. (Where exponentials overflow, or all become 0, the module's own code gives NaN, and ours the
    softmax.) Where keys and values are linear in one input, they are not made any more (`slot_attention_from_inputs`).
    Everything else in the module stays its own code: GRU, MLP, noise, control flow.

    The module's `forward` is traced by torch.compile with a compiler that replaces slot attention and nothing else;
    torch.compile's guards trace it again where anything that it depends on has changed (a shape, a number of
    iterations, train or eval, autocast, hooks). As in torch.compile, a method that is replaced on a class later is not
    seen. Parameters, state_dict, hooks and submodules are untouched. What is replaced is proved first:

    - each replaced step, whenever it is traced, against the module's own in float64, on random numbers: outputs and
      gradients to 1e-10;
    - each module, on the example: outputs and gradients against the module's own, to what changing the last bits of
      its inputs and parameters changes.

    What cannot be proved is left alone, and the report says why; if only some of a module's softmaxes are replaced, how
    many, and why not the others. (Later traces, of other shapes or modes, and those of `backend="iio_kernels"` have the
    first proof alone.)

    Assertions about tensors, an `if` that raises and NumPy's functions of shapes do not stop the tracer; should an
    assertion fail, the module's own code is run, and raises. (The tracer does stop at an assertion behind a write to a
    buffer or a random draw, which would happen twice.) Where the tracer stops inside a loop, at `.item()` say, it
    goes on behind that place. Where that leaves a softmax without its mean, the report gives the file and line.

    Args:
        model: any module, changed in place. Calling this again takes up what has been added to it.
        args, kwargs: what the model is called with, an example, in the mode (train or eval, autocast) that matters
            most. The model is run once, without gradients, and each module that takes a softmax three times more,
            hooks and prints included. Without an example the model's first call serves. What these runs change is put
            back, to the bit, also when one raises: parameters, buffers, gradients, attributes and what is in them,
            random number generators, what hooks and methods refer to (see acceleration/state.py). A copy of all tensors
            that the model holds is kept meanwhile in main memory.
            What torch.compile warns of or logs while it traces is not shown, nor are the trials' own warnings.

    Returns:
        A `Report`; without an example it is filled when the model is first called.

    Raises:
        TypeError: model is not a module.
        And whatever the model raises on the example.

    Inside `torch.compile` the module's own code is compiled, as if it had not been accelerated, unless the backend is
    ours: `torch.compile(model, backend="iio_kernels")` replaces slot attention in the whole model, accelerated or not,
    and compiles the rest with Inductor. `torch.export`, torch.func (`vmap`, `jvp`, `grad`), `torch.jit.trace` and
    forward-mode differentiation see the module's own code, and so does whatever runs under a TorchDispatchMode. Deep
    copies and pickles of the model are accelerated too; `restore` it for shallow ones, nn.DataParallel,
    `torch.jit.script` and second derivatives by `torch.autograd`, which raise.

    A trace is made for each combination of shapes, modes and settings that a module meets (the second size makes it one
    for all sizes), and takes a tenth of a second to some; after `torch._dynamo.config.recompile_limit` of them, 8, the
    module's own code runs. What forward reads of its surroundings, such as `os.environ`, is read when it is
    traced.

    Example:
        >>> report = iio_kernels.accelerate(model, images)
        >>> print(report)
        slot_attention  SlotAttention  accelerated  3 x slot_attention_from_inputs (eps 1e-08 in weights)
    """
    _check_module(model)
    if args or kwargs:
        report = Report()
        _accelerate(model, args, kwargs, report)
        return report
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, _FirstCall):
            return hook.report
    report = Report(pending=True)
    # The first of the hooks: the example is what the model is called with.
    model.register_forward_pre_hook(_FirstCall(report), prepend=True, with_kwargs=True)
    return report


class _FirstCall:
    """The hook that takes a model's first call for an example."""

    def __init__(self, report: Report) -> None:
        self.report, self.running = report, False

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling() or _transformed() or self.running:
            return
        self.running = True
        try:
            _accelerate(model, args, kwargs, self.report)
        finally:
            self.running = False
        self.remove(model)
        self.report.pending = False

    @staticmethod
    def remove(model: nn.Module) -> None:
        for key in [key for key, hook in model._forward_pre_hooks.items() if isinstance(hook, _FirstCall)]:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every module in `model` has its own forward again.

    Raises:
        TypeError: `model` is no module.
    """
    _check_module(model)
    for module in model.modules():
        _FirstCall.remove(module)
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, Accelerated):
            del module.forward
            if forward.own is not None:
                module.forward = forward.own


def inductor(
    module: torch.fx.GraphModule, example_inputs: list[Any], *, mode: str | None = None, options: dict | None = None
) -> Callable:
    """The backend of `torch.compile(model, backend="iio_kernels")`: slot attention replaced, the rest by Inductor.

    `mode` and `options` are Inductor's. What is replaced, and what not, is logged to "iio_kernels" at level INFO.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    compiled: Any = compile_fx(_rewritten(module, []), example_inputs, config_patches=patches or None)
    return compiled


class Accelerated:
    """A module's forward with slot attention replaced, in the place of its own: `module.forward`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own = module.__dict__.get("forward")
        self.log: list[tuple[list[str], list[Reason]]] = []
        self._traced: Callable | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _transformed():
            own = self.own
            return type(self.module).forward(self.module, *args, **kwargs) if own is None else own(*args, **kwargs)
        if self._traced is None:
            self._traced = torch.compile(_with_cache_of_its_own(self.plain), backend=_Compiler(self.log))
        try:
            with our_rules(self._traced), quiet_traces(), modes_as_before():
                return self._traced(*args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, CheckFailed):
            pass
        # It cannot be traced, or an assertion fails: the module's own code says what is wrong, or runs.
        return self.plain(*args, **kwargs)

    @property
    def plain(self) -> Callable:
        """The module's own forward."""
        return type(self.module).forward.__get__(self.module) if self.own is None else self.own

    def __getattr__(self, name: str) -> Any:
        """What others look up in a method, its signature first of all."""
        if name in ("__wrapped__", "__code__", "__defaults__", "__kwdefaults__", "__name__", "__func__", "__self__"):
            return self.plain if name == "__wrapped__" else getattr(self.plain, name)
        raise AttributeError(name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_traced": None, "log": []}


class _Compiler:
    """The backend of one module's traces. torch.compile keeps it for ever, so it knows nothing of the module."""

    def __init__(self, log: list[tuple[list[str], list[Reason]]]) -> None:
        self.log = log

    def __call__(self, module: torch.fx.GraphModule, _: list[Any]) -> Callable:
        return _rewritten(module, self.log).forward


def _transformed() -> bool:
    """Whether a call is part of a transform of torch.func, of forward-mode differentiation or of somebody's tracing,
    all of which are to see the module's own code."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _with_cache_of_its_own(forward: Any) -> Callable:
    """A method of a copy of its code, by which torch.compile counts traces: instances would share them, and floats in
    which they differ become symbols."""
    f = getattr(forward, "__func__", None)
    if not isinstance(f, types.FunctionType):
        return forward
    own = types.FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    own.__kwdefaults__ = f.__kwdefaults__
    if hasattr(f, "__wrapped__"):
        own.__wrapped__ = f.__wrapped__  # type: ignore[attr-defined]
    return types.MethodType(own, forward.__self__)


def _rewritten(module: torch.fx.GraphModule, log: list[tuple[list[str], list[Reason]]]) -> torch.fx.GraphModule:
    """A graph with its slot attention replaced, what and why not appended to `log`."""
    from iio_kernels.acceleration.rewriting import rewrite

    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    try:
        # The proofs save tensors of their own, of which no one else is to know, torch.utils.checkpoint least of all.
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            calls, reasons = rewrite(graph)
    except Exception as error:  # whatever it is, the module's own code is right
        warnings.warn(f"iio_kernels: slot attention is left as it is, since {error!r}", stacklevel=2)
        calls, reasons = [], [Reason(repr(error), None)]
    log.append(([str(call) for call in calls], reasons))
    logging.getLogger("iio_kernels").info("replaced: %s; left alone: %s", log[-1][0], [why.text for why in reasons])
    return torch.fx.GraphModule(module, graph) if calls else module


def _accelerate(model: nn.Module, args: tuple, kwargs: dict, report: Report) -> None:
    paths = {module: path for path, module in model.named_modules()}
    watch, replaced = _Watch(model), []
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


def _best(stack: tuple[nn.Module, ...], watch: _Watch, paths: dict[nn.Module, str]) -> tuple[Accelerated, Entry]:
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


#: Why a ScriptModule is left alone.
SCRIPTED = "it is a ScriptModule, whose code torch.compile cannot trace: accelerate the module before torch.jit.script"


#: What is said where torch.compile runs the code around a softmax as it is, and would trace it as a whole.
UNSAID = "torch.compile runs its softmax as it is, and does not say why"


def _tried(fast: Accelerated, path: str, softmaxes: _Softmaxes, args: tuple, kwargs: dict) -> Entry:
    module = fast.module
    left = Entry(path, type(module).__name__, accelerated=False, what="")
    try:
        with torch.inference_mode(False), counted() as made:
            difference = _difference(module, fast.plain, fast, args, kwargs)
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
    traced = torch.compile(_with_cache_of_its_own(fast.plain), backend="eager", fullgraph=True)
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


#: How many times what the last bits change a replacement may change.
TIMES = 4


def _difference(module: nn.Module, plain: Callable, fast: Callable, args: tuple, kwargs: dict) -> float:
    """The largest deviation of `fast` from `plain`, of that which rounding allows; see `Entry.difference`."""
    device = next((x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), torch.device("cpu"))
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    own = _results(module, plain, args, kwargs, 0)
    eps = [torch.finfo(autocast or x.dtype).eps if x.dtype.is_floating_point else 0 for x in own]
    changed = _results(module, plain, args, kwargs, max(eps, default=0.0))
    ours = _results(module, fast, args, kwargs, 0)
    # An image that is masked wholly may be NaN, in both alike; what is left has to be the same.
    finite = [x.isfinite() for x in own]
    largest = max((x[f].abs().max().double() for x, f in zip(own, finite, strict=True) if f.any()), default=0.0)
    worst = 0.0
    for a, b, c, e, f in zip(own, ours, changed, eps, finite, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or not _equal(a[~f], b[~f]):
            return float("inf")
        if f.any():
            a, b, c = (x[f].double() for x in (a, b, c))
            # Some gradients are sums of terms that cancel, and what is rounded are the terms.
            allowed = TIMES * (c - a).abs().max() + e * (4 * TIMES * a.abs().max() + largest)
            apart = (b - a).abs().max()
            worst = max(worst, 0.0 if apart == 0 else (apart / allowed).nan_to_num(float("inf")).item())
    return worst


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers are the same, of which NaN is one."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _results(module: nn.Module, forward: Callable, args: tuple, kwargs: dict, noise: float) -> list[Tensor]:
    """Outputs and gradients, inputs and parameters changed by a factor of up to 1 + noise."""
    generator = torch.Generator().manual_seed(0)

    def jitter(x: Tensor) -> Tensor:
        signs = torch.rand(x.shape, generator=generator).to(x.device) * 2 - 1
        return (x * (1 + noise * signs)).to(x.dtype)

    inputs: list[Tensor] = []

    def fresh(x: Tensor) -> Tensor:
        if x.is_floating_point():
            x = jitter(x.detach()) if noise else x.detach().clone()
            inputs.append(x.requires_grad_())
        return x

    args, kwargs = tree_map_only(Tensor, fresh, (args, kwargs))
    with as_before(module, args, kwargs), torch.enable_grad():
        if noise:
            for p in module.parameters():
                if p.is_floating_point():
                    # Along a dimension of stride 0 a parameter repeats itself. Of its data no graph takes notice.
                    own = p.data[tuple(slice(1) if stride == 0 else slice(None) for stride in p.stride())]
                    own.copy_(jitter(own))
        outputs = [x for x in tree_leaves(forward(*args, **kwargs)) if isinstance(x, Tensor)]
        differentiable = [x for x in outputs if x.requires_grad]
        leaves = [x for x in (*inputs, *module.parameters()) if x.requires_grad]
        generator.manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in differentiable]
        gradients = (
            torch.autograd.grad(differentiable, leaves, weights, allow_unused=True, materialize_grads=True)
            if differentiable
            else ()
        )
        # What the module keeps is about to be put back, and results may lie in its memory.
        return [x.detach().clone() for x in (*outputs, *gradients)]


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


@dataclass
class _Softmaxes:
    """The softmaxes that one module takes."""

    codes: set[types.CodeType] = field(default_factory=set)
    """The functions that take them."""
    times: Counter[nn.Module] = field(default_factory=Counter)
    """How many, in the first call of it and of each module around it."""

    def holds(self, place: tuple[str, int] | None) -> bool:
        """Whether a file and line belong to them."""
        return place is None or any(
            code.co_filename == place[0]
            and code.co_firstlineno <= place[1] <= max(line or 0 for _, _, line in code.co_lines())
            for code in self.codes
        )


class _Watch(TorchDispatchMode):
    """While a model runs, sees which modules normalise by exponentials, in which others, and with what arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.stack: list[nn.Module] = []
        self.softmaxes: dict[tuple[nn.Module, ...], _Softmaxes] = {}
        self.calls: dict[nn.Module, tuple[tuple, dict]] = {}
        self.first: set[nn.Module] = set()
        self.exponentials, self.sums, self.logarithms = (WeakTensorKeyDictionary() for _ in range(3))

    def __enter__(self) -> _Watch:
        def entered(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.stack.append(module)
            if module not in self.calls:
                self.calls[module] = args, kwargs
                self.first.add(module)

        def left(module: nn.Module, *_: Any) -> None:
            self.stack.remove(module)
            if module not in self.stack:
                self.first.discard(module)

        # ScriptModules have no hooks of their own.
        scripted = {module for module in self.model.modules() if isinstance(module, torch.jit.ScriptModule)}

        self.hooks = [
            hook
            for module in self.model.modules()
            if not type(module).__module__.startswith("torch.nn") and not isinstance(module, torch.jit.ScriptModule)
            for hook in (
                module.register_forward_pre_hook(entered, with_kwargs=True),
                module.register_forward_hook(left, always_call=True),
            )
        ]
        if scripted:
            self.hooks += [
                register_module_forward_pre_hook(lambda m, args: entered(m, args, {}) if m in scripted else None),
                register_module_forward_hook(lambda m, *_: left(m) if m in scripted else None, always_call=True),
            ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **kwargs or {})
        name = func.__name__
        normalises = self._divides(name, args, out) or "softmax" in name or "logsumexp" in name
        if self.stack and normalises:
            softmaxes = self.softmaxes.setdefault(tuple(self.stack), _Softmaxes())
            softmaxes.codes.add(_calling())
            if "logsumexp" not in name:
                softmaxes.times.update(self.first.intersection(self.stack))
        return out

    def _divides(self, name: str, args: tuple, out: Any) -> bool:
        """Whether exponentials are divided by their sum, a softmax that is written out; keeps account of both, and of
        logarithms of softmaxes, whose exponentials are no such thing."""
        x, by = ([x for x in args if isinstance(x, Tensor)] + [None, None])[:2]
        if x is None or name.startswith("_softmax"):  # of logits that a learnt temperature, an exponential, scales
            return False
        if name.startswith(("_log_softmax", "logsumexp")):
            self.logarithms[out] = True
        elif name.startswith(("exp.", "exp_.")):
            if x not in self.logarithms:
                self.exponentials[out] = True
        elif name.startswith("sum.") and x in self.exponentials:
            self.sums[out] = True
        elif name.startswith(("div.", "div_.")):
            return by is not None and x in self.exponentials and by in self.sums
        elif isinstance(out, Tensor):
            # Views, sums with epsilon, masks.
            for account in (self.exponentials, self.sums, self.logarithms):
                if any(own in account and own.numel() <= out.numel() for own in (x, by) if own is not None):
                    account[out] = True
        return False


def _calling() -> types.CodeType:
    """The code of the innermost function that is not torch's, nor ours."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith((TORCH, __file__)):
        frame = frame.f_back
    return frame.f_code
