"""What a call of a model may change: kept before it, and put back after it.

`as_before(model)` is around every trial run. It follows references from the model's modules, by what they are:

    Tensor              its storage's bytes, once however many tensors share it; which storage, shape and class it has;
                        .grad, requires_grad, hooks and the version that autograd counts
    nn.Module           attributes, of which parameters, buffers, submodules, hooks and `training` are some
    list, dict, set...  what is in it, in its order
    NumPy's arrays      what is in them, their shape and dtype
    generators          the states of torch's, NumPy's and Python's own, and of any that are found
    functions           of hooks and methods: closures, attributes, and the globals that their code names or makes
    objects             attributes, where their class comes from where the model's modules do, or they are hooks

Whatever was changed is put back in place, so that everyone who holds it sees it; what was not is not written to, and
may lie in memory that cannot be. Out of reach are files, what is printed, iterators, C++ objects, scripted modules'
attributes, and objects of other libraries, of which other threads may be in the midst.
"""

from __future__ import annotations

import argparse
import collections
import dis
import functools
import itertools
import random
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from iio_kernels.acceleration import torch_private


@contextmanager
def as_before(model: nn.Module, *arguments: Any) -> Iterator[None]:
    """Put back what happens within to the model, to arguments of its call and to random number generators.

    It takes as much memory as all tensors that the model holds, in main memory whatever their device.
    """
    kept = _Kept(model, arguments)
    try:
        yield
    finally:
        kept.put_back()


#: Attributes of an object are kept if it is one of these, wherever its class comes from.
HOLDERS = (
    argparse.Namespace, types.SimpleNamespace, collections.UserDict, collections.UserList,
    torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler,
)  # fmt: skip

#: What belongs to these has no state of a model's. Packages are meant by the first part of their names.
FOREIGN = {*sys.stdlib_module_names, "torch", "numpy", "triton", "iio_kernels"} - {"__main__"}

#: What is followed of a file's globals that a function names.
DATA = (
    Tensor, np.ndarray, nn.Module, dict, list, set, tuple, collections.deque,
    torch.Generator, random.Random, np.random.Generator, np.random.RandomState,
)  # fmt: skip

#: The methods that return the tensors of which a sparse one is made.
COMPONENTS = {
    torch.sparse_coo: ("_indices", "_values"),
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values")),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values")),
}

ABSENT = object()


