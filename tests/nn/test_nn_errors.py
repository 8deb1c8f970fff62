"""What `nn.SlotAttention` refuses, and what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparing import assert_refused
from conventions import DX, NAN, example, make

from iio_kernels.nn import SlotAttention


def options_of(**changes: Any) -> dict[str, Any]:
    return {"input_size": 6, "slot_size": 8} | changes


# A row: the arguments, the type of the error, and what its message must hold in this order.
CONSTRUCTED = [
    (options_of(input_size=0), ValueError, ["input_size", "int >= 1", "0"]),
    (options_of(slot_size=8.0), TypeError, ["slot_size", "int", "float"]),
    (options_of(num_slots=0), ValueError, ["num_slots", "int >= 1", "0"]),
    (options_of(iterations=True), TypeError, ["iterations", "int", "bool"]),
    (options_of(kvq_size=0), ValueError, ["kvq_size", "int >= 1", "0"]),
    (options_of(heads=3), ValueError, ["kvq_size", "multiple of heads = 3", "8"]),
    (options_of(joint_heads=1), TypeError, ["joint_heads", "bool", "1"]),
    (options_of(combine_heads="yes"), TypeError, ["combine_heads", "bool", "'yes'"]),
    (options_of(project=None), TypeError, ["project", "bool", "None"]),
    (options_of(project=False), ValueError, ["project", "input_size = 6, slot_size = 8, kvq_size = 8"]),
    (options_of(input_size=8, project=False, kvq_size=4), ValueError, ["project", "kvq_size = 4"]),
    (options_of(input_size=8, project=False, bias=True), ValueError, ["bias", "without projections", "True"]),
    (options_of(norm_updates=1), TypeError, ["norm_updates", "bool", "1"]),
    (options_of(bias=None), TypeError, ["bias", "bool", "None"]),
    (options_of(scale=NAN), ValueError, ["scale", "finite", "nan"]),
    (options_of(eps=-1e-8), ValueError, ["eps", ">= 0", "-1e-08"]),
    (options_of(eps_in="numerator"), ValueError, ["eps_in", "'weights'", "'denominator'", "'numerator'"]),
    (options_of(normalize="max"), ValueError, ["normalize", "'mean'", "'sum'", "'max'"]),
    (options_of(softmax="both"), ValueError, ["softmax", "'slots'", "'inputs'", "'both'"]),
    (options_of(softmax="inputs", joint_heads=True), ValueError, ["joint_heads", "False", '"inputs"', "True"]),
    (options_of(norm_slots=None), TypeError, ["norm_slots", "bool", "None"]),
    (options_of(neumann_terms=-1), ValueError, ["neumann_terms", "int >= 0", "-1"]),
    (options_of(neumann_terms=2), ValueError, ["neumann_terms", "0", '"implicit"', "2"]),
    (options_of(update="lstm"), ValueError, ["update", "'gru'", "'replace'", "'lstm'"]),
    (options_of(update="residual", kvq_size=4), ValueError, ["kvq_size", "slot_size = 8", "4"]),
    (options_of(mlp_size=0), ValueError, ["mlp_size", "int >= 1", "0"]),
    (options_of(mlp_last=2), TypeError, ["mlp_last", "bool", "2"]),
    (options_of(norm_eps=0.0), ValueError, ["norm_eps", "> 0", "0"]),
    (options_of(initial="random"), ValueError, ["initial", "'gaussian'", "'given'", "'random'"]),
    (options_of(gradient="detached"), ValueError, ["gradient", "'unrolled'", "'bilevel'", "'detached'"]),
    (options_of(attention=True), ValueError, ["attention", "None", "'softmax'", "True"]),
    (options_of(attention_layout="kn"), ValueError, ["attention_layout", "'KN'", "'kn'"]),
    (options_of(attention_heads="max"), ValueError, ["attention_heads", "'sum'", "'max'"]),
]


def inputs_of(**changes: Any) -> dict[str, Any]:
    return {"inputs": torch.rand(2, 5, DX, dtype=torch.float64)} | changes


CALLED = [
    (inputs_of(inputs=None), TypeError, ["inputs", "torch.Tensor (..., N, input_size)", "NoneType"]),
    (inputs_of(inputs=torch.rand(5)), ValueError, ["inputs", "(..., N, input_size)", "(5,)"]),
    (inputs_of(inputs=torch.rand(2, 5, 7)), ValueError, ["inputs", "(..., N, 6)", "(2, 5, 7)"]),
    (inputs_of(inputs=torch.rand(2, 5, 6, device="meta")), ValueError, ["inputs", "device of parameters, cpu", "meta"]),
    (inputs_of(slots=torch.rand(2, 3, 9)), ValueError, ["slots", "(3, 8)", "(2, 3, 9)"]),
    (inputs_of(slots=torch.rand(3, 3, 8)), ValueError, ["slots", "(3, 8)", "broadcast to (2,)", "(3, 3, 8)"]),
    (inputs_of(slots=torch.rand(2, 3, 8, device="meta")), ValueError, ["slots", "device of inputs, cpu", "meta"]),
    (inputs_of(slots=torch.rand(3, 8), num_slots=4), ValueError, ["num_slots", "3 of slots", "4"]),
    (inputs_of(slots=torch.rand(3, 8), noise=torch.rand(3, 8)), ValueError, ["noise", "None", "slots", "tensor"]),
    (inputs_of(noise=torch.ones(3, 8).int()), TypeError, ["noise", "float32", "torch.int32"]),
    (inputs_of(num_slots=0), ValueError, ["num_slots", "int >= 1", "0"]),
    (inputs_of(iterations=0), ValueError, ["iterations", "int >= 1", "0"]),
    (inputs_of(slot_mask=torch.ones(2, 3)), TypeError, ["slot_mask", "torch.bool", "float32"]),
    (inputs_of(input_mask=torch.ones(2, 6).bool()), ValueError, ["input_mask", "(2, 5)", "(2, 6)"]),
]


def words(x: Any) -> str:
    return ", ".join(x) if type(x) is list else ""


@pytest.mark.parametrize(("arguments", "error", "words"), CONSTRUCTED, ids=words)
def test_bad_options_are_named(arguments, error, words):
    assert_refused(SlotAttention, arguments, error, words)


@pytest.mark.parametrize(("arguments", "error", "words"), CALLED, ids=words)
def test_bad_arguments_are_named(arguments, error, words):
    assert_refused(make(), arguments, error, words)


def test_slots_that_are_not_there_are_named():
    (inputs, _) = example()
    assert_refused(make(initial="given"), {"inputs": inputs}, ValueError, ["slots", '"given"', "None"])
    assert_refused(make(initial="queries"), {"inputs": inputs, "num_slots": 4}, ValueError, ["num_slots", "3", "4"])
    noise = torch.rand(3, 8)
    assert_refused(make(initial="queries"), {"inputs": inputs, "noise": noise}, ValueError, ["noise", '"queries"'])
    noise = torch.rand(4, 8)
    assert_refused(make(initial="gaussians"), {"inputs": inputs, "noise": noise}, ValueError, ["num_slots", "3", "4"])
    assert_refused(make(backend="fastest"), {"inputs": inputs}, ValueError, ["backend", "'auto'", "'fastest'"])
