"""What torch.compile's tracer does otherwise in the traces of `accelerate`, and in no others.

It stops at some of what modules do between the steps of slot attention, and where it stops inside a loop it leaves
the whole function alone. Here

- an assertion about tensors, or an `if` that raises, becomes a `check` in the graph, whatever its message; if it
  fails, the module's own code is run from its beginning, which raises (the tracer stops, as it would, at an assertion
  behind something that this would do twice: a write, a random draw, or whatever ran where the tracer had stopped);
- NumPy's functions of numbers, `np.sqrt(q.shape[-1])` say, are computed when the code is traced;
- where the tracer stops inside a loop, it goes on behind that place;
- it stops at operations on NumPy's arrays, which it would carry out, `array += 1` too, and at draws from a
  `random.Random`, which it would repeat at every call.
"""

from __future__ import annotations

import functools
import operator
import re
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.node import Node, has_side_effect
from torch.utils._pytree import tree_leaves

from iio_kernels.acceleration.graph import TORCH, example, written_by
from iio_kernels.acceleration.torch_private import memory_of

_ours = threading.local()


class CheckFailed(Exception):
    """An assertion of the module does not hold."""


@has_side_effect
def check(condition: Tensor) -> None:
    """What becomes of an assertion."""
    if not condition:
        raise CheckFailed


#: Of torch.compile, while it traces by our rules.
SETTINGS = {
    "trace_numpy": False,  # traced, NumPy's random numbers would be torch's
    "skip_nnmodule_hook_guards": False,  # hooks that come after a trace count
}


@contextmanager
def our_rules(forward: Callable) -> Iterator[None]:
    """Have torch.compile trace as it is said above, where `forward` is what is called, and called again if a check
    fails."""
    _install()
    # `config.patch` makes a ContextVar at each call, which the thread's context keeps for ever. What is set here is
    # this thread's too.
    config = torch._dynamo.config
    before, settings = _called(), {name: getattr(config, name) for name in SETTINGS if hasattr(config, name)}
    _ours.called = forward
    try:
        for name in settings:
            setattr(config, name, SETTINGS[name])
        yield
    finally:
        _ours.called = before
        for name, value in settings.items():
            setattr(config, name, value)


@contextmanager
def modes_as_before() -> Iterator[None]:
    """Leave the regions of `no_grad`, `enable_grad` and autocast that an exception is raised in.

    A graph enters and leaves them by calls. Where an exception comes between, gradients would stay off, or autocast on,
    whose cache would go on giving parameters as they were then.
    """
    gradients = torch.is_grad_enabled()
    devices = [device for device in ("cpu", "cuda") if torch.amp.is_autocast_available(device)]
    before = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices]
    cached, depth = torch.is_autocast_cache_enabled(), torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    try:
        yield
    except BaseException:
        torch.set_grad_enabled(gradients)
        torch.autocast_increment_nesting()
        while torch.autocast_decrement_nesting() > depth:
            pass
        if depth == 0:
            torch.clear_autocast_cache()
        for device, (enabled, dtype) in zip(devices, before, strict=True):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(cached)
        raise


def _called() -> Callable | None:
    """What is traced by our rules in this thread, if anything."""
    return getattr(_ours, "called", None)


@functools.cache
def _install() -> None:
    """Put our rules before the tracer's own; outside `our_rules` its own count."""
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase as Tracer
    from torch._dynamo.variables.builtin import BuiltinVariable
    from torch._dynamo.variables.misc import NumpyVariable, RandomVariable

    _put_before(Tracer, "step", _checked)
    _put_before(Tracer, "maybe_has_backedge", lambda tracer: False)
    _put_before(NumpyVariable, "call_function", _computed)
    _put_before(BuiltinVariable, "call_function", _of_arrays)
    _put_before(RandomVariable, "call_method", _drawn)


