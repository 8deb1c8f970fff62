"""What a node of a graph of torch's functions is: its name, example and place, and what it writes to."""

from __future__ import annotations

import operator
import os
import re
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from iio_kernels.acceleration.torch_private import memory_of

#: Where torch's own code lies.
TORCH = os.path.dirname(torch.__file__)


def example(node: Node) -> Any:
    """The fake tensor, or number, that torch.compile had in a node's place."""
    return node.meta.get("example_value", node.meta.get("val"))


def name_of(node: Node) -> str:
    """A function's or method's plain name, without what says that it writes to its first argument."""
    if not node.op.startswith("call"):
        return ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name[1:] if is_augmented(node) else name.strip("_")


def place_of(node: Node) -> tuple[str, int] | None:
    """The file and line of a node, where torch's own code does not count."""
    found = re.findall(r'File "(.*)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(file, int(line)) for file, line in found if not file.startswith(TORCH)]
    return own[-1] if own else None


def descendants(node: Node) -> set[Node]:
    """A node and whatever is made of it."""
    found, stack = {node}, [node]
    while stack:
        new = stack.pop().users.keys() - found
        found |= new
        stack += new
    return found


#: Functions that return their argument's own memory without writing to it.
VIEWS = {
    "adjoint", "alias", "as_strided", "bfloat16", "broadcast_to", "chunk", "contiguous", "cpu", "cuda",
    "detach", "diagonal", "double", "expand", "expand_as", "flatten", "float", "getattr", "getitem", "half",
    "moveaxis", "movedim", "narrow", "permute", "positive", "ravel", "real", "reshape", "reshape_as", "select",
    "split", "squeeze", "swapaxes", "swapdims", "t", "tensor_split", "to", "transpose", "type", "type_as",
    "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as",
}  # fmt: skip


def written_by(node: Node) -> Node | None:
    """The tensor that a function or method writes to: an output given to it, or its first argument.

    What returns its first argument's memory and is no view that is known here is taken to write to it.
    """
    if not node.op.startswith("call"):
        return None
    first = node.kwargs.get("out", node.args[0] if node.args else None)
    if not isinstance(first, Node) or not isinstance(example(first), Tensor):
        return None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = is_augmented(node) or node.kwargs.get("inplace") is True or (name[-1:] == "_" and name[-2:] != "__")
    if in_place or "out" in node.kwargs or node.target is operator.setitem:
        return first
    shared = isinstance(example(node), Tensor) and memory_of(node) == memory_of(first)
    return first if shared and name_of(node) not in VIEWS else None


def is_augmented(node: Node) -> bool:
    """Whether this is an augmented assignment, such as `operator.iadd`."""
    name = getattr(node.target, "__name__", "")
    return name[:1] == "i" and hasattr(operator, name[1:]) and getattr(operator, name, None) is node.target
