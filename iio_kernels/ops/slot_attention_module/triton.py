"""The iterations of Slot Attention in Triton: one launch forward, one backward, a program for each image.

All products are in float32, or in TF32 if torch may do so: what counts here is not operations but launches, about
thirty an iteration in PyTorch.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from iio_kernels.ops.slot_attention_module import schema
from iio_kernels.ops.slot_attention_module.common import made_by_maps, on_tape
from iio_kernels.ops.slot_attention_module.triton_kernels import backward_kernel, forward_kernel
from iio_kernels.ops.slot_attention_module.triton_pieces import Meta, Strided
from iio_kernels.runtime.triton_support import index_type


def _iterations_forward(
    x: Tensor, slots: Tensor, weights: list[Tensor], biases: list[Tensor], iterations: int, eps: float,
    norm_eps: float, return_attention: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    last, A, tape = schema.new_results(x, slots, weights, biases, iterations, eps, norm_eps, return_attention)
    maps = [w.contiguous() for w in (*weights, *biases)]
    tensors = Strided(x, *x.stride()), slots.contiguous(), *maps, last, A if return_attention else None, tape
    _launch(forward_kernel, x, slots, weights, *tensors, x.shape[1], iterations, eps, norm_eps)
    return last, A, tape


def _iterations_backward(
    d_slots: Tensor, d_attention: Tensor | None, x: Tensor, tape: Tensor, weights: list[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dx, d_first, made = schema.new_gradients(d_slots, d_attention, x, tape, weights, eps)
    dA = None if d_attention is None else Strided(d_attention, *d_attention.stride())
    dM_all = tape.new_empty((*tape.shape[:3], x.shape[2]))
    inputs = d_slots.contiguous(), dA, Strided(x, *x.stride()), tape.contiguous(), *(w.contiguous() for w in weights)
    results = Strided(dx, *dx.stride()), d_first, made, dM_all
    _launch(backward_kernel, x, d_slots, weights, *inputs, *results, x.shape[1], tape.shape[1], eps)
    return dx, d_first, made


#: Inputs in a tile, and the warps that work on it, such that nothing spills from registers: forward with up to 8 slots
#: of up to 128 features, and else.
SMALL, LARGE = (32, 4), (16, 8)


def _launch(kernel: Any, x: Tensor, slots: Tensor, weights: list[Tensor], *arguments: Any) -> None:
    """Run a program for each image, on the tensors' device, which need not be the current one."""
    (B, K, D), Dx, H = slots.shape, x.shape[2], weights[3].shape[0]
    if B == 0:
        return
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and not torch.version.hip
    # Tensor cores multiply 16 slots at a time. Without them tiles need fewer.
    K_PADDED = max(triton.next_power_of_2(K), 16 if tf32 else 4)
    D_PADDED, DX_PADDED, H_PADDED = (max(16, triton.next_power_of_2(width)) for width in (D, Dx, H))
    small = kernel is forward_kernel and K_PADDED <= 8 and max(D_PADDED, H_PADDED) <= 128
    BLOCK_N, num_warps = SMALL if small else LARGE
    _, M, S, H_hat, y_at, p, r, _, _, _, shares, _, _, width = accumulate(on_tape(D, Dx, H), initial=0)
    _, di, dj, dy, ds, made = accumulate(made_by_maps(D, Dx, H), initial=0)
    tensors = [y.ptr if isinstance(y, Strided) else y for y in arguments]
    meta = Meta(
        K, D, Dx, H, K_PADDED, D_PADDED, DX_PADDED, H_PADDED,
        BLOCK_N=BLOCK_N, BLOCK_I=16,
        DTYPE=tl.float64 if slots.dtype == torch.float64 else tl.float32, PRECISION="tf32" if tf32 else "ieee",
        INDEX=index_type(*(y for y in tensors if isinstance(y, Tensor) and y.dim() == 3)),
        M_AT=M, S_AT=S, H_AT=H_hat, Y_AT=y_at, P_AT=p, R_AT=r, SHARES_AT=shares, WIDTH=width,
        DI_AT=di, DJ_AT=dj, DY_AT=dy, DS_AT=ds, MADE=made,
    )  # fmt: skip
    with torch.cuda.device_of(x):
        kernel[(B,)](
            *arguments,
            Meta(*map(tl.constexpr, meta)),
            num_warps=num_warps // 2 if torch.version.hip else num_warps,  # whose warps have 64 threads
            num_stages=1,  # no load runs ahead of a barrier
            enable_fp_fusion=True,
        )


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as it is stored; but what meets float64 becomes one."""
    return x.to(dtype) if dtype == torch.float64 else x


forward, backward = schema.calls("iio_kernels_triton", _stored)
torch.library.impl("iio_kernels_triton::iterations_forward", ("cpu", "cuda"), _iterations_forward)
torch.library.impl("iio_kernels_triton::iterations_backward", ("cpu", "cuda"), _iterations_backward)