def _put_before(cls: type, name: str, rule: Callable) -> None:
    """Have a method's calls go to a rule of ours first, which returns None where it has nothing to say."""
    own = getattr(cls, name, None)
    if own is None:  # another version of torch: then it stops where it would
        return

    @functools.wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = rule(self, *args, **kwargs) if _called() is not None else None
        return own(self, *args, **kwargs) if result is None else result

    setattr(cls, name, method)


#: Jumps by what is on the stack, and whether they jump if it is true.
JUMPS = {
    "POP_JUMP_IF_TRUE": True,
    "POP_JUMP_IF_FALSE": False,
    "POP_JUMP_FORWARD_IF_TRUE": True,
    "POP_JUMP_FORWARD_IF_FALSE": False,
}


def _checked(tracer: Any) -> bool | None:
    """A jump over a `raise`, by a tensor's value: the condition becomes a check, and the jump is made."""
    instruction = tracer.instructions[tracer.instruction_pointer] if tracer.instruction_pointer is not None else None
    if instruction is None or instruction.opname not in JUMPS or not tracer.stack:
        return None
    condition = tracer.stack[-1].realize()
    if not isinstance(condition, torch._dynamo.variables.TensorVariable) or not _raises(tracer, instruction.target):
        return None
    if not _may_begin_again(tracer):
        return None
    tracer.current_instruction = instruction
    tracer.pop()
    holds = condition.as_proxy()
    if not JUMPS[instruction.opname]:
        holds = tracer.output.create_proxy("call_function", operator.not_, (holds,), {})
    tracer.output.create_proxy("call_function", check, (holds,), {})
    tracer.jump(instruction)
    return True


def _raises(tracer: Any, target: Any) -> bool:
    """Whether the code between here and a jump's target does nothing but make an exception and raise it."""
    skipped = tracer.instructions[tracer.instruction_pointer + 1 : tracer.indexof[target]]
    inside = {id(instruction) for instruction in skipped}
    leaves = any(i.target is not None and id(i.target) not in inside for i in skipped)
    return bool(skipped) and skipped[-1].opname == "RAISE_VARARGS" and not leaves


def _may_begin_again(tracer: Any) -> bool:
    """Whether what was called can be called again in the midst of this trace: nothing ran before the trace, and
    nothing in it so far writes to what outlives it or draws random numbers. (Attributes are set behind the graph.)"""
    output = tracer.output
    begun = any(code is output.root_tx.f_code for code in _first_codes(_called()))
    if not begun or output.random_calls:
        return False
    nodes = [node for part in output.tracers for node in part.graph.nodes]
    inputs = {_where(node) for node in nodes if node.op in ("placeholder", "get_attr")}
    return not any(_draws(node) or any(_where(x) in inputs for x in _written(node)) for node in nodes)


def _first_codes(function: Any) -> Iterator[types.CodeType]:
    """The code that runs first when a function is called, be that of torch's decorators around it, as `no_grad` is."""
    ours = False
    while function is not None and not ours:
        if isinstance(function, functools.partial):
            function = function.func
            continue
        code = getattr(function, "__code__", None)
        if code is not None:
            yield code
            ours = not code.co_filename.startswith(TORCH)
        function = getattr(function, "__wrapped__", None)


def _where(node: Node) -> Any:
    """What tells a tensor's memory from others'; of a sparse one it is not known."""
    x = example(node)
    return memory_of(node) if isinstance(x, Tensor) and x.layout is torch.strided else None


#: Functions that write to their second and third arguments, if their sixth, or one of this name, is true.
STATISTICS = {"batch_norm": ("training", False), "instance_norm": ("use_input_stats", True)}