class _Kept:
    """All that is reached from a model and the arguments of its call, as it was."""

    def __init__(self, model: nn.Module, arguments: Any) -> None:
        self.undo: list[Callable[[], Any]] = []
        self.seen: dict[Any, Any] = {}
        """What was reached, by identity. It is held here: an identity is another's once its object is gone."""
        self.authors = {_package(type(module)) for module in model.modules()} - FOREIGN | {"__main__"}
        self.hooks: set[int] = set()
        """The identities of objects that serve as hooks, or whose methods do."""
        self.left = [model, arguments, torch.default_generator]
        if torch.cuda.is_initialized():
            self.left += torch.cuda.default_generators
        self._keep_state(random.getstate, random.setstate)
        self._keep_state(np.random.get_state, np.random.set_state)
        with _plain_tensors():
            self._find_hooks(vars(nn.modules.module))
            while self.left:
                x = self.left.pop()
                if id(x) not in self.seen:
                    self.seen[id(x)] = x
                    self._keep(x)

    def put_back(self) -> None:
        # The last first: a tensor has its shape again before its gradient is set.
        failed: list[Exception] = []
        with _plain_tensors():
            for undo in reversed(self.undo):
                try:
                    undo()
                except Exception as error:  # what is left to put back is, whatever this was
                    failed.append(error)
        if failed:
            raise failed[0]

    # -- by kind

    def _keep(self, x: Any) -> None:
        if x is None or isinstance(x, (str, bytes, int, float, complex, types.ModuleType)):
            return
        if isinstance(x, Tensor):
            self._keep_tensor(x)
        elif isinstance(x, np.ndarray):
            self._keep_array(x)
        elif isinstance(x, torch.Generator):
            self._keep_state(x.get_state, x.set_state)
        elif isinstance(x, random.Random):
            self._keep_state(x.getstate, x.setstate)
        elif isinstance(x, np.random.RandomState):
            self._keep_state(x.get_state, x.set_state)
        elif isinstance(x, np.random.Generator):
            self.left.append(x.bit_generator)
        elif isinstance(x, np.random.BitGenerator):
            self._keep_state(lambda: x.state, lambda state: setattr(x, "state", state))
        elif isinstance(x, type):
            self._keep_class(x)
        elif isinstance(x, types.FunctionType):
            self._keep_function(x)
        elif isinstance(x, types.CellType):
            self._keep_value(lambda: x.cell_contents, lambda value: setattr(x, "cell_contents", value))
        elif isinstance(x, types.MethodType):
            self.left += [x.__func__, x.__self__]
        elif isinstance(x, (staticmethod, classmethod)):
            self.left.append(x.__func__)
        elif isinstance(x, property):
            self.left += [x.fget, x.fset]
        elif isinstance(x, functools.partial):
            self.left += [x.func, x.args, x.keywords]
        elif isinstance(x, (tuple, frozenset)):
            self.left += x
        elif isinstance(x, torch.jit.ScriptModule):
            self.left += [*x.parameters(), *x.buffers()]
        elif isinstance(x, (dict, list, set, collections.deque)):
            self._keep_container(x)
            self._keep_attributes(x)
        elif isinstance(x, (nn.Module, *HOLDERS)) or id(x) in self.hooks or _package(type(x)) in self.authors:
            self._keep_attributes(x)

    def _keep_state(self, get: Callable[[], Any], put: Callable[[Any], Any]) -> None:
        state = get()
        self.undo.append(lambda: put(state))

    def _keep_value(self, get: Callable[[], Any], put: Callable[[Any], Any]) -> None:
        """What is in a place for one object, and that object."""
        before = _or_absent(get)
        self.left.append(before)

        def undo() -> None:
            if before is not ABSENT and _or_absent(get) is not before:
                put(before)

        self.undo.append(undo)

    def _keep_container(self, x: Any) -> None:
        """What is in a dict, list, set or deque."""
        of: Any
        # By the methods of Python's own class: those of a subclass may do something else besides.
        of = next(kind for kind in (collections.OrderedDict, dict, list, set, collections.deque) if isinstance(x, kind))
        pairs = issubclass(of, dict)
        before = list(of.items(x) if pairs else of.__iter__(x))
        self.left += itertools.chain.from_iterable(before) if pairs else before
        add = of.extend if of in (list, collections.deque) else of.update

        def undo() -> None:
            now = list(of.items(x) if pairs else of.__iter__(x))
            if _identities(now, pairs) != _identities(before, pairs):
                of.clear(x)
                add(x, before)

        self.undo.append(undo)

    def _keep_attributes(self, x: Any) -> None:
        attributes = getattr(x, "__dict__", None)
        if isinstance(attributes, dict):
            self._find_hooks(attributes)
            self.left.append(attributes)
        for name in {name for cls in type(x).__mro__ for name in _slots(cls)}:
            self._keep_value(functools.partial(getattr, x, name), functools.partial(setattr, x, name))
        # A lazy module becomes another, and its parameters with it.
        self._keep_value(lambda: type(x), lambda kind: object.__setattr__(x, "__class__", kind))

    def _find_hooks(self, attributes: dict[str, Any]) -> None:
        for name, hooks in attributes.items():
            if name.endswith("_hooks") and isinstance(hooks, dict):
                self.hooks |= {id(getattr(hook, "__self__", hook)) for hook in hooks.values()}
                self.left.append(hooks)

    def _keep_class(self, x: type) -> None:
        """What its instances share, and its methods for what they refer to."""
        if _package(x) in FOREIGN:
            return
        self.left += x.__mro__
        before = {name: value for name, value in vars(x).items() if not name.startswith("__")}
        self.left += before.values()

        def undo() -> None:
            for name in [name for name in vars(x) if not name.startswith("__") and name not in before]:
                type.__delattr__(x, name)
            for name, value in before.items():
                if vars(x).get(name, ABSENT) is not value:
                    type.__setattr__(x, name, value)

        self.undo.append(undo)

    def _keep_function(self, x: types.FunctionType) -> None:
        self.left += [x.__closure__, x.__defaults__, x.__kwdefaults__, x.__dict__]
        if _package(x) in FOREIGN:
            return
        of = x.__globals__
        for name in _names(x.__code__) & of.keys():
            value = of[name]
            self.undo.append(functools.partial(_set_global, of, name, value))
            # Functions lead on within their file. Classes and other objects might lead anywhere.
            if isinstance(value, DATA) or (isinstance(value, types.FunctionType) and value.__globals__ is of):
                self.left.append(value)
        for name in _stored_globals(x.__code__) - of.keys():
            self.undo.append(functools.partial(of.pop, name, None))

    def _keep_array(self, x: np.ndarray) -> None:
        if x.dtype.hasobject:
            self.left += x.ravel().tolist()
        if x.flags.writeable and not isinstance(x, np.memmap):
            before = x.copy()

            def undo() -> None:
                if not x.flags.writeable:
                    x.flags.writeable = True
                if x.dtype != before.dtype:
                    x.dtype = before.dtype  # type: ignore[misc]
                if x.shape != before.shape:
                    x.resize(before.shape, refcheck=False)
                if not _same_bytes(x, before):
                    np.copyto(x, before)

            self.undo.append(undo)

    def _keep_tensor(self, x: Tensor) -> None:
        self.left += [x.__dict__, x._backward_hooks]
        if is_traceable_wrapper_subclass(x):
            self.left += [getattr(x, name) for name in x.__tensor_flatten__()[0]]
            return
        if x.layout is not torch.strided:
            self.left += [getattr(x, name)() for name in COMPONENTS.get(x.layout, ())]
            return
        leaf, wanted, kind = x.is_leaf, x.requires_grad, type(x)
        version = None if x.is_inference() else x._version
        data = x.data  # the same memory and shape, whatever x will have
        if leaf:
            self._keep_value(lambda: x.grad, lambda grad: setattr(x, "grad", grad))

        def undo() -> None:
            if type(x) is not kind:
                x.__class__ = kind
            if _place(x) != _place(data):
                x.data = data
            if leaf and not x.is_leaf and not x._is_view():
                x.detach_()
            if x.is_leaf and x.requires_grad != wanted:
                x.requires_grad_(wanted)
            if version is not None and x._version != version:
                torch_private.set_version(x, version)

        self.undo.append(undo)
        self._keep_storage(data.untyped_storage())

    def _keep_storage(self, x: torch.UntypedStorage) -> None:
        key = "storage", torch_private.identity_of(x)
        if key in self.seen or x.device.type == "meta":
            return
        self.seen[key] = x
        size, before = x.nbytes(), _bytes(x).to("cpu", copy=True)

        def undo() -> None:
            if x.nbytes() != size:
                x.resize_(size)
            now, then = _bytes(x), before.to(x.device)
            if not torch.equal(now, then):
                now.copy_(then)

        self.undo.append(undo)


