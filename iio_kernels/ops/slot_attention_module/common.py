"""What the backends of the Slot Attention module share: operands and options of a call, the maps, and the tape.

All that is learnt is five linear maps, made of the module's weights: what it has between the inputs and the slots, and
between the slots and the gates, is one map each, and the weights and biases of its normalisations belong to the maps
behind them. The tape is what a forward pass keeps for the backward one, a row for each iteration and slot.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from iio_kernels.runtime.autograd import without_autocast


class Maps(NamedTuple):
    """The five linear maps, weights as in `torch.nn.Linear`, all in the dtype of the arithmetic."""

    wp: Tensor  # (Dx, D): slots to what inputs are compared with
    wi: Tensor  # (3 D, Dx): means of inputs to gates
    wj: Tensor  # (3 D, D): slots to gates
    w1: Tensor  # (H, D): the MLP
    w2: Tensor  # (D, H)
    bp: Tensor
    bi: Tensor
    bj: Tensor
    b1: Tensor
    b2: Tensor


class Operands(NamedTuple):
    """The tensors of a call, checked."""

    x: Tensor  # (B, N, Dx), stored in any dtype
    slots: Tensor  # (B, K, D), in the dtype of the arithmetic
    maps: Maps


class Options(NamedTuple):
    """The options of `iio_kernels.slot_attention_module` that backends take, checked. The scale is in the maps."""

    iterations: int
    eps: float
    norm_eps: float


def read_by_maps(D: int, Dx: int, H: int) -> list[int]:
    """How wide what each map reads is: ŝ, M, s, ĥ, y."""
    return [D, Dx, D, D, H]


def made_by_maps(D: int, Dx: int, H: int) -> list[int]:
    """How wide what each map makes is: p, i, j, the MLP's hidden layer and its result."""
    return [Dx, 3 * D, 3 * D, H, D]


def on_tape(D: int, Dx: int, H: int) -> list[int]:
    """The widths of a row of the tape: what the maps read, then p, r, z, n, j_n, and S, 1 / deviations of s and h."""
    return [*read_by_maps(D, Dx, H), Dx, D, D, D, D, 1, 1, 1]


def gradients_to_maps(tape: Tensor, made: Tensor, operands: Operands) -> tuple[Tensor, ...]:
    """The gradients to the maps, in the order of `Maps`, from the tape and `made`, those to what the maps make.

    Three products and sums over all images, iterations and slots at once: torch's own.
    """
    D, Dx, H = operands.slots.shape[2], operands.x.shape[2], len(operands.maps.w1)
    with without_autocast(tape.device):
        read = tape.flatten(0, 2).split(on_tape(D, Dx, H), -1)
        made_each = made.flatten(0, 2).split(made_by_maps(D, Dx, H), -1)
        weights = [y.mT @ x for x, y in zip(read, made_each, strict=False)]
        return *weights, *(y.sum(0) for y in made_each)
