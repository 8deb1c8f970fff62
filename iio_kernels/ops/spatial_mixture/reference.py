"""The spatial mixture in plain PyTorch: the formulas themselves, and their gradient written out.

    m_k       = softmax over the slots k of l_k
    log p_k   = sum_c log N(x_c; mu_{k,c}, sigma^2)
    log p     = logsumexp_k (log m_k + log p_k)                      the log-likelihood
    r_k       = m_k p_k / sum_j m_j p_j                              the responsibilities
    q_k       = p_k / sum_j p_j                                      the posterior under a uniform prior
    log p_{-k} = log of sum_{j != k} m_j p_j / sum_{j != k} m_j      the log-likelihood that leaves slot k out

at every pixel, with decoded = (mu, l) and the image x. (Greff et al. 2019, "Multi-Object Representation Learning with
Iterative Variational Inference", eq. 1 and appendix C.) The gradients of -log p are

    d_mu_{k,c} = r_k (mu_{k,c} - x_c) / sigma^2,    d_l_k = m_k - r_k

`forward` and `backward` are the pair that `MixtureFunction` calls and every backend offers: between them they keep
nothing. As the reference, autograd differentiates `forward` itself, any number of times. Arithmetic is at least float32
whatever the storage type and autocast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from iio_kernels.ops.spatial_mixture.common import Incoming, Operands, Options
from iio_kernels.runtime.autograd import without_autocast


def forward(
    operands: Operands, options: Options
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """log p (B, H, W), and if `everything` is asked for m, q, log p_{-k} (B, K, H, W) and (d_mu, d_l), as decoded is.

    All in the dtype of the arithmetic.
    """
    K, sigma = operands.decoded.shape[1], options.sigma
    with without_autocast(operands.decoded.device):
        difference, log_m, log_p_k = _mixture(operands, sigma)
        joint = log_m + log_p_k
        log_p = joint.logsumexp(1)
        if not options.everything:
            return log_p, None, None, None, None
        m, q, r = log_m.exp(), log_p_k.softmax(1), joint.softmax(1)
        leave_one_out = torch.stack(
            [_without(joint, k).logsumexp(1) - _without(log_m, k).logsumexp(1) for k in range(K)], 1
        )
        d_mu = -r.unsqueeze(2) * difference / sigma**2
        return log_p, m, q, leave_one_out, torch.cat([d_mu, (m - r).unsqueeze(2)], 2)


#: Which of forward's results backward reads: none.
SAVED = ()


def backward(
    incoming: Incoming, operands: Operands, sigma: float, needs_image_gradient: bool
) -> tuple[Tensor | None, Tensor]:
    """The gradients to image and to decoded, each in its input's dtype, from those to log p, g, and to m and q.

    Everything is recomputed, then

        d_log_p_k  = g r_k + q_k (d_q_k - sum_j q_j d_q_j)
        d_mu_{k,c} = d_log_p_k (x_c - mu_{k,c}) / sigma^2,    d_x_c = -sum_k d_mu_{k,c}
        d_l_k      = g (r_k - m_k) + m_k (d_m_k - sum_j m_j d_m_j)
    """
    (g, d_m, d_q), (image, decoded) = incoming, operands
    with without_autocast(decoded.device):
        difference, log_m, log_p_k = _mixture(operands, sigma)
        m = log_m.exp()
        d_log_p_k = d_l = torch.zeros_like(m)
        if g is not None:
            r = (log_m + log_p_k).softmax(1)
            d_log_p_k, d_l = g.unsqueeze(1) * r, g.unsqueeze(1) * (r - m)
        if d_m is not None:
            d_l = d_l + m * (d_m - (m * d_m).sum(1, keepdim=True))
        if d_q is not None:
            q = log_p_k.softmax(1)
            d_log_p_k = d_log_p_k + q * (d_q - (q * d_q).sum(1, keepdim=True))
        d_mu = d_log_p_k.unsqueeze(2) * difference / sigma**2
        d_image = -d_mu.sum(1).to(image.dtype) if needs_image_gradient else None
        return d_image, torch.cat([d_mu, d_l.unsqueeze(2)], 2).to(decoded.dtype)


def _mixture(operands: Operands, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """x - mu (B, K, C, H, W), log m and log p_k (B, K, H, W), in the dtype of the arithmetic."""
    image, decoded = (x.to(operands.dtype()) for x in operands)
    mu, l = decoded[:, :, :-1], decoded[:, :, -1]
    difference = image.unsqueeze(1) - mu
    log_normal = -difference.square() / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
    return difference, l.log_softmax(1), log_normal.sum(2)


def _without(x: Tensor, k: int) -> Tensor:
    """The slots (B, K, H, W) but the k-th."""
    return torch.cat([x[:, :k], x[:, k + 1 :]], 1)
