"""Gaussian inpainting and what is built on it: the IIO loss, conditional entropies, interaction information."""

from __future__ import annotations

import torch
from torch import Tensor

from iio_kernels.ops.iio_loss import reference, validation
from iio_kernels.ops.iio_loss.common import Inpainter, without_negligible
from iio_kernels.ops.iio_loss.functions import ConditionalEntropiesFunction, IIOLossFunction, InpaintFunction
from iio_kernels.runtime import checks
from iio_kernels.runtime.docs import documented
from iio_kernels.runtime.options import InpaintingBackend, Reduction, Terms

# The paragraphs that the four public functions share; `documented` puts them in place of {these names}.
_SHARED = {
    "image": """image: `(B, C, H, W)`, floating point, meant to be in [0, 1]; any C >= 1, any strides.""",
    "masks": """masks: `(B, K, H, W)`, floating point, meant to be in [0, 1] and to sum to 1 over K (a softmax).""",
    "inpainter": """sigma: standard deviation of the Gaussian in pixels, > 0.
        kernel_size: number of taps, odd, at most H and W. They are normalised to sum to 1; borders see zeros.
        repeats: how many times the filter is applied, >= 1.
        eps: >= 0, relative: eps times each plane's sum over pixels, taken before filtering, is added to it after,
            so that far from a mask the prediction falls back to the mask's mean color.""",
    "backend": """backend: "auto" takes the fastest that serves the tensors' device; see `iio_kernels.backends()`.""",
    "empty": """Empty masks: a term whose mask, or whose whole conditioning set, sums to exactly 0 is 0 with zero
    gradient; so is, with eps = 0, the error of a pixel that the filter does not reach from the set. Mask values below
    1e-20 count as 0: gradients divide by a mask's sum, and float32 ends at 1e38. Values are never inspected: a NaN
    travels into result and gradients, and no call waits for the device.""",
    "raises": """Raises:
        TypeError: image or masks is not a floating-point tensor, or an option has the wrong type.
        ValueError: shapes, devices or options do not fit, or K is over the backend's limit (reference: 12, others: 16).
        RuntimeError: the backend asked for by name cannot be used on this machine.""",
}