# --- details ---------------------------------------------------------------------------------------------------------


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """No modes, no subclass's idea of what its methods are, and no gradients."""
    with (
        torch_private.without_modes_and_subclasses(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield


def _package(of: Any) -> str:
    return (getattr(of, "__module__", None) or "").partition(".")[0]


def _or_absent(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except (AttributeError, ValueError):  # a slot or a cell without anything in it
        return ABSENT


def _set_global(of: dict[str, Any], name: str, value: Any) -> None:
    if of.get(name, ABSENT) is not value:
        of[name] = value


def _identities(items: list[Any], pairs: bool) -> list[Any]:
    return [tuple(map(id, item)) for item in items] if pairs else list(map(id, items))


def _slots(cls: type) -> list[str]:
    names = vars(cls).get("__slots__", ())
    names = [names] if isinstance(names, str) else names
    return [name for name in names if name not in ("__dict__", "__weakref__") and not name.startswith("__")]


def _names(code: types.CodeType) -> set[str]:
    """The names that a function's code has, and that of the functions in it."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*inner)


STORES = dis.opmap["STORE_GLOBAL"]


def _stored_globals(code: types.CodeType) -> set[str]:
    """The globals that a function's code may make, and that of the functions in it."""
    inner = (_stored_globals(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    own = dis.get_instructions(code) if STORES in code.co_code else ()  # which takes long
    return {instruction.argval for instruction in own if instruction.opcode == STORES}.union(*inner)


def _place(x: Tensor) -> tuple[Any, ...]:
    # Not its shape, which a lazy parameter has none of.
    return torch_private.identity_of(x.untyped_storage()), x.storage_offset(), x.size(), x.stride(), x.dtype, x.device


def _same_bytes(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether arrays of one shape and dtype hold the same, NaN and the signs of zeros included."""
    return x.tobytes() == y.tobytes()


def _bytes(x: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x)
