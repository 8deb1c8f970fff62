"""What modules make of an image of which nothing takes part: NaN, mostly, where the operations make numbers.

A softmax over slots of which all are masked with -inf is NaN, and so is a mean over inputs of which all are masked with
0 after epsilon was added. Whether that is so of one graph, and to what its gradient is NaN then, its proof finds out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Empty(NamedTuple):
    """What becomes NaN in an image of which a mask leaves nothing."""

    mask: str
    attention: bool
    operands: tuple[str, ...]
    """Those to which the gradient is NaN then."""

    def applied(
        self, U: Tensor, A: Tensor | None, given: dict[str, Tensor], joint_heads: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The update (..., K, D) and the attention (..., K, N) with NaN there; masks (..., K) or (..., N), True = takes
        part, and operands with the same leading dimensions, or of size 1."""
        leading = given[self.mask].dim() - 1
        empty = ~given[self.mask].any(-1)
        if joint_heads and self.mask == "slot_mask":  # a softmax runs over all heads
            empty = empty.all(-1, keepdim=True)
        empty = empty[..., None, None]
        # A NaN that depends on operands as the module's own does; elsewhere 0 times them, so gradients are as before.
        nan = times = torch.where(empty, torch.nan, 0.0).to(U.dtype)
        # Keys have a gradient of 0 times the queries, which an earlier iteration may have made NaN. What comes in does
        # not matter: the module takes it no further than to the softmax's masked logits, and it may be NaN.
        times_q = torch.where(empty, 0 * _sums(given["q"].detach(), leading), 0.0).to(U.dtype)
        for name, x in given.items():
            if name in self.operands:
                nan = nan + times * _sums(x, leading)
            elif name in ("k", "x", "wk", "bk"):
                nan = nan + _Fixed.apply(_sums(x, leading), times_q)
        U = torch.where(empty, nan, U)
        return U, A if A is None or not self.attention else A.masked_fill(empty, torch.nan)


class _Fixed(torch.autograd.Function):
    """A product of which one factor is the gradient to the other, whatever comes in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.shape = x.shape
        return x * gradient

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.expand_as(incoming).sum_to_size(ctx.shape), None


def _sums(x: Tensor, leading: int) -> Tensor:
    """Of all numbers of an image, (..., 1, 1)."""
    return x.flatten(leading).sum(-1)[..., None, None]