@documented(_SHARED)
def iio_loss(
    image: Tensor,
    masks: Tensor,
    *,
    sigma: float = 5.0,
    kernel_size: int = 11,
    repeats: int = 2,
    eps: float = 1e-8,
    terms: Terms = "sum",
    reduction: Reduction = "mean",
    subsets: int | None = None,
    generator: torch.Generator | None = None,
    backend: InpaintingBackend = "auto",
) -> Tensor:
    """The Interaction Information Optimization loss: minimise it to make masks that cannot predict one another.

        loss = - mean_b sum_m (1 / ||m||_1) sum_{S subset of the other masks, S nonempty} ||m * (X - psi_S)||_1

    psi_S is the image inpainted from the pixels under the masks in S (see `inpaint`); the norm is a mean over
    channels and a sum over pixels. It is the negative sum of all conditional entropies,
    `-conditional_entropies(image, masks).sum((1, 2)).mean()`, and for K = 2 the negative of the Inpainting Error
    Maximization objective.

    Args:
        {image}
        {masks} K from 2.
        {inpainter}
        terms: "sum" as above, which grows as K 2^(K-1) (28 terms at K = 4, 441 at K = 7), or "mean": each mask's sum
            is divided by its number of terms, 2^(K-1) - 1.
        reduction: over images, "mean", "sum" or "none" (returns `(B,)`). The mean over no images is NaN, as in torch.
        subsets: None for the sum over all 2^K - 2 sets S; or how many of them to draw for each image, an even number
            (an odd one is rounded down) of at least 2 floor(K / 2); from 2^K - 2 on the result is the default's. The
            estimate of the loss is unbiased, and so are its gradients. K may then be up to 32, whatever the backend.
            The first call for a K and a number designs the draw on the host, in tenths of a second, and copies it to
            the device; `torch.export` of it is to be strict.
        generator: where the draw takes its random numbers from, a torch.Generator of the images' device; None takes
            torch's own. The same state gives the same draw. torch.compile(fullgraph=True) refuses any but None.
        {backend}

    Returns:
        A scalar, or `(B,)` for reduction="none", in at least float32 (the wider of the inputs' dtypes). The loss lies
        in [-K (2^(K-1) - 1), 0] for images and masks in [0, 1]. Gradients go to masks and to image; they are those of
        absolute values: where a residual is exactly 0 its sign counts as 0.

    {empty}

    {raises}

    The draw: sets come in pairs, S and its complement, of each size as many as lower the variance most, and spread so
    that any two masks are together about as often as apart; which mask is which is random, for each image anew (see
    `iio_kernels.ops.iio_loss.sampling`). At K = 8 and 64 of the 254 sets the gradient's variance is 1/6 to 1/90 of
    that of as many sets drawn uniformly (docs/experiments.md).

    Complexity: K (C + 1) blurs, then O(2^K C) operations a pixel, for loss and gradient alike (the formula as printed
    takes K 2^(K-1) blur pairs); for n subsets O(n K C). The reference backend holds a few times 2^K (C + 1)
    planes of H x W for each image, or n (C + 1).

    Source: the Interaction Information Optimization paper, equation 14; inpainter and K = 2 case: Savarese et al.
    2021, "Information-Theoretic Segmentation by Inpainting Error Maximization".

    Example:
        >>> image, masks = torch.rand(8, 3, 35, 35), torch.rand(8, 4, 35, 35).softmax(1).requires_grad_()
        >>> iio_loss(image, masks).backward()
    """
    inpainter = Inpainter(sigma, kernel_size, repeats, eps)
    name = validation.backend_for(image, masks, inpainter, backend, min_masks=2, enumerates=subsets is None)
    checks.option("terms", terms, ("sum", "mean"))
    checks.option("reduction", reduction, ("mean", "sum", "none"))
    draw = validation.drawn(image, masks, subsets, generator)
    if name == "reference":
        losses = (
            -reference.conditional_entropies(image, masks, inpainter).sum((1, 2))
            if draw is None
            else reference.sampled_loss(image, masks, inpainter, draw)
        )
    else:
        image, masks = _inputs(image, masks)
        needs_gradient = image.requires_grad, masks.requires_grad
        pairs, weights = (None, None) if draw is None else (draw.pairs, draw.weights)
        losses, _, _ = IIOLossFunction.apply(image, masks, pairs, weights, inpainter, needs_gradient, name)
    if terms == "mean":
        losses = losses / (2 ** (masks.shape[1] - 1) - 1)
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


@documented(_SHARED)
def conditional_entropies(
    image: Tensor,
    masks: Tensor,
    *,
    sigma: float = 5.0,
    kernel_size: int = 11,
    repeats: int = 2,
    eps: float = 1e-8,
    backend: InpaintingBackend = "auto",
) -> Tensor:
    """How badly each mask's pixels are predicted from each set of other masks: every term of the IIO loss.

        out[b, m, j] = H(X m | X sum of C_j) / ||m||_1 = ||m * (X - psi_{C_j})||_1 / ||m||_1

    C_j is the j-th nonempty subset of the other masks: write the others in ascending order as bits 0 .. K-2; C_j
    holds those whose bit is set in j + 1. For K = 4 and m = 1 the others are 0, 2, 3 and the sets are, in order,
    {0}, {2}, {0, 2}, {3}, {0, 3}, {2, 3}, {0, 2, 3}.

    Args:
        {image}
        {masks} K from 2.
        {inpainter}
        {backend}

    Returns:
        `(B, K, 2**(K-1) - 1)`, in at least float32; in [0, 1] for images and masks in [0, 1]. Differentiable in image
        and masks.

    {empty}

    {raises}

    Complexity: that of `iio_loss`, plus the O(K 2^(K-1)) sums over pixels that are the result.

    Source: the Interaction Information Optimization paper, equations 10 to 14.
    """
    inpainter = Inpainter(sigma, kernel_size, repeats, eps)
    name = validation.backend_for(image, masks, inpainter, backend, min_masks=2)
    if name == "reference":
        return reference.conditional_entropies(image, masks, inpainter)
    return ConditionalEntropiesFunction.apply(*_inputs(image, masks), inpainter, name)


