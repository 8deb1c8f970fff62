"""Slot attention in Triton: the operators, and the launches of their kernels.

Each operator is one pass over the inputs, in chunks (triton_kernels.py; its pieces are in triton_pieces.py), with tiles
that suit the sizes of the call (triton_tiles.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from iio_kernels.ops.slot_attention import schema
from iio_kernels.ops.slot_attention.common import Operands
from iio_kernels.ops.slot_attention.triton_kernels import add_kernel, backward_kernel, forward_kernel, heads_kernel
from iio_kernels.ops.slot_attention.triton_pieces import Meta, Strided
from iio_kernels.ops.slot_attention.triton_tiles import Tile, chunking, multiplication, tile
from iio_kernels.runtime.numerics import arithmetic_dtype
from iio_kernels.runtime.triton_support import index_type


class Call:
    """What the launches of an operator's call have in common."""

    def __init__(self, way: str, q: Tensor, k: Tensor, v: Tensor | None) -> None:
        values = k if v is None else v
        (self.B, self.H, self.K, self.DK), (self.N, self.DV) = q.shape, values.shape[2:]
        self.groups = self.B * self.H
        self.dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        self.how = multiplication(k, values)
        self.tile = tile(self.how, way, self.K, max(self.DK, self.DV))
        self.chunk, self.chunks = chunking(self.N, self.groups, self.K, self.tile.BLOCK_N)
        width = self.DV if way == "forward" else max(self.DK, self.DV)
        self.parts = max(1, triton.cdiv(width, self.tile.WIDTH))
        self.device = k.device

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def launch(self, kernel: Any, grid: tuple[int, ...], tile: Tile, *arguments: Any) -> None:
        """Run a kernel on tensors, numbers and None, and `Meta` after them."""
        if 0 in grid:
            return
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        arithmetic = tl.float64 if self.dtype == torch.float64 else tl.float32
        meta = Meta(
            self.K, self.DK, self.DV, tile.K_PADDED, tile.BLOCK_N, tile.BLOCK_D, tile.WIDTH, DTYPE=arithmetic,
            OPERAND=tl.bfloat16 if self.how == "bf16" else arithmetic,
            PRECISION="tf32" if self.how == "tf32" else "ieee", INDEX=index_type(*tensors),
        )  # fmt: skip
        with torch.cuda.device_of(tensors[0]):
            kernel[grid](
                *(Strided(x, *x.stride(), *(0,) * (4 - x.dim())) if isinstance(x, Tensor) else x for x in arguments),
                Meta(*map(tl.constexpr, meta)),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                enable_fp_fusion=True,
            )

    def launch_chunks(self, kernel: Any, *arguments: Any) -> None:
        """The kernel of a pass, a program for each group, chunk and part."""
        sizes = self.H, self.N, self.chunk, self.chunks, self.parts
        self.launch(kernel, (self.groups * self.chunks * self.parts,), self.tile, *arguments[0], *sizes, *arguments[1:])

    def launch_heads(self, inputs: tuple, incoming: tuple, scale: float, normalize: bool) -> tuple[Tensor | None, ...]:
        """The normaliser of joint heads, and `dots` if there are incoming gradients; both expanded to all heads."""
        normaliser = self.new(self.B, 1, self.N, 2)
        dots = None if incoming[0] is None else self.new(self.B, 1, self.N)
        tiles = triton.cdiv(self.N, self.tile.BLOCK_N)
        sizes = self.H, self.N, tiles
        self.launch(
            heads_kernel, (self.B * tiles,), self.tile, *inputs, *incoming, normaliser, dots, *sizes, scale, normalize
        )
        return tuple(None if x is None else x.expand(-1, self.H, *x.shape[2:]) for x in (normaliser, dots))

    def add(
        self, wide_sums: Tensor, narrow_sums: Tensor | None, wide: Tensor, narrow: Tensor | None, eps: float = 0.0,
        normalize: bool = False,
    ) -> None:  # fmt: skip
        """The second stage: 8192 numbers at a time, 16 features of all slots."""
        K_PADDED, D = triton.next_power_of_2(self.K), wide.shape[3]
        tile = Tile(K_PADDED, BLOCK_N=max(1, 512 // K_PADDED), BLOCK_D=16, WIDTH=16, num_warps=8, num_stages=1)
        grid = self.groups, max(1, triton.cdiv(D, tile.WIDTH))
        tensors = wide_sums, narrow_sums, wide, narrow
        self.launch(add_kernel, grid, tile, *tensors, self.H, D, self.chunks, eps, normalize)


def slot_attention_forward(
    q, k, v, logit_bias, slot_mask, input_mask, scale, eps, eps_in_weights, normalize, joint_heads, return_attention
):
    """The operator of schema.py."""
    call, inputs = Call("forward", q, k, v), (q, k, v, logit_bias, slot_mask, input_mask)
    eps_weights, eps_denominator = (eps if normalize and here else 0.0 for here in (eps_in_weights, not eps_in_weights))
    U, S = call.new(*q.shape[:3], call.DV), call.new(*q.shape[:3])
    A_shape = (*q.shape[:3], call.N) if return_attention else (0,)
    A = call.new(*A_shape, dtype=(k if v is None else v).dtype)
    U_sums, S_sums = (call.new(call.chunks, call.groups, *x.shape[2:]) for x in (U, S))
    normaliser = call.launch_heads(inputs, (None,) * 5, scale, normalize)[0] if joint_heads else None
    tensors = *inputs, normaliser, A if return_attention else None, U_sums, S_sums
    call.launch_chunks(forward_kernel, tensors, scale, eps_weights)
    call.add(U_sums, S_sums, U, S, eps_denominator, normalize)
    return U, S, A


def slot_attention_backward(
    dU, dS, dA, q, k, v, logit_bias, slot_mask, input_mask, U, S, scale, eps, eps_in_weights, normalize, joint_heads
):
    """The operator of schema.py."""
    call, inputs = Call("backward", q, k, v), (q, k, v, logit_bias, slot_mask, input_mask)
    incoming = U, S, dU, dS, dA
    dq, dk = (call.new(*x.shape, dtype=x.dtype) for x in (q, k))
    dv, dlogit_bias = (None if x is None else call.new(*x.shape, dtype=x.dtype) for x in (v, logit_bias))
    dq_sums = call.new(call.chunks, call.groups, call.K, call.DK)
    dlogit_bias_sums = None if logit_bias is None else call.new(call.chunks, call.groups, call.K)
    normaliser, dots = call.launch_heads(inputs, incoming, scale, normalize) if joint_heads else (None, None)
    tensors = *inputs, normaliser, dots, *incoming, dk, dv, dq_sums, dlogit_bias_sums
    call.launch_chunks(backward_kernel, tensors, scale, eps if normalize and eps_in_weights else 0.0, normalize)
    call.add(dq_sums, dlogit_bias_sums, dq, dlogit_bias)
    return dq, dk, call.new(0, dtype=k.dtype) if dv is None else dv, call.new(0) if dlogit_bias is None else dlogit_bias


def _stored(operands: Operands) -> Operands:
    """The operands as they are stored; but where one is float64, the kernels ask it of q, k and v."""
    q, k, v, *others = operands
    if arithmetic_dtype(q, k, v) == torch.float64:
        q, k, v = q.double(), k.double(), None if v is None else v.double()
    return Operands(q, k, v, *others)


forward, backward = schema.calls("iio_kernels_triton", _stored, widens=False)
for operator in (slot_attention_forward, slot_attention_backward):
    torch.library.impl(f"iio_kernels_triton::{operator.__name__}", ("cpu", "cuda"), operator)
