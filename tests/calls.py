"""Calls of the public names that type checkers are to let pass, and calls that they are to refuse: tests/test_types.py.

A line that is to be refused ends in `# E:` and the error's code as mypy has it. Nothing here is run.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import assert_type

import iio_kernels
from iio_kernels import nn

x, mask, flag, word = torch.randn(2, 3, 4), torch.ones(3, dtype=torch.bool), bool(torch.rand(())), str(torch.rand(()))
Pair = tuple[Tensor, Tensor]
weights = iio_kernels.SlotAttentionWeights(x, x, x, x, x, x, x, x, x, x, x, x, x, x, x)

# --- slot_attention

assert_type(iio_kernels.slot_attention(x, x, x), Tensor)
assert_type(iio_kernels.slot_attention(x, x, x, return_attention=False), Tensor)
assert_type(iio_kernels.slot_attention(x, x, x, return_attention=True), Pair)
assert_type(iio_kernels.slot_attention(x, x, x, return_attention=flag), Tensor | Pair)
iio_kernels.slot_attention(x, x, v=x, scale=None, eps=0, eps_in="denominator", normalize="sum", joint_heads=flag)
iio_kernels.slot_attention(x, x, x, slot_mask=mask, input_mask=None, backend="cpu")
iio_kernels.slot_attention(x, x, x, epz=1.0)  # E: call-overload
iio_kernels.slot_attention(x, x, x, 1.0)  # E: call-overload
iio_kernels.slot_attention(x, x)  # E: call-overload
iio_kernels.slot_attention(x, x, x, eps_in="weight")  # E: call-overload
iio_kernels.slot_attention(x, x, x, eps_in=word)  # E: call-overload
iio_kernels.slot_attention(x, x, x, normalize="max")  # E: call-overload
iio_kernels.slot_attention(x, x, x, slot_mask=True)  # E: call-overload
iio_kernels.slot_attention(x, x, x, backend="cuda")  # E: call-overload
iio_kernels.slot_attention(x, x, x, return_attention="yes")  # E: call-overload

# --- slot_attention_from_inputs

assert_type(iio_kernels.slot_attention_from_inputs(x, x, x, None, x, x), Tensor)
assert_type(iio_kernels.slot_attention_from_inputs(x, x, x, x, x, None, return_attention=True, eps_in="weights"), Pair)
assert_type(iio_kernels.slot_attention_from_inputs(x, x, x, x, x, x, return_attention=flag), Tensor | Pair)
iio_kernels.slot_attention_from_inputs(x, x, None, x, x, x)  # E: call-overload
iio_kernels.slot_attention_from_inputs(x, x, x, x, x, x, epz=1.0)  # E: call-overload
iio_kernels.slot_attention_from_inputs(x, x, x, x, x, x, eps_in="weight")  # E: call-overload

# --- slot_attention_module

assert_type(iio_kernels.slot_attention_module(x, x, weights, 3, eps=0, norm_eps=1e-5, scale=1), Tensor)
assert_type(iio_kernels.slot_attention_module(x, x, weights, iterations=3, return_attention=True), Pair)
assert_type(iio_kernels.slot_attention_module(x, x, weights, 3, return_attention=flag), Tensor | Pair)
iio_kernels.slot_attention_module(x, x, weights, 3, eps_in="weights")  # E: call-overload
iio_kernels.slot_attention_module(x, x, weights, 3.5)  # E: call-overload
iio_kernels.slot_attention_module(x, x, [x], 3)  # E: call-overload
iio_kernels.SlotAttentionWeights(x, x)  # E: call-arg

# --- composition

assert_type(iio_kernels.compose(x, backend="triton"), Pair)
assert_type(iio_kernels.composition_error(x, x, reduction="none"), Tensor)
assert_type(iio_kernels.composition_error(x, x, return_masks=True, backend="reference"), Pair)
assert_type(iio_kernels.composition_error(x, x, return_masks=flag), Tensor | Pair)
iio_kernels.compose(x, masks=x)  # E: call-arg
iio_kernels.compose(x, backend="cuda")  # E: arg-type
iio_kernels.composition_error(x, x, reduction="avg")  # E: call-overload
iio_kernels.composition_error(x, x, return_attention=True)  # E: call-overload

# --- inpainting

assert_type(iio_kernels.iio_loss(x, x, sigma=5, terms="mean", reduction="sum", subsets=4, backend="cuda"), Tensor)
assert_type(iio_kernels.conditional_entropies(x, x, kernel_size=11, repeats=2, eps=0), Tensor)
assert_type(iio_kernels.interaction_information(x, x), Tensor)
assert_type(iio_kernels.inpaint(x, x, backend="auto"), Tensor)
iio_kernels.iio_loss(x, x, terms="median")  # E: arg-type
iio_kernels.iio_loss(x, x, reduction="avg")  # E: arg-type
iio_kernels.iio_loss(x, x, sigmas=5.0)  # E: call-arg
iio_kernels.iio_loss(x, x, generator=0)  # E: arg-type
iio_kernels.conditional_entropies(x, x, terms="sum")  # E: call-arg
iio_kernels.interaction_information(x, x, kernel_size=11.5)  # E: arg-type
iio_kernels.inpaint(x, x, backend="gpu")  # E: arg-type

# --- spatial mixture

assert_type(iio_kernels.spatial_mixture(x, x, sigma=0.1).posterior, Tensor)
assert_type(iio_kernels.mixture_log_likelihood(x, x), Tensor)
iio_kernels.spatial_mixture(x, x, std=0.1)  # E: call-arg
print(iio_kernels.spatial_mixture(x, x).posteriors)  # E: attr-defined
iio_kernels.mixture_log_likelihood(x, x, sigma=x)  # E: arg-type

# --- broadcast_conv2d

assert_type(iio_kernels.broadcast_conv2d(x, x, x, 35, stride=(1, 2), padding=2, transposed=True, relu=flag), Tensor)
iio_kernels.broadcast_conv2d(x, x, x, (35, 35, 35))  # E: arg-type
iio_kernels.broadcast_conv2d(x, x, x, 35, dilation=2)  # E: call-arg
iio_kernels.broadcast_conv2d(x, x, x, 35, backend="cuda")  # E: arg-type

# --- nn.SlotAttention

slots = nn.SlotAttention(32, 64)
shown = nn.SlotAttention(32, 64, num_slots=4, eps_in="denominator", attention="softmax", attention_layout="NK")
wanted: Literal["softmax", "weights"] | None = "weights" if flag else None
either = nn.SlotAttention(32, 64, attention=wanted)
some: nn.SlotAttention = either
assert_type(slots(x), Tensor)
assert_type(slots.forward(x, x, iterations=3, slot_mask=mask), Tensor)
assert_type(shown(x, None, num_slots=5, iterations=3, noise=x, slot_mask=mask, input_mask=mask), Pair)
assert_type(nn.SlotAttention(32, 64, attention=wanted)(x), Tensor | Pair)
print(some(x).shape, some(x)[0])  # whatever it returns
torch.nn.Sequential(slots, torch.nn.Linear(64, 64))
slots.load_state_dict(nn.convert_weights(shown.state_dict(), slots.state_dict()))
nn.SlotAttention(32, 64, eps_in="weight")  # E: call-overload
nn.SlotAttention(32, 64, numslots=4)  # E: call-overload
nn.SlotAttention(32, 64, 4)  # E: call-overload
nn.SlotAttention(32, 64, update="lstm")  # E: call-overload
nn.SlotAttention(32, 64, attention="keys")  # E: call-overload
nn.SlotAttention(32, 64, softmax=word)  # E: call-overload
slots(x, num_slot=4)  # E: call-arg
slots(x, iterations="3")  # E: arg-type
slots.forward(x, mask=mask)  # E: call-arg
print(slots(x)[0].posterior)  # E: attr-defined
nn.convert_weights(slots.state_dict())  # E: call-arg
nn.convert_weights(slots, shown.state_dict())  # E: arg-type
nn.convert_weights({}, {}, prefix="")  # E: call-arg


class Mine(nn.SlotAttention[Tensor]):
    def __init__(self) -> None:
        super().__init__(32, 64, initial="queries")


assert_type(Mine()(x), Tensor)

# --- accelerate

report = iio_kernels.accelerate(slots, x, num_slots=5)
assert_type(report.accelerated, list[str])
assert_type(report.entries[0].difference, float | None)
iio_kernels.restore(slots)
iio_kernels.accelerate(x)  # E: arg-type
iio_kernels.restore(slots, x)  # E: call-arg
print(report.replaced)  # E: attr-defined

# --- backends

for name, why in iio_kernels.backends().items():
    assert_type(why, str | None)
    iio_kernels.inpaint(x, x, backend=name)
assert_type(iio_kernels.__version__, str)
