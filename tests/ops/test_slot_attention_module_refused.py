"""What the Slot Attention module refuses, in which words."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_refused
from torch import Tensor

from iio_kernels import slot_attention_module
from iio_kernels.testing.slot_attention_module import (
    Case,
)

OPERATION = "slot_attention_module"
NAN = float("nan")


def call(K=4, Dx=8, D=16, H=24, weights=None, **changes) -> dict[str, object]:
    """Good arguments but for the changes, of which `weights` replaces some of these."""
    (x, slots, all_weights, T), _ = Case("refused", K=K, Dx=Dx, D=D, H=H).make(torch.float32)
    all_weights = all_weights._replace(**weights) if isinstance(weights, dict) else weights or all_weights
    return {"x": x, "slots": slots, "weights": all_weights, "iterations": T} | changes


def on_meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


# A row: the arguments, the type of the error, and what its message must hold in this order.
TABLE = [
    (call(x=None), TypeError, ["x", "torch.Tensor (B, N, Dx)", "NoneType"]),
    (call(x=torch.ones(2, 37, 8, dtype=torch.int32)), TypeError, ["x", "float32", "torch.int32"]),
    (call(x=torch.rand(37, 8)), ValueError, ["x", "(B, N, Dx)", "(37, 8)"]),
    (call(x=torch.rand(2, 37, 0)), ValueError, ["x", "at least one feature", "(2, 37, 0)"]),
    (call(slots=[[0.0]]), TypeError, ["slots", "torch.Tensor (B, K, D)", "list"]),
    (call(slots=torch.rand(2, 4)), ValueError, ["slots", "(B, K, D)", "(2, 4)"]),
    (call(slots=torch.rand(3, 4, 16)), ValueError, ["slots", "(2, K, D)", "x (2, 37, 8)", "(3, 4, 16)"]),
    (call(slots=torch.rand(2, 0, 16)), ValueError, ["slots", "at least one slot", "(2, 0, 16)"]),
    (call(slots=on_meta(2, 4, 16)), ValueError, ["slots", "device of x, cpu", "meta"]),
    (call(weights=(torch.rand(3),)), TypeError, ["weights", "SlotAttentionWeights", "tuple"]),
    (call(weights={"wq": None}), TypeError, ["weights.wq", "torch.Tensor", "NoneType"]),
    (call(weights={"b1": torch.zeros(24).int()}), TypeError, ["weights.b1", "float32", "torch.int32"]),
    (call(weights={"wk": torch.rand(12, 9)}), ValueError, ["weights.wk", "(12, 8)", "x (2, 37, 8)", "(12, 9)"]),
    (call(weights={"wv": torch.rand(12, 8)}), ValueError, ["weights.wv", "(16, 8)", "slots", "(12, 8)"]),
    (call(weights={"weight_hh": torch.rand(16, 16)}), ValueError, ["weights.weight_hh", "(48, 16)", "(16, 16)"]),
    (call(weights={"bias_ih": torch.rand(48, 1)}), ValueError, ["weights.bias_ih", "(48,)", "(48, 1)"]),
    (call(weights={"w2": torch.rand(16, 25)}), ValueError, ["weights.w2", "(16, 24)", "(16, 25)"]),
    (call(weights={"b2": on_meta(16)}), ValueError, ["b2", "device of x, cpu", "meta"]),
    (call(iterations=0), ValueError, ["iterations", "int >= 1", "0"]),
    (call(iterations=1.0), TypeError, ["iterations", "int", "float"]),
    (call(eps=-1.0), ValueError, ["eps", ">= 0", "-1"]),
    (call(norm_eps=0.0), ValueError, ["norm_eps", "> 0", "0"]),
    (call(scale=NAN), ValueError, ["scale", "finite", "nan"]),
    (call(return_attention=1), TypeError, ["return_attention", "bool", "1"]),
    (call(backend="fastest"), ValueError, ["backend", "'auto'", "'reference'", "'fastest'"]),
]


@pytest.mark.parametrize(("arguments", "error", "words"), TABLE, ids=lambda x: ", ".join(x) if type(x) is list else "")
def test_bad_arguments_are_named(arguments, error, words):
    assert_refused(slot_attention_module, arguments, error, words)


def test_options_are_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        slot_attention_module(*call().values(), 1e-8)


@pytest.mark.parametrize("backend", ["reference", "written_out"])
def test_no_value_is_looked_at(backend):
    """A meta tensor has none: to look at one, or to wait for the device, raises."""
    (x, slots, weights, T), _ = Case("meta").make(device="meta")
    out, attention = slot_attention_module(
        x.requires_grad_(), slots, weights, T, return_attention=True, backend=backend
    )
    assert (out.shape, attention.shape) == ((2, 4, 16), (2, 4, 37))
    (out.sum() + attention.square().sum()).backward()
    assert x.grad.shape == (2, 37, 8)