@documented(_SHARED)
def interaction_information(
    image: Tensor,
    masks: Tensor,
    *,
    sigma: float = 5.0,
    kernel_size: int = 11,
    repeats: int = 2,
    eps: float = 1e-8,
    backend: InpaintingBackend = "auto",
) -> Tensor:
    """The interaction information of all masks, centred on each of them in turn and normalised by its size.

        I_m = sum_{S subset of the other masks} (-1)^|S| H(X m | S) / ||m||_1

    The 2^(K-1) - 1 terms of nonempty S are `conditional_entropies`. The term of the empty set, the entropy of the
    region by itself, is proportional to its size: normalised it is 1, the largest error an image in [0, 1] allows.
    So I_m is 0 where every conditional entropy is maximal, since the signs of all subsets cancel, and for K = 2 it is
    the mutual information 1 - H(X m | others) / ||m||_1.

    Args:
        {image}
        {masks} K from 2.
        {inpainter}
        {backend}

    Returns:
        `(B, K)`, in at least float32. Differentiable in image and masks. For K > 2 it may be negative.

    {empty}

    {raises}

    Complexity: that of `conditional_entropies`.

    Source: the Interaction Information Optimization paper, equations 10 to 13 and appendix B.
    """
    H = conditional_entropies(
        image, masks, sigma=sigma, kernel_size=kernel_size, repeats=repeats, eps=eps, backend=backend
    )
    subsets = torch.arange(1, H.shape[2] + 1, device=H.device)
    sizes = sum((subsets >> i) & 1 for i in range(masks.shape[1] - 1))
    # An empty region has no entropy at all; a NaN norm differs from 0 and is left to H to carry.
    norms = without_negligible(masks.detach()).sum((-2, -1))
    entropy_alone = (norms != 0).to(H.dtype)
    return entropy_alone + (H * (1 - 2 * (sizes % 2))).sum(2)


@documented(_SHARED)
def inpaint(
    image: Tensor,
    masks: Tensor,
    *,
    sigma: float = 5.0,
    kernel_size: int = 11,
    repeats: int = 2,
    eps: float = 1e-8,
    backend: InpaintingBackend = "auto",
) -> Tensor:
    """Predict the whole image from the pixels under each mask, by a normalised Gaussian filter.

        psi_m = (F(X m) + eps sum(X m)) / (F(m) + eps sum(m)),    F = the filter, `repeats` times

    To predict from a set of masks pass their sum as one mask.

    Args:
        {image}
        {masks} Here each is used by itself and the second dimension, M, may be any number from 1.
        {inpainter}
        {backend}

    Returns:
        psi `(B, M, C, H, W)`, in at least float32: convex combinations of the colors under the mask. 0 where the
        denominator is exactly 0 (an empty mask; or far from the mask with eps = 0). Differentiable in image and masks.

    Values are never inspected: a NaN travels into the result and its gradients, and no call waits for the device.

    {raises}

    Complexity: M (C + 1) blurs.

    Source: Savarese et al. 2021, "Information-Theoretic Segmentation by Inpainting Error Maximization".
    """
    inpainter = Inpainter(sigma, kernel_size, repeats, eps)
    name = validation.backend_for(image, masks, inpainter, backend, min_masks=1, enumerates=False)
    if name == "reference":
        return reference.inpaint(image, masks, inpainter)
    return InpaintFunction.apply(*_inputs(image, masks), inpainter, name)


def _inputs(image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """What the Functions are called on: where no gradient is recorded, none is computed either."""
    return (image, masks) if torch.is_grad_enabled() else (image.detach(), masks.detach())
