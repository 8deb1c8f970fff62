"""The all-subsets inpainting error in plain PyTorch: the formula itself, and its gradient written out.

For a set S of masks the inpainter predicts psi_S = N_S / D_S, with

    n_i = blur(X m_i),    d_i = blur(m_i),    N_S = sum_{i in S} n_i,    D_S = sum_{i in S} d_i

since the blur is linear: K blurs serve all 2^K sets. With the residuals r_i = X d_i - n_i the pixel's error is

    e_S = mean over channels of |X - psi_S| = mean_c |sum_{i in S} r_{i,c}| / D_S

and depends on S alone, not on the mask m whose entropy it enters:

    H(X m | S) / ||m||_1 = <m, e_S> / ||m||_1,    loss = - mean_b sum_m sum_{S without m, S nonempty} of that

(the Interaction Information Optimization paper, eq. 14; the inpainter is that of Inpainting Error Maximization,
Savarese et al. 2021). A set is an integer: bit i says whether mask i is in it, and subsets stand in that order.

`conditional_entropies` is what every backend is tested against; autograd differentiates it, any number of times, and
`sampled_loss`, whose sum is over a draw of sets, too. `loss_and_gradient` is what `IIOLossFunction` calls and every
backend offers. Arithmetic is at least float32 whatever the storage type and autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iio_kernels.ops.iio_loss.common import Draw, Inpainter, without_negligible
from iio_kernels.runtime.autograd import without_autocast
from iio_kernels.runtime.numerics import arithmetic_dtype, divide

#: Every subset's planes are held at once here, 2^K of them, so K is limited.
MAX_MASKS = 12


def blur(planes: Tensor, inpainter: Inpainter) -> Tensor:
    """Filter (..., H, W) planes: a separable Gaussian with zero padding `repeats` times, plus the eps term.

    Per plane this is P_H x P_W^T + eps * sum(x), P being the banded matrix of all passes along one axis, so repeats
    cost nothing. (Two passes of 11 taps are not one of 21: they differ at the borders.) The matrix is symmetric, hence
    blur is its own transpose.
    """
    height, width = planes.shape[-2:]
    filtered = _passes(height, planes, inpainter) @ planes @ _passes(width, planes, inpainter)
    return filtered + inpainter.eps * planes.sum((-2, -1), keepdim=True)


def _passes(length: int, like: Tensor, inpainter: Inpainter) -> Tensor:
    """The (length, length) matrix of all passes along one axis, made where it is used: no copy from the host."""
    position = torch.arange(length, device=like.device, dtype=torch.float64)
    distance = (position[:, None] - position[None, :]).abs()
    radius = inpainter.kernel_size // 2
    taps = torch.arange(inpainter.kernel_size, device=like.device, dtype=torch.float64) - radius
    total = torch.exp(-0.5 * (taps / inpainter.sigma) ** 2).sum()
    one_pass = torch.exp(-0.5 * (distance / inpainter.sigma) ** 2) / total
    one_pass = one_pass.masked_fill(distance > radius, 0)
    return torch.linalg.matrix_power(one_pass, inpainter.repeats).to(like.dtype)


def inpaint(image: Tensor, masks: Tensor, inpainter: Inpainter) -> Tensor:
    """psi (B, M, C, H, W), one prediction for each mask; 0 where the mask's blur is exactly 0."""
    with without_autocast(image.device):
        image, masks = _read(image, masks)
        n, d = _blurred(image, masks, inpainter)
        return divide(n, d.unsqueeze(2))


def conditional_entropies(image: Tensor, masks: Tensor, inpainter: Inpainter) -> Tensor:
    """H (B, K, 2^(K-1) - 1): entry (m, j) is <m, e_C> / ||m||_1, C the j-th nonempty subset of the other masks."""
    with without_autocast(image.device):
        image, masks = _read(image, masks)
        e = _errors(image, masks, inpainter, _Every(masks.shape[1]))
        # For every centre m and every set; those that hold m itself are then left out.
        dots = torch.einsum("bkhw,bshw->bks", masks, e)
        entropies = [_without(dots[:, m], m)[:, 1:] for m in range(masks.shape[1])]
        return divide(torch.stack(entropies, 1), masks.sum((-2, -1)).unsqueeze(-1))


