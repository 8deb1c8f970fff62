"""What the backends of slot attention share: the operands and options of a call, and the shape kernels read them in."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """The tensors of one attention step, checked, with their leading dimensions and masks expanded."""

    q: Tensor  # (..., K, Dk)
    k: Tensor  # (..., N, Dk)
    v: Tensor | None = None  # (..., N, Dv); None: the keys are the values too, and are read once
    logit_bias: Tensor | None = None  # (..., K), added to the scaled logits
    slot_mask: Tensor | None = None  # (..., K) bool
    input_mask: Tensor | None = None  # (..., N) bool


class InputOperands(NamedTuple):
    """The tensors of one attention step whose keys and values are projections of x, checked, the masks expanded."""

    x: Tensor  # (..., N, Dx)
    q: Tensor  # (..., K, Dk)
    wk: Tensor  # (..., Dk, Dx)
    bk: Tensor | None  # (..., Dk)
    wv: Tensor  # (..., Dv, Dx)
    bv: Tensor | None  # (..., Dv)
    logit_bias: Tensor | None = None  # (..., K), added to the scaled logits
    slot_mask: Tensor | None = None  # (..., K) bool
    input_mask: Tensor | None = None  # (..., N) bool


class Options(NamedTuple):
    """The options of `iio_kernels.slot_attention`, checked and complete."""

    scale: float
    eps: float
    eps_in: str
    normalize: str
    joint_heads: bool


def values(operands: Operands) -> Tensor:
    """v, or the keys where they are the values too."""
    return operands.k if operands.v is None else operands.v


def with_batch_and_heads(operands: Operands, options: Options) -> Operands:
    """All operands with two leading dimensions (B, H), of which H is that of joint heads."""
    q, k, v, logit_bias, slot_mask, input_mask = operands
    return Operands(
        batch_and_heads(q, options, 2),
        batch_and_heads(k, options, 2),
        None if v is None else batch_and_heads(v, options, 2),
        None if logit_bias is None else batch_and_heads(logit_bias, options, 1),
        None if slot_mask is None else batch_and_heads(slot_mask, options, 1),
        None if input_mask is None else batch_and_heads(input_mask, options, 1),
    )


def batch_and_heads(x: Tensor, options: Options, own: int) -> Tensor:
    """x with its leading dimensions, all but the last `own`, as the two (B, H); a view wherever strides allow it."""
    leading = x.dim() - own
    if leading == 2:
        return x
    if leading < 2:
        # One dimension alone is the heads where these are joint, else the batch.
        return x[(None,) * (2 - leading)] if options.joint_heads or leading == 0 else x.unsqueeze(1)
    return x.flatten(0, leading - 2)
