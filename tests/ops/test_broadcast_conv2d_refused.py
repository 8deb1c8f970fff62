"""What the broadcast convolution refuses, in which words."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_refused
from torch import Tensor

from iio_kernels import broadcast_conv2d

OPERATION = "broadcast_conv2d"


def good(transposed: bool = False, **changes) -> dict[str, object]:
    """Good arguments, but for the changes: a 5 x 6 grid, 3 taps."""
    shape = (4, 2, 3, 3) if transposed else (2, 4, 3, 3)
    tensors = {"z": torch.rand(7, 4), "weight": torch.rand(shape), "position_map": torch.rand(2, 5, 6)}
    return {**tensors, "size": (5, 6), "padding": 1, "transposed": transposed, **changes}


# A row: the arguments, the type of the error, and what its message must hold in this order.
TABLE = [
    (good(z=None), TypeError, ["z", "torch.Tensor (..., D)", "NoneType"]),
    (good(z=torch.ones(7, 4, dtype=torch.int32)), TypeError, ["z", "float32", "torch.int32"]),
    (good(z=torch.rand(7, 4) + 0j), TypeError, ["z", "float32", "torch.complex64"]),
    (good(z=torch.rand(())), ValueError, ["z", "(..., D)", "()"]),
    (good(weight=[[0.0]]), TypeError, ["weight", "torch.Tensor (O, D, kh, kw)", "list"]),
    (good(weight=torch.rand(2, 4, 3)), ValueError, ["weight", "(O, D, kh, kw)", "(2, 4, 3)"]),
    (good(True, weight=torch.rand(2, 4, 3)), ValueError, ["weight", "(D, O, kh, kw)", "(2, 4, 3)"]),
    (good(weight=torch.rand(2, 5, 3, 3)), ValueError, ["weight", "D = 4", "z (7, 4)", "(2, 5, 3, 3)"]),
    (good(True, weight=torch.rand(5, 2, 3, 3)), ValueError, ["weight", "D = 4", "z (7, 4)", "(5, 2, 3, 3)"]),
    (good(weight=torch.rand(2, 4, 0, 3)), ValueError, ["weight", "empty", "(2, 4, 0, 3)"]),
    (good(position_map=torch.rand(1, 2, 5, 6)), ValueError, ["position_map", "(O, H', W')", "(1, 2, 5, 6)"]),
    (good(position_map=torch.rand(3, 5, 6)), ValueError, ["position_map", "2 channels", "weight", "(3, 5, 6)"]),
    (good(position_map=torch.rand(2, 4, 6)), ValueError, ["position_map", "H' = 5", "size 5", "3 taps", "(2, 4, 6)"]),
    (good(position_map=torch.rand(2, 5, 7)), ValueError, ["position_map", "W' = 6", "size 6", "3 taps", "(2, 5, 7)"]),
    (good(True, stride=2), ValueError, ["position_map", "H' = 9 to 10", "stride 2 and padding 1", "(2, 5, 6)"]),
    (good(position_map=torch.empty(2, 5, 6, device="meta")), ValueError, ["position_map", "device of z, cpu", "meta"]),
    (good(size=(5, 6, 7)), ValueError, ["size", "an int or a pair", "(5, 6, 7)"]),
    (good(size=(5, 6.0)), TypeError, ["size", "int", "float"]),
    (good(size=0), ValueError, ["size", ">= 1", "0"]),
    (good(size=(1, 1), padding=0), ValueError, ["size", "3 taps, stride 1 and padding 0", "(1, 1)"]),
    (good(True, size=(1, 1), padding=2), ValueError, ["size", "3 taps, stride 1 and padding 2", "(1, 1)"]),
    (good(stride=0), ValueError, ["stride", ">= 1", "0"]),
    (good(stride=(1, True)), TypeError, ["stride", "int", "bool"]),
    (good(padding=-1), ValueError, ["padding", ">= 0", "-1"]),
    (good(padding="same"), TypeError, ["padding", "int", "str"]),
    (good(transposed=1), TypeError, ["transposed", "bool", "1"]),
    (good(relu=1), TypeError, ["relu", "bool", "1"]),
    (good(backend="fastest"), ValueError, ["backend", "'auto'", "'reference'", "'fastest'"]),
]


@pytest.mark.parametrize(
    ("arguments", "error", "words"), TABLE, ids=lambda x: ", ".join(x) if isinstance(x, list) else None
)
def test_bad_arguments_are_named(arguments, error, words):
    assert_refused(broadcast_conv2d, arguments, error, words)


def test_good_arguments_are_good():
    """But for the changes, those of the table are."""
    assert broadcast_conv2d(**good()).shape == broadcast_conv2d(**good(True)).shape == (7, 2, 5, 6)


def test_options_are_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        broadcast_conv2d(*list(good().values())[:4], 1)


@pytest.mark.parametrize("backend", ["reference", "written_out"])
def test_no_value_is_looked_at(backend):
    """A meta tensor has none: to look at one, or to wait for the device, raises."""
    arguments = good(relu=True)
    leaves = {name: x.to("meta").requires_grad_() for name, x in arguments.items() if isinstance(x, Tensor)}
    out = broadcast_conv2d(**arguments | leaves, backend=backend)
    assert out.shape == (7, 2, 5, 6)
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in leaves.values())
