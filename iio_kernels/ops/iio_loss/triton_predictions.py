"""What each mask predicts, in Triton: psi, and its gradient."""

from __future__ import annotations

import triton.language as tl

from iio_kernels.ops.iio_loss.triton_tuples import block_of, reciprocal_or_0, varying


@varying
def predictions(
    planes_ptr, psi_ptr, rows, C, pixels,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """psi = n / d, and 0 where d = 0. The rows are those of all images' masks.

    planes_ptr  (B, M, C + 1, H, W)  n and d
    psi_ptr     (B, M, C, H, W)      written
    """
    i, p, inside = block_of(rows, pixels, tl.program_id(0).to(INDEX), ROWS, BLOCK)
    planes_ptr += i * (C + 1) * pixels + p
    inverse_d = reciprocal_or_0(tl.load(planes_ptr + C * pixels, inside, 0.0))
    for c in range(C):
        n = tl.load(planes_ptr + c * pixels, inside, 0.0)
        tl.store(psi_ptr + (i * C + c) * pixels + p, n * inverse_d, inside)


@varying
def prediction_gradients(
    dpsi_ptr, planes_ptr, rows, C, pixels,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """dn_c = dpsi_c / d and dd = - sum_c psi_c dn_c, and 0 where d = 0. The rows are those of all images' masks.

    dpsi_ptr    (B, M, C, H, W)
    planes_ptr  (B, M, C + 1, H, W)  n and d <- dn and dd
    """
    i, p, inside = block_of(rows, pixels, tl.program_id(0).to(INDEX), ROWS, BLOCK)
    planes_ptr += i * (C + 1) * pixels + p
    inverse_d = reciprocal_or_0(tl.load(planes_ptr + C * pixels, inside, 0.0))
    dd = tl.full(inverse_d.shape, 0, inverse_d.dtype)
    for c in range(C):
        psi = tl.load(planes_ptr + c * pixels, inside, 0.0) * inverse_d
        dn = tl.load(dpsi_ptr + (i * C + c) * pixels + p, inside, 0.0) * inverse_d
        dd -= psi * dn
        tl.store(planes_ptr + c * pixels, dn, inside)
    tl.store(planes_ptr + C * pixels, dd, inside)
