"""The formulas as they are printed, sharing nothing with the package: slow, plain, the yardstick."""

from __future__ import annotations

from itertools import chain, combinations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal


def others_subsets(K: int, centre: int) -> list[tuple[int, ...]]:
    """All nonempty subsets of the masks other than `centre`."""
    others = [i for i in range(K) if i != centre]
    return list(chain.from_iterable(combinations(others, size) for size in range(1, K)))


def blur(planes: Tensor, sigma: float, kernel_size: int, repeats: int) -> Tensor:
    """A separable Gaussian on every plane of (B, C, H, W) by itself, zeros outside, `repeats` times."""
    positions = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
    taps = torch.exp(-(positions**2) / (2 * sigma**2))
    taps = (taps / taps.sum()).to(planes)
    channels = planes.shape[1]
    for _ in range(repeats):
        down = taps.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
        across = taps.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
        planes = F.conv2d(planes, down, padding=(kernel_size // 2, 0), groups=channels)
        planes = F.conv2d(planes, across, padding=(0, kernel_size // 2), groups=channels)
    return planes


def filtered(
    image: Tensor,
    mask: Tensor,
    sigma: float = 5.0,
    kernel_size: int = 11,
    repeats: int = 2,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """Numerator (B, C, H, W) and denominator (B, 1, H, W) predicting from the pixels under mask (B, H, W)."""
    mask = mask.unsqueeze(1)
    planes = torch.cat([image * mask, mask], 1)
    planes = blur(planes, sigma, kernel_size, repeats) + eps * planes.sum((2, 3), keepdim=True)
    return planes[:, :-1], planes[:, -1:]


def inpaint(image: Tensor, mask: Tensor, **inpainter: float) -> Tensor:
    """psi (B, C, H, W), the image predicted from the pixels under mask (B, H, W)."""
    numerator, denominator = filtered(image, mask, **inpainter)
    return torch.where(denominator == 0, 0, numerator / torch.where(denominator == 0, 1, denominator))


def conditional_entropy(image: Tensor, centre: Tensor, given: Tensor, **inpainter: float) -> Tensor:
    """(B,): || centre * (image - psi_given) ||_1 / || centre ||_1; pixels out of `given`'s reach count 0."""
    _, denominator = filtered(image, given, **inpainter)
    error = (image - inpaint(image, given, **inpainter)).abs()
    error = torch.where(denominator == 0, 0, error).mean(1)
    norm = centre.sum((1, 2))
    return torch.where(norm == 0, 0, (centre * error).sum((1, 2)) / torch.where(norm == 0, 1, norm))


def iio_loss(image: Tensor, masks: Tensor, **inpainter: float) -> Tensor:
    """(B,): each image's loss, a term for every centre and every nonempty subset of the other masks."""
    K = masks.shape[1]
    loss = image.new_zeros(image.shape[0])
    for m in range(K):
        for subset in others_subsets(K, m):
            given = sum(masks[:, i] for i in subset)
            loss = loss - conditional_entropy(image, masks[:, m], given, **inpainter)
    return loss


def compose(decoded: Tensor) -> tuple[Tensor, Tensor]:
    """The reconstruction (B, C, H, W) and the masks (B, K, H, W), slot by slot."""
    likelihoods = [slot[:, -1].exp() for slot in decoded.unbind(1)]
    masks = [likelihood / sum(likelihoods) for likelihood in likelihoods]
    pictures = [mask.unsqueeze(1) * slot[:, :-1] for mask, slot in zip(masks, decoded.unbind(1), strict=True)]
    return sum(pictures), torch.stack(masks, 1)


def composition_error(image: Tensor, decoded: Tensor) -> tuple[Tensor, Tensor]:
    """Each image's mean squared error (B,), and the masks."""
    reconstruction, masks = compose(decoded)
    return ((reconstruction - image) ** 2).mean((1, 2, 3)), masks


def spatial_mixture(image: Tensor, decoded: Tensor, sigma: float = 0.1) -> tuple[Tensor, ...]:
    """log p (B, H, W), masks, posterior and leave-one-out (B, K, H, W), and d(-log p), for which decoded is a leaf."""
    log_m = decoded[:, :, -1].log_softmax(1)
    normals = [Normal(slot[:, :-1], sigma, validate_args=False) for slot in decoded.unbind(1)]
    log_p_k = torch.stack([normal.log_prob(image).sum(1) for normal in normals], 1)
    joint, masks = log_m + log_p_k, log_m.exp()
    log_p, K = joint.logsumexp(1), decoded.shape[1]
    others = [joint[:, [j for j in range(K) if j != k]].logsumexp(1) for k in range(K)]
    leave_one_out = torch.stack(others, 1) - (1 - masks).log()
    (d_decoded,) = torch.autograd.grad(-log_p.sum(), decoded, retain_graph=True)
    return log_p, masks, log_p_k.softmax(1), leave_one_out.detach(), d_decoded
