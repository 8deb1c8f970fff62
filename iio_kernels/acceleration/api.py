"""`accelerate` and `restore`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from iio_kernels.acceleration import torch_private
from iio_kernels.acceleration.forward import Accelerated
from iio_kernels.acceleration.report import Report
from iio_kernels.acceleration.trials import accelerate_on


def accelerate(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Find the slot attention in a model, prove for each module that ours is the same, and put it in its place.

    A module is recognised by what it computes, not by its name: the softmax over slots of the products of queries with
    keys, normalised over inputs, times values. It may have heads, masks, biases by slot, and several kinds of queries.
    It may be written as `softmax`, by exponentials or by logarithms, with an epsilon or two, or with a sum bounded from
    below, in any order of dimensions. (Where exponentials overflow, or all become 0, the module's own code gives NaN,
    and ours the softmax.) Where keys and values are linear in one input, they are not made any more
    (`slot_attention_from_inputs`). Everything else in the module stays its own code: GRU, MLP, noise, control flow.

    torch.compile traces the module's `forward`, with a compiler that replaces slot attention and nothing else. Its
    guards trace it again where anything that it depends on has changed: a shape, a number of iterations, train or eval,
    autocast, hooks. A method that is replaced on a class later is not seen, as in torch.compile. Parameters,
    state_dict, hooks and submodules are untouched. What is replaced is proved first:

    - each replaced step, whenever it is traced, against the module's own in float64, on random numbers: outputs and
      gradients to 1e-10;
    - each module, on the example: outputs and gradients against the module's own, to what changing the last bits of
      its inputs and parameters changes.

    What cannot be proved is left alone, and the report says why. If only some of a module's softmaxes are replaced, the
    report says how many, and why not the others. Later traces, of other shapes or modes, have the first proof alone,
    and so have those of `backend="iio_kernels"`.

    Assertions about tensors, an `if` that raises and NumPy's functions of shapes do not stop the tracer. Should an
    assertion fail, the module's own code is run, and raises. The tracer does stop at an assertion behind a write to a
    buffer or a random draw, which would happen twice. Where it stops inside a loop, at `.item()` say, it goes on behind
    that place. Where that leaves a softmax without its mean, the report gives the file and line.

    Args:
        model: any module, changed in place. Calling this again takes up what has been added to it.
        args, kwargs: an example of what the model is called with, in the mode (train or eval, autocast) that matters
            most. Without one, the model's first call serves. The model is run once, without gradients, and each module
            that takes a softmax three times more, hooks and prints included. What these runs change is put back, to the
            bit, also when one raises: parameters, buffers, gradients, attributes and what is in them, random number
            generators, what hooks and methods refer to (see acceleration/state.py). A copy of all tensors that the
            model holds is kept meanwhile in main memory. Warnings and log lines of the tracer and of the trials are not
            shown.

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
        accelerate_on(model, args, kwargs, report)
        return report
    for hook in torch_private.forward_pre_hooks(model):
        if isinstance(hook, FirstCall):
            return hook.report
    report = Report(pending=True)
    # The first of the hooks: the example is what the model is called with.
    model.register_forward_pre_hook(FirstCall(report), prepend=True, with_kwargs=True)
    return report


class FirstCall:
    """The hook that takes a model's first call for an example."""

    def __init__(self, report: Report) -> None:
        self.report, self.running = report, False

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling() or torch_private.in_transform() or self.running:
            return
        self.running = True
        try:
            accelerate_on(model, args, kwargs, self.report)
        finally:
            self.running = False
        self.remove(model)
        self.report.pending = False

    @staticmethod
    def remove(model: nn.Module) -> None:
        torch_private.remove_forward_pre_hooks(model, FirstCall)


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
        FirstCall.remove(module)
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, Accelerated):
            del module.forward
            if forward.own is not None:
                module.forward = forward.own
