"""Inpainting and the IIO loss in Triton: on a GPU, and for tests in Triton's interpreter on a CPU.

The formulas are those of reference.py, the names those of csrc/subsets.h. Three steps make a loss and its gradient:

    planes <- F(X_c m_i), F(m_i)          filter_planes: products, their totals and the filter, a plane a program
    planes <- dn_{i,c}, dd_i; T; losses   subsets: all 2^K sets of a pixel in registers, a pixel a thread
                                          (or listed_subsets: those of a draw)
    planes <- F(dn_{i,c}), F(dd_i)        filter_planes, in place
    dmasks, dimage                        masks_gradient, image_gradient

A kernel is in the file triton_<subject>.py; here are their launches and the operators.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from iio_kernels.ops.iio_loss import common, schema
from iio_kernels.ops.iio_loss.common import Inpainter
from iio_kernels.ops.iio_loss.triton_filter import filter_planes
from iio_kernels.ops.iio_loss.triton_gradients import image_gradient, masks_gradient
from iio_kernels.ops.iio_loss.triton_listed_subsets import listed_subsets
from iio_kernels.ops.iio_loss.triton_predictions import prediction_gradients, predictions
from iio_kernels.ops.iio_loss.triton_subsets import entropies, subsets
from iio_kernels.runtime.numerics import arithmetic_dtype
from iio_kernels.runtime.triton_support import INTERPRETED, index_type

MAX_MASKS = common.MAX_MASKS

# ---- Launches -------------------------------------------------------------------------------------------------------

#: The fewest and the most elements that a program takes at a time. Filter and subsets have a thread for each, which
#: needs most of the registers that it can have; the others give each of 128 threads several loads to wait for at once.
LINES, SETS, PIXELS = (64, 512), (128, 128), (1024, 1024)

#: How many pairs of a list a thread has in registers at a time.
PAIRS = 4


def _block(rows: int, length: int, least: int, most: int) -> tuple[int, int]:
    """The shape of a block: `length`, as far as `most` elements go, and as many rows as it takes to have `least`.

    Never fewer than there are threads: of two that hold the same element one could read what the other has overwritten.
    """
    if INTERPRETED:  # which takes as long for many elements as for one
        most = 2**16
        least = min(triton.next_power_of_2(rows * triton.next_power_of_2(length)), most)
    columns = min(triton.next_power_of_2(length), most)
    return max(least // columns, 1), columns


def _launch(kernel: Any, programs: int, *arguments: Any, threads: int = 128, **constants: Any) -> None:
    """Launch on the tensors' device, which need not be the current one.

    No product is fused with a sum behind the kernels' back: what is equal on paper is to cancel.
    """
    if programs > 0:
        with torch.cuda.device_of(arguments[0]):
            warps = threads // (64 if torch.version.hip else 32)
            kernel[(programs,)](*arguments, **constants, num_warps=warps, num_stages=1, enable_fp_fusion=False)


class _Call:
    """An operator's inputs, its scratch memory, and the launches that operators share."""

    def __init__(self, image: Tensor, masks: Tensor, *inpainter: Any) -> None:
        self.image, self.masks, self.inpainter = image, masks, Inpainter(*inpainter)
        self.B, self.C, self.H, self.W = image.shape
        self.K, self.pixels = masks.shape[1], self.H * self.W
        self.dtype = arithmetic_dtype(image, masks)
        self.planes = self.empty(self.B, self.K, self.C + 1, self.H, self.W)
        # Those of the products, of which the masks' own are their norms, and those of the gradients to n and d.
        self.totals = self.empty(2, self.B, self.K, self.C + 1)
        self.numbers = {
            "DTYPE": tl.float64 if self.dtype == torch.float64 else tl.float32,
            "INDEX": index_type(image, masks, self.planes),
        }

    def empty(self, *shape: int) -> Tensor:
        return self.image.new_empty(shape, dtype=self.dtype)

    def blocks(self, rows: int) -> tuple[int, dict[str, Any]]:
        """How many programs take all pixels of so many rows, and their blocks."""
        ROWS, BLOCK = _block(rows, self.pixels, *PIXELS)
        return triton.cdiv(rows, ROWS) * triton.cdiv(self.pixels, BLOCK), {"ROWS": ROWS, "BLOCK": BLOCK}

    def filter(self, products: bool) -> None:
        """planes <- the filtered products, or themselves filtered."""
        sigma, taps, repeats, eps = self.inpainter
        count = self.B * self.K * (self.C + 1)
        PLANES, LANES = _block(count, max(self.H, self.W), *LINES)
        most = max(66 // taps, 1)
        for first in range(0, repeats, most):
            passes = min(most, repeats - first)
            _launch(
                filter_planes, triton.cdiv(count, PLANES),
                self.image, self.masks, self.planes, self.totals[0 if products else 1],
                self.image.stride(), self.masks.stride(), count, self.K, self.C, self.H, self.W, sigma, eps,
                PRODUCTS=products and first == 0, FIRST=first == 0, LAST=first + passes == repeats,
                RADIUS=taps // 2, PASSES=passes, PLANES=PLANES, LANES=LANES, STEP=8, threads=PLANES * LANES,
                **self.numbers,
            )  # fmt: skip

    def subsets(self, weights: Tensor | None, dimage: Tensor | None, T: Tensor | None) -> Tensor:
        """planes <- dn and dd if a gradient is wanted; T, and dimage but for its filtered part. Returns dots."""
        ROWS, BLOCK = _block(self.B, self.pixels, *SETS)
        parts = triton.cdiv(self.pixels, BLOCK)
        dots = self.empty(self.B, self.K, parts)
        # The tree's gradients and T are to stay in registers: more masks, weights or AMD's compiler need more of them.
        LOW = 4 if self.K <= 8 and weights is None and not torch.version.hip else 3
        _launch(
            subsets, triton.cdiv(self.B, ROWS) * parts,
            self.image, self.masks, self.planes, self.totals, weights, T, dimage, dots,
            self.image.stride(), self.masks.stride(), self.B, self.H, self.W,
            K=self.K, C=self.C, CHANNELS=triton.cdiv(self.C, triton.cdiv(self.C, 3)), LOW=min(self.K, LOW),
            GRADIENTS=dimage is not None or T is not None, ROWS=ROWS, BLOCK=BLOCK, **self.numbers,
        )  # fmt: skip
        return dots

    def listed_subsets(
        self, pairs: Tensor, weights: Tensor, dimage: Tensor | None, T: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `subsets`, of a list of pairs. Returns the losses in parts and dots."""
        P, gradients = pairs.shape[1], dimage is not None or T is not None
        ROWS, BLOCK = _block(self.B, self.pixels, *SETS)
        parts = triton.cdiv(self.pixels, BLOCK)
        losses, dots = self.empty(self.B, parts), self.empty(self.B, self.K, parts)
        CHANNELS = triton.cdiv(self.C, triton.cdiv(self.C, 3))
        sums = self.empty(self.B, self.K, CHANNELS + 1, self.H, self.W) if gradients else None
        _launch(
            listed_subsets, triton.cdiv(self.B, ROWS) * parts,
            self.image, self.masks, self.planes, self.totals, pairs, weights, sums, T, dimage, losses, dots,
            self.image.stride(), self.masks.stride(), self.B, self.K, self.H, self.W, P,
            C=self.C, CHANNELS=CHANNELS, PAIRS=PAIRS, GRADIENTS=gradients, ROWS=ROWS, BLOCK=BLOCK, **self.numbers,
        )  # fmt: skip
        return losses, dots

    def gradients(self, dimage: Tensor | None, dmasks: Tensor | None, dots: Tensor | None) -> None:
        """Of planes dn and dd, and of what subsets left in dimage and dmasks where there are dots."""
        self.filter(products=False)
        if dmasks is not None:
            programs, block = self.blocks(self.B * self.K)
            parts = 1 if dots is None else dots.shape[2]
            _launch(
                masks_gradient, programs,
                self.image, self.planes, self.totals, dots, dmasks,
                self.image.stride(), self.B * self.K, self.K, self.C, self.H, self.W, parts,
                PARTS=triton.next_power_of_2(parts), **block, **self.numbers,
            )  # fmt: skip
        if dimage is not None:
            programs, block = self.blocks(self.B * self.C)
            _launch(
                image_gradient, programs,
                self.masks, self.planes, dimage,
                self.masks.stride(), self.B * self.C, self.K, self.C, self.H, self.W,
                DIRECT=dots is not None, **block, **self.numbers,
            )  # fmt: skip


# ---- Operators ------------------------------------------------------------------------------------------------------


def _iio_loss(image: Tensor, masks: Tensor, *options: float) -> tuple[Tensor, Tensor, Tensor]:
    return _loss(image, masks, None, *options)


def _sampled_iio_loss(
    image: Tensor, masks: Tensor, pairs: Tensor, weights: Tensor, *options: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _loss(image, masks, (pairs.contiguous(), weights.contiguous()), *options)


def _loss(
    image: Tensor, masks: Tensor, listed: tuple[Tensor, Tensor] | None, *options: float
) -> tuple[Tensor, Tensor, Tensor]:
    *inpainter, image_gradient, masks_gradient = options
    call = _Call(image, masks, *inpainter)
    dimage = call.empty(*image.shape) if image_gradient else None
    dmasks = call.empty(*masks.shape) if masks_gradient else None
    if listed is not None:
        call.numbers["INDEX"] = index_type(image, masks, call.planes, listed[0])
    call.filter(products=True)
    if listed is None:
        dots = call.subsets(None, dimage, dmasks)
        losses = dots.sum((1, 2))
    else:
        parts, dots = call.listed_subsets(*listed, dimage, dmasks)
        losses = parts.sum(1)
    if image_gradient or masks_gradient:
        call.gradients(dimage, dmasks, dots)
    dimage, dmasks = (call.empty(0) if x is None else x for x in (dimage, dmasks))
    return losses, dimage, dmasks


def _conditional_entropies(image: Tensor, masks: Tensor, *inpainter: float) -> Tensor:
    call = _Call(image, masks, *inpainter)
    result = call.empty(call.B, call.K, 2 ** (call.K - 1) - 1)
    call.numbers["INDEX"] = index_type(image, masks, call.planes, result)
    call.filter(products=True)
    ROWS, BLOCK = _block(call.B, call.pixels, *SETS)
    _launch(
        entropies, triton.cdiv(call.B, ROWS) * 2 ** (call.K - 2),
        image, masks, call.planes, call.totals, result,
        image.stride(), masks.stride(), call.B, call.H, call.W,
        K=call.K, C=call.C, ROWS=ROWS, BLOCK=BLOCK, **call.numbers,
    )  # fmt: skip
    return result


def _conditional_entropies_backward(grad: Tensor, image: Tensor, masks: Tensor, *options) -> tuple[Tensor, Tensor]:
    *inpainter, image_gradient = options
    call = _Call(image, masks, *inpainter)
    weights = grad.contiguous()
    call.numbers["INDEX"] = index_type(image, masks, call.planes, weights)
    dimage = call.empty(*image.shape) if image_gradient else None
    dmasks = call.empty(*masks.shape)
    call.filter(products=True)
    dots = call.subsets(weights, dimage, dmasks)
    call.gradients(dimage, dmasks, dots)
    return call.empty(0) if dimage is None else dimage, dmasks


def _inpaint(image: Tensor, masks: Tensor, *inpainter: float) -> Tensor:
    call = _Call(image, masks, *inpainter)
    psi = call.empty(call.B, call.K, *image.shape[1:])
    call.filter(products=True)
    programs, block = call.blocks(call.B * call.K)
    sizes = call.B * call.K, call.C, call.pixels
    _launch(predictions, programs, call.planes, psi, *sizes, **block, INDEX=call.numbers["INDEX"])
    return psi


def _inpaint_backward(grad: Tensor, image: Tensor, masks: Tensor, *inpainter: float) -> tuple[Tensor, Tensor]:
    call = _Call(image, masks, *inpainter)
    dimage, dmasks = call.empty(*image.shape), call.empty(*masks.shape)
    call.filter(products=True)
    programs, block = call.blocks(call.B * call.K)
    sizes = call.B * call.K, call.C, call.pixels
    dpsi = grad.contiguous()
    _launch(prediction_gradients, programs, dpsi, call.planes, *sizes, **block, INDEX=call.numbers["INDEX"])
    call.gradients(dimage, dmasks, None)
    return dimage, dmasks


#: The kernels read any storage type.
loss_and_gradient, conditional_entropies, conditional_entropies_backward, inpaint, inpaint_backward = schema.calls(
    "iio_kernels_triton", lambda image, masks: (image, masks)
)
for _implementation in (
    _iio_loss,
    _sampled_iio_loss,
    _conditional_entropies,
    _conditional_entropies_backward,
    _inpaint,
    _inpaint_backward,
):
    torch.library.impl(f"iio_kernels_triton::{_implementation.__name__[1:]}", ("cpu", "cuda"), _implementation)
