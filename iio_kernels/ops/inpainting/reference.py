"""The all-subsets inpainting error in plain PyTorch: the formula itself, and its gradient written out.

For a set S of masks the inpainter predicts psi_S = N_S / D_S, with

    n_i = blur(X m_i),    d_i = blur(m_i),    N_S = sum_{i in S} n_i,    D_S = sum_{i in S} d_i

since the blur is linear: K blurs serve all 2^K sets. With the residuals r_i = X d_i - n_i the pixel's error is

    e_S = mean over channels of |X - psi_S| = mean_c |sum_{i in S} r_{i,c}| / D_S

and depends on S alone, not on the mask m whose entropy it enters:

    H(X m | S) / ||m||_1 = <m, e_S> / ||m||_1,    loss = - mean_b sum_m sum_{S without m, S nonempty} of that

(the Interaction Information Optimization paper, eq. 14; the inpainter is that of Inpainting Error Maximization,
Savarese et al. 2021). A set is an integer: bit i says whether mask i is in it, and subsets stand in that order.

`conditional_entropies` is what every backend is tested against; autograd differentiates it, any number of times.
`loss_and_gradient` is what `IIOLossFunction` calls and every backend offers. Arithmetic is at least float32
whatever the storage type and autocast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iio_kernels._autograd import without_autocast
from iio_kernels._numerics import arithmetic_dtype, divide

#: Every subset's planes are held at once here, 2^K of them, so K is limited.
MAX_MASKS = 12

#: Mask values below this count as 0. A softmax easily leaves a slot 1e-30 everywhere, and gradients divide by such a
#: mask's sum and by eps times it: 1e28 is within float32's range, 1e38 is not.
NEGLIGIBLE = 1e-20


@dataclass(frozen=True)
class Inpainter:
    """The Gaussian inpainter's options, checked: see `iio_kernels.inpaint`."""

    sigma: float
    kernel_size: int
    repeats: int
    eps: float

    def blur(self, planes: Tensor) -> Tensor:
        """Filter (..., H, W) planes: a separable Gaussian with zero padding `repeats` times, plus the eps term.

        Per plane this is P_H x P_W^T + eps * sum(x), P being the banded matrix of all passes along one axis, so
        repeats cost nothing. (Two passes of 11 taps are not one of 21: they differ at the borders.) The matrix is
        symmetric, hence blur is its own transpose.
        """
        height, width = planes.shape[-2:]
        filtered = self._passes(height, planes) @ planes @ self._passes(width, planes)
        return filtered + self.eps * planes.sum((-2, -1), keepdim=True)

    def _passes(self, length: int, like: Tensor) -> Tensor:
        """The (length, length) matrix of all passes along one axis, made where it is used: no copy from the host."""
        position = torch.arange(length, device=like.device, dtype=torch.float64)
        distance = (position[:, None] - position[None, :]).abs()
        taps = torch.arange(self.kernel_size, device=like.device, dtype=torch.float64) - self.kernel_size // 2
        total = torch.exp(-0.5 * (taps / self.sigma) ** 2).sum()
        one_pass = torch.exp(-0.5 * (distance / self.sigma) ** 2) / total
        one_pass = one_pass.masked_fill(distance > self.kernel_size // 2, 0)
        return torch.linalg.matrix_power(one_pass, self.repeats).to(like.dtype)


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
        R, D = _subset_residuals(image, *_blurred(image, masks, inpainter))
        e = divide(R.abs().mean(2), D)
        # The gradient of |NaN| is 0 in PyTorch. That of this sum is 1 + 0 * e: a NaN reaches the image's too.
        e = e + 0 * e * e
        # For every centre m and every set; those that hold m itself are then left out.
        dots = torch.einsum("bkhw,bshw->bks", masks, e)
        entropies = [_without(dots[:, m], m)[:, 1:] for m in range(masks.shape[1])]
        return divide(torch.stack(entropies, 1), masks.sum((-2, -1)).unsqueeze(-1))


def loss_and_gradient(
    image: Tensor,
    masks: Tensor,
    inpainter: Inpainter,
    needs_image_gradient: bool = True,
    needs_masks_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each image's loss (B,) and its gradients to image and masks, in the arithmetic's dtype; empty if not needed.

    With g_m = m / ||m||_1, w_S = sum_{m not in S} g_m, T_m = sum_{S without m} e_S and sign(0) = 0:

        dr_{i,c} = sum_{S with i} w_S sign(R_{S,c}) / (C D_S)
        dd_i     = - sum_{S with i} w_S e_S / D_S + sum_c X_c dr_{i,c}
        dm_i     = blur(dd_i) - sum_c X_c blur(dr_{i,c}) + (T_i - <m_i, T_i> / ||m_i||) / ||m_i||
        dX_c     = sum_i (d_i dr_{i,c} - m_i blur(dr_{i,c}))

    all times -1.
    """
    with without_autocast(image.device):
        image, masks = _read(image, masks)
        K, C = masks.shape[1], image.shape[1]
        X = image.unsqueeze(1)
        n, d = _blurred(image, masks, inpainter)
        R, D = _subset_residuals(image, n, d)
        inverse_D = torch.where(D == 0, 0, 1 / D)
        sign = R.sign() + 0 * R
        e = (sign * R).mean(2) * inverse_D

        norms = masks.sum((-2, -1), keepdim=True)
        inverse_norms = torch.where(norms == 0, 0, 1 / norms)
        g = masks * inverse_norms
        T = torch.stack([_without(e, m).sum(1) for m in range(K)], 1)
        entropies = (g * T).sum((-2, -1), keepdim=True)
        w = _subset_sums(g).flip(1)  # the complement of S is its index with all bits turned over
        toward_r = w * inverse_D / C
        toward_R = toward_r.unsqueeze(2) * sign
        toward_D = -w * e * inverse_D

        dr = torch.stack([_with(toward_R, i).sum(1) for i in range(K)], 1)
        dd = torch.stack([_with(toward_D, i).sum(1) for i in range(K)], 1) + (X * dr).sum(2)
        blurred_dr = inpainter.blur(dr)
        dm = inpainter.blur(dd) - (X * blurred_dr).sum(2) + (T - entropies) * inverse_norms
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


def without_negligible(masks: Tensor) -> Tensor:
    return masks.masked_fill(masks.abs() < NEGLIGIBLE, 0)


def _blurred(image: Tensor, masks: Tensor, inpainter: Inpainter) -> tuple[Tensor, Tensor]:
    """n (B, K, C, H, W) and d (B, K, H, W)."""
    return inpainter.blur(image.unsqueeze(1) * masks.unsqueeze(2)), inpainter.blur(masks)


def _subset_residuals(image: Tensor, n: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """R (B, 2^K, C, H, W) and D (B, 2^K, H, W) of every subset, the empty one first."""
    r = image.unsqueeze(1) * d.unsqueeze(2) - n
    return _subset_sums(r), _subset_sums(d)


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
