"""The gradients to masks and image in Triton, made of the filtered gradients to n and d."""

from __future__ import annotations

import triton.language as tl

from iio_kernels.ops.iio_loss.triton_tuples import block_of, read_mask, reciprocal_or_0, varying


@varying
def masks_gradient(
    X_ptr, planes_ptr, totals_ptr, dots_ptr, dmasks_ptr,
    X_strides, rows, K, C, H, W, parts,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """dm_i = F(dd_i) + sum_c X_c F(dn_{i,c}), with T + (T_i - <g_i, T_i>) / ||m_i||. The rows are all images' masks.

    X_ptr       (B, C, H, W), X_strides
    planes_ptr  (B, K, C + 1, H, W)  F(dn) and F(dd)
    totals_ptr  (B, K, C + 1)        of which that of a mask itself is its norm
    dots_ptr    (B, K, parts)        <g_i, T_i> in parts, at most PARTS; or None, there being no T
    dmasks_ptr  (B, K, H, W)         T if there is one; written
    """
    pixels = tl.cast(H, INDEX) * W
    i, p, inside = block_of(rows, pixels, tl.program_id(0).to(INDEX), ROWS, BLOCK)
    X_ptr += i // K * X_strides[0] + p // W * X_strides[2] + p % W * X_strides[3]
    planes_ptr += i * (C + 1) * pixels + p
    dmasks_ptr += i * pixels + p
    dm = tl.load(planes_ptr + C * pixels, inside, 0.0)
    for c in range(C):
        X = tl.load(X_ptr + c * X_strides[1], inside, 0.0).to(DTYPE)
        dm += X * tl.load(planes_ptr + c * pixels, inside, 0.0)
    if dots_ptr is not None:
        part = tl.arange(0, PARTS)[None, :]
        dot = tl.sum(tl.load(dots_ptr + i * parts + part, (i < rows) & (part < parts), 0.0), 1, keep_dims=True)
        inverse_norm = reciprocal_or_0(tl.load(totals_ptr + i * (C + 1) + C, i < rows, 0.0))
        dm += (tl.load(dmasks_ptr, inside, 0.0) - dot) * inverse_norm
    tl.store(dmasks_ptr, dm, inside)


@varying
def image_gradient(
    m_ptr, planes_ptr, dimage_ptr,
    m_strides, rows, K, C, H, W,
    DIRECT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """dX_c = sum_i m_i F(dn_{i,c}), with DIRECT + sum_i d_i dr_{i,c}. The rows are all images' channels.

    m_ptr       (B, K, H, W), m_strides
    planes_ptr  (B, K, C + 1, H, W)  F(dn) and F(dd)
    dimage_ptr  (B, C, H, W)         sum_i d_i dr_i if DIRECT; written
    """
    pixels = tl.cast(H, INDEX) * W
    row, p, inside = block_of(rows, pixels, tl.program_id(0).to(INDEX), ROWS, BLOCK)
    b = row // C
    m_ptr += b * m_strides[0] + p // W * m_strides[2] + p % W * m_strides[3]
    planes_ptr += (b * K * (C + 1) + row % C) * pixels + p
    dimage_ptr += row * pixels + p
    dX = tl.load(dimage_ptr, inside & DIRECT, 0.0)
    for i in range(K):
        m = read_mask(m_ptr + i * m_strides[1], inside, DTYPE)
        dX += m * tl.load(planes_ptr + i * (C + 1) * pixels, inside, 0.0)
    tl.store(dimage_ptr, dX, inside)
