"""Soft k-means, which is Slot Attention without anything learnt: EM on a mixture of Gaussians.

With identity maps in place of queries, keys, values, GRU and MLP, and Euclidean scores in place of products, an
iteration of Slot Attention is one of expectation maximisation on

    p(x) = sum_k pi_k N(x; mu_k, variance I)

whose means mu are the slots: the softmax over slots is the posterior of the mixture's components, and the weighted mean
over inputs the maximum of the likelihood that is expected under it (Locatello et al. 2020, "Object-Centric Learning
with Slot Attention"; as nested optimisation: Chang et al. 2022, "Object Representations as Fixed Points").
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from iio_kernels import slot_attention
from iio_kernels.runtime import checks
from iio_kernels.runtime.autograd import without_autocast
from iio_kernels.runtime.numerics import arithmetic_dtype


class Mixture(NamedTuple):
    """What `soft_kmeans` finds, in the dtype of the arithmetic."""

    slots: Tensor
    """(..., K, D): the means mu after the last iteration."""
    weights: Tensor
    """(..., K): the mixing weights pi; they sum to 1."""
    attention: Tensor
    """(..., K, N): the posterior, over K, that the last iteration took its means by."""
    elbo: Tensor
    """(..., T): the evidence lower bound of all inputs, in nats, after each iteration. It never falls, rounding aside,
    and has no gradient."""


def soft_kmeans(
    x: Tensor,
    slots: Tensor,
    iterations: int,
    *,
    variance: float = 1.0,
    learn_weights: bool = False,
    backend: str = "auto",
) -> Mixture:
    """Fit a mixture of isotropic Gaussians to the inputs of each batch entry by EM.

        A[k, n] = softmax over k of  log pi_k - |x_n - mu_k|^2 / (2 variance)
        mu_k    = sum_n A[k, n] x_n / sum_n A[k, n]
        pi_k    = sum_n A[k, n] / N                                            with learn_weights, otherwise 1 / K
        elbo    = sum_nk A[k, n] (log pi_k + log N(x_n; mu_k, variance I) - log A[k, n])

    Scores are products again: of -|x - mu|^2 / 2 = x . mu - |mu|^2 / 2 - |x|^2 / 2 the last term is common to all slots
    and leaves the softmax unchanged, and the one before it is the product of one more feature, 1 in the keys.

    Args:
        x: inputs, `(..., N, D)`, floating point. Any strides.
        slots: initial means, `(..., K, D)`; leading dimensions broadcast to x's.
        iterations: T >= 1.
        variance: of each component in each dimension, > 0. Towards 0 this is k-means.
        learn_weights: whether the mixing weights are fitted, too.
        backend: of `slot_attention`.

    Returns:
        A `Mixture`, in at least float32. Slots, weights and attention are differentiable in x and the initial slots,
        once, through all iterations.

    A component that no input has any part in comes to lie at the mean of the inputs.

    Raises:
        TypeError: x or slots is not a floating-point tensor, or an option has the wrong type.
        ValueError: shapes, devices or options do not fit.
        RuntimeError: the backend asked for by name cannot be used on this machine.

    Complexity: O(B T N K D) operations.

    Example:
        >>> x = torch.randn(8, 100, 2)
        >>> soft_kmeans(x, x[:, :3], 10).slots.shape
        torch.Size([8, 3, 2])
    """
    checks.tensor("x", x, "(..., N, D)", min_dims=2)
    checks.tensor("slots", slots, "(..., K, D)", min_dims=2)
    (*batch, N, D), K = x.shape, slots.shape[-2]
    checks.broadcasts("slots", slots, batch, (K, D), f"x {tuple(x.shape)}")
    device = checks.same_device(x=x, slots=slots)
    checks.integer("iterations", iterations, at_least=1)
    variance = checks.number("variance", variance, above=0)
    checks.flag("learn_weights", learn_weights)

    with without_autocast(device):
        dtype = arithmetic_dtype(x, slots)
        # Distances do not depend on the origin, but their rounding does.
        center = x.to(dtype).mean(-2, keepdim=True) if N else x.new_zeros(*batch, 1, D, dtype=dtype)
        x = x.to(dtype) - center
        mu = slots.to(dtype) - center
        log_weights = mu.new_full(mu.shape[:-1], -math.log(K))
        k = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        elbo = []
        for _ in range(iterations):
            last = variance * log_weights.unsqueeze(-1) - mu.square().sum(-1, keepdim=True) / 2
            mu, A = slot_attention(
                torch.cat([mu, last], -1), k, x, scale=1 / variance, eps=0.0, return_attention=True, backend=backend
            )
            if learn_weights:
                log_weights = A.mean(-1).clamp(min=torch.finfo(dtype).tiny).log()
            elbo.append(_elbo(x, mu, log_weights, A, variance))
        return Mixture(mu + center, log_weights.exp(), A, torch.stack(elbo, -1))


@torch.no_grad()
def _elbo(x: Tensor, mu: Tensor, log_weights: Tensor, A: Tensor, variance: float) -> Tensor:
    """The evidence lower bound (...) where mu are the means under A."""
    N, D = x.shape[-2:]
    S = A.sum(-1)
    # sum_nk A |x - mu|^2, the means being those of x under A.
    squares = x.square().sum((-2, -1)) - (S * mu.square().sum(-1)).sum(-1)
    entropy = torch.special.entr(A).sum((-2, -1))
    return (S * log_weights).sum(-1) - squares / (2 * variance) - N * D / 2 * math.log(2 * math.pi * variance) + entropy