def _written(node: Node) -> list[Node]:
    """The tensors that a function or method writes to."""
    name = _name(node)
    op = getattr(node.target, "default", node.target)
    arguments: list[Node] = [x for x in tree_leaves((node.args, node.kwargs)) if isinstance(x, Node)]
    if isinstance(op, torch._ops.HigherOrderOperator) or (
        isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable
    ):
        return arguments
    if name in STATISTICS:
        return arguments if _argument(node, 5, *STATISTICS[name]) else []
    if name.startswith("_foreach") and name.endswith("_"):
        return arguments
    written = written_by(node)
    return [] if written is None else [written]


#: Functions that draw random numbers.
DRAWS = re.compile(
    r"(rand|randn|randint|randperm)(_like)?|(log_|trunc_)?normal_?|bernoulli_?|multinomial|poisson|binomial|"
    r"(exponential|cauchy|geometric|random|uniform)_|_standard_gamma|_sample_dirichlet|gumbel_softmax|"
    r"fractional_max_pool\dd.*"
)

#: Those that do so if some of their arguments are not 0 or False: where these are, their names and defaults.
DRAWS_IF = {
    **dict.fromkeys(
        [
            f"{kind}dropout{to}"
            for kind in ("", "alpha_", "feature_", "feature_alpha_")
            for to in ("", "1d", "2d", "3d")
        ],
        ((1, "p", 0.5), (2, "training", True)),
    ),
    **dict.fromkeys(("gru", "lstm", "rnn_tanh", "rnn_relu"), ((5, "dropout", 0.0), (6, "train", False))),
    "rrelu": ((3, "training", False),),
    "scaled_dot_product_attention": ((4, "dropout_p", 0.0),),
    "multi_head_attention_forward": ((10, "dropout_p", 0.0), (13, "training", True)),
}


def _draws(node: Node) -> bool:
    """Whether a function or method draws random numbers."""
    op = getattr(node.target, "default", node.target)
    if isinstance(op, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in op.tags:
        return True
    name = _name(node)
    conditions = DRAWS_IF.get(name.removesuffix("_"))
    return bool((conditions and all(_argument(node, *where) for where in conditions)) or DRAWS.fullmatch(name))


def _argument(node: Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _name(node: Node) -> str:
    if not node.op.startswith("call"):
        return ""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


#: NumPy's functions that make a number of numbers, beside the element-wise ones.
REDUCTIONS = {np.amax, np.amin, np.max, np.mean, np.min, np.prod, np.sum}


def _computed(variable: Any, tracer: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """A number that NumPy makes of numbers that are known when the code is traced."""
    function = variable.value
    scalar = isinstance(function, type) and issubclass(function, np.number)
    if not (isinstance(function, np.ufunc) or scalar or function in REDUCTIONS):
        return None
    try:
        numbers = [_known(x) for x in args], {name: _known(x) for name, x in kwargs.items()}
    except (NotImplementedError, torch._dynamo.exc.Unsupported):
        return None
    result = function(*numbers[0], **numbers[1])
    if not isinstance(result, (np.generic, int, float)):
        return None
    return torch._dynamo.variables.ConstantVariable.create(result.item() if isinstance(result, np.generic) else result)


def _of_arrays(_: Any, tracer: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """An operator's or built-in function's call: on an array it is not made while the code is traced."""
    from torch._dynamo.variables.misc import NumpyVariable

    for x in args:
        x = x.realize()
        if isinstance(x, NumpyVariable) and isinstance(x.value, np.ndarray):
            raise torch._dynamo.exc.Unsupported("an operation on a NumPy array")


def _drawn(*_: Any) -> None:
    """A method of a `random.Random`."""
    raise torch._dynamo.exc.Unsupported("a method of a random.Random")


def _known(variable: Any) -> Any:
    """A variable's value. Of a symbolic size it is looked at, and the trace is for that size."""
    variable = variable.realize()
    if isinstance(variable, torch._dynamo.variables.tensor.SymNodeVariable):
        return variable.evaluate_expr()
    if isinstance(variable, torch._dynamo.variables.BaseListVariable):
        return [_known(x) for x in variable.items]
    return variable.as_python_constant()
