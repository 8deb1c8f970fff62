"""What torch.compile's tracer does otherwise in the traces of `accelerate`, and in no others.

It stops at some of what modules do between the steps of slot attention, and where it stops inside a loop it leaves
the whole function alone. Here

- an assertion about tensors, or an `if` that raises, becomes a `check` in the graph, whatever its message; if it
  fails, the module's own code is run, which raises;
- NumPy's functions of numbers, `np.sqrt(q.shape[-1])` say, are computed when the code is traced;
- where the tracer stops inside a loop, it goes on behind that place.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.node import has_side_effect

_ours = threading.local()


class CheckFailed(Exception):
    """An assertion of the module does not hold."""


@has_side_effect
def check(condition: Tensor) -> None:
    """What becomes of an assertion."""
    if not condition:
        raise CheckFailed


@contextmanager
def our_rules() -> Iterator[None]:
    """Have torch.compile trace as it is said above."""
    _install()
    # Traced, NumPy's random numbers would be torch's.
    with torch._dynamo.config.patch(trace_numpy=False):
        before, _ours.active = active(), True
        try:
            yield
        finally:
            _ours.active = before


def active() -> bool:
    return getattr(_ours, "active", False)


@functools.cache
def _install() -> None:
    """Put our rules before the tracer's own; outside `our_rules` its own count."""
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase as Tracer
    from torch._dynamo.variables.misc import NumpyVariable

    _put_before(Tracer, "step", _checked)
    _put_before(Tracer, "maybe_has_backedge", lambda tracer: False)
    _put_before(NumpyVariable, "call_function", _computed)


def _put_before(cls: type, name: str, rule: Callable) -> None:
    """Have a method's calls go to a rule of ours first, which returns None where it has nothing to say."""
    own = getattr(cls, name, None)
    if own is None:  # another version of torch: then it stops where it would
        return

    @functools.wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = rule(self, *args, **kwargs) if active() else None
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


def _known(variable: Any) -> Any:
    """A variable's value. Of a symbolic size it is looked at, and the trace is for that size."""
    variable = variable.realize()
    if isinstance(variable, torch._dynamo.variables.tensor.SymNodeVariable):
        return variable.evaluate_expr()
    if isinstance(variable, torch._dynamo.variables.BaseListVariable):
        return [_known(x) for x in variable.items]
    return variable.as_python_constant()