def sampled_loss(image: Tensor, masks: Tensor, inpainter: Inpainter, draw: Draw) -> Tensor:
    """Each image's loss (B,), estimated from the sets of a draw: - sum_S w_S <g_S, e_S>, g_S = sum_{m not in S} g_m."""
    with without_autocast(image.device):
        image, masks = _read(image, masks)
        subsets = _Listed(draw, masks)
        g = divide(masks, masks.sum((-2, -1), keepdim=True))
        e = _errors(image, masks, inpainter, subsets)
        return -(subsets.weights * subsets.sums_outside(g) * e).sum((1, 2, 3))


def _errors(image: Tensor, masks: Tensor, inpainter: Inpainter, subsets: _Every | _Listed) -> Tensor:
    """e (B, S, H, W), for autograd to differentiate."""
    R, D = _residuals(image, *_blurred(image, masks, inpainter), subsets)
    e = divide(R.abs().mean(2), D)
    # The gradient of |NaN| is 0 in PyTorch. That of this sum is 1 + 0 * e: a NaN reaches the image's too.
    return e + 0 * e * e


def loss_and_gradient(
    image: Tensor,
    masks: Tensor,
    inpainter: Inpainter,
    needs_image_gradient: bool = True,
    needs_masks_gradient: bool = True,
    draw: Draw | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each image's loss (B,) and its gradients to image and masks, in the arithmetic's dtype; empty if not needed.

    The sums are over all subsets, or those of a draw; then its weights multiply w_S, and e_S in T_m.

    With g_m = m / ||m||_1, w_S = sum_{m not in S} g_m, T_m = sum_{S without m} e_S and sign(0) = 0:

        dr_{i,c} = sum_{S with i} w_S sign(R_{S,c}) / (C D_S)
        dd_i     = - sum_{S with i} w_S e_S / D_S + sum_c X_c dr_{i,c}
        dm_i     = blur(dd_i) - sum_c X_c blur(dr_{i,c}) + (T_i - <m_i, T_i> / ||m_i||) / ||m_i||
        dX_c     = sum_i (d_i dr_{i,c} - m_i blur(dr_{i,c}))

    all times -1.
    """
    with without_autocast(image.device):
        image, masks = _read(image, masks)
        C = image.shape[1]
        X = image.unsqueeze(1)
        subsets = _Every(masks.shape[1]) if draw is None else _Listed(draw, masks)
        n, d = _blurred(image, masks, inpainter)
        R, D = _residuals(image, n, d, subsets)
        inverse_D = torch.where(D == 0, 0, 1 / D)
        sign = R.sign() + 0 * R
        e = (sign * R).mean(2) * inverse_D

        norms = masks.sum((-2, -1), keepdim=True)
        inverse_norms = torch.where(norms == 0, 0, 1 / norms)
        g = masks * inverse_norms
        T = subsets.sums_without(subsets.weights * e)
        entropies = (g * T).sum((-2, -1), keepdim=True)
        w = subsets.weights * subsets.sums_outside(g)
        toward_r = w * inverse_D / C
        toward_R = toward_r.unsqueeze(2) * sign
        toward_D = -w * e * inverse_D

        dr = subsets.sums_with(toward_R)
        dd = subsets.sums_with(toward_D) + (X * dr).sum(2)
        blurred_dr = blur(dr, inpainter)
        dm = blur(dd, inpainter) - (X * blurred_dr).sum(2) + (T - entropies) * inverse_norms
        dX = (d.unsqueeze(2) * dr - masks.unsqueeze(2) * blurred_dr).sum(1)
        nothing = dm.new_empty(0)
        return (
            -entropies.sum((1, 2, 3)),
            -dX if needs_image_gradient else nothing,
            -dm if needs_masks_gradient else nothing,
        )


def _read(image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the arithmetic."""
    dtype = arithmetic_dtype(image, masks)
    masks = masks.to(dtype)
    # Rounded to 0, not cut off: a mask's gradient where it is 0 says whether the pixel should join it.
    return image.to(dtype), masks + (without_negligible(masks) - masks).detach()


def _blurred(image: Tensor, masks: Tensor, inpainter: Inpainter) -> tuple[Tensor, Tensor]:
    """n (B, K, C, H, W) and d (B, K, H, W)."""
    return blur(image.unsqueeze(1) * masks.unsqueeze(2), inpainter), blur(masks, inpainter)


def _residuals(image: Tensor, n: Tensor, d: Tensor, subsets: _Every | _Listed) -> tuple[Tensor, Tensor]:
    """R (B, S, C, H, W) and D (B, S, H, W) of all S subsets."""
    r = image.unsqueeze(1) * d.unsqueeze(2) - n
    return subsets.sums(r), subsets.sums(d)


class _Every:
    """All 2^K subsets, the empty one first; each counts once."""

    weights = 1

    def __init__(self, K: int) -> None:
        self.K = K

    def sums(self, x: Tensor) -> Tensor:
        """(B, K, ...) -> (B, S, ...): over the masks in each subset."""
        return _subset_sums(x)

    def sums_outside(self, x: Tensor) -> Tensor:
        """(B, K, ...) -> (B, S, ...): over the masks that are not in it."""
        return _subset_sums(x).flip(1)  # the complement of S is its index with all bits turned over

    def sums_with(self, x: Tensor) -> Tensor:
        """(B, S, ...) -> (B, K, ...): over the subsets with each mask."""
        return torch.stack([_with(x, i).sum(1) for i in range(self.K)], 1)

    def sums_without(self, x: Tensor) -> Tensor:
        """(B, S, ...) -> (B, K, ...): over the subsets without each mask."""
        return torch.stack([_without(x, i).sum(1) for i in range(self.K)], 1)


class _Listed:
    """The sets of a draw and after them their complements, with weights (S, 1, 1). Sums as in `_Every`."""

    def __init__(self, draw: Draw, masks: Tensor) -> None:
        bits = draw.pairs.unsqueeze(2) >> torch.arange(masks.shape[1], device=masks.device) & 1
        self.inside = torch.cat([bits, 1 - bits], 1).to(masks.dtype)  # (B, S, K)
        self.outside = 1 - self.inside
        self.weights = draw.weights.to(masks.dtype).repeat(2)[:, None, None]

    def sums(self, x: Tensor) -> Tensor:
        return torch.einsum("bsk,bk...->bs...", self.inside, x)

    def sums_outside(self, x: Tensor) -> Tensor:
        return torch.einsum("bsk,bk...->bs...", self.outside, x)

    def sums_with(self, x: Tensor) -> Tensor:
        return torch.einsum("bsk,bs...->bk...", self.inside, x)

    def sums_without(self, x: Tensor) -> Tensor:
        return torch.einsum("bsk,bs...->bk...", self.outside, x)


def _subset_sums(x: Tensor) -> Tensor:
    """(B, K, ...) -> (B, 2^K, ...): the sums over all subsets, each one addition from its parent in a binary tree.

    Additions only: D_S falls to 1e-6, and a total minus its complement would lose every digit of it in float32.
    """
    sums = torch.zeros_like(x[:, :1])
    for i in range(x.shape[1]):
        sums = torch.cat([sums, sums + x[:, i : i + 1]], 1)
    return sums


def _without(x: Tensor, i: int) -> Tensor:
    """Of (B, 2^K, ...) those subsets that do not hold mask i, in order: (B, 2^(K-1), ...)."""
    return x.unflatten(1, (-1, 2, 2**i))[:, :, 0].flatten(1, 2)


def _with(x: Tensor, i: int) -> Tensor:
    """Of (B, 2^K, ...) those subsets that hold mask i, in order: (B, 2^(K-1), ...)."""
    return x.unflatten(1, (-1, 2, 2**i))[:, :, 1].flatten(1, 2)
