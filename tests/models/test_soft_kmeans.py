"""Soft k-means is EM: as printed, with a lower bound that never falls, and clusters that are found."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.soft_kmeans import soft_kmeans

TIGHT = dict(rtol=1e-9, atol=1e-9)


def literal_em(x, mu, iterations, variance, learn_weights):
    """An image at a time, of x (B, N, D): every Gaussian's density by itself."""
    slots, weights, attention, elbo = [], [], [], []
    for points, means in zip(x, mu, strict=True):
        pi, bounds = points.new_full((len(means),), 1 / len(means)), []
        for _ in range(iterations):
            A = (pi.log() + log_density(points, means, variance)).softmax(1)
            means = torch.stack([(a.unsqueeze(1) * points).sum(0) / a.sum() for a in A.T])
            pi = A.mean(0) if learn_weights else pi
            bounds.append((A * (pi.log() + log_density(points, means, variance) - A.log())).sum())
        for results, result in zip(
            (slots, weights, attention, elbo), (means, pi, A.T, torch.stack(bounds)), strict=True
        ):
            results.append(result)
    return tuple(map(torch.stack, (slots, weights, attention, elbo)))


def log_density(points, means, variance):
    """log N(x_n; mu_k, variance I), (N, K)."""
    return torch.stack([
        -((points - mean) ** 2).sum(1) / (2 * variance) - points.shape[1] / 2 * math.log(2 * math.pi * variance)
        for mean in means
    ], 1)  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("learn_weights", [False, True])
def test_it_is_em_as_printed(backend, learn_weights):
    x = 5 + torch.randn(2, 23, 3, dtype=torch.float64).mT.contiguous().mT
    x, mu = x.requires_grad_(), (5 + torch.randn(2, 4, 3, dtype=torch.float64)).requires_grad_()
    got = soft_kmeans(x, mu, 3, variance=0.3, learn_weights=learn_weights, backend=backend)
    expected = literal_em(x, mu, 3, 0.3, learn_weights)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), **TIGHT)
    assert not got.elbo.requires_grad
    differentiable = slice(0, 3) if learn_weights else slice(0, 3, 2)
    grads = [torch.randn_like(theirs) for theirs in expected[differentiable]]
    ours, theirs = (torch.autograd.grad(outputs[differentiable], (x, mu), grads) for outputs in (got, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.float32)])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 7)),
    variance=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    learn_weights=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_bound_never_falls(backend, dtype, sizes, variance, learn_weights, seed):
    B, N, K, D = sizes
    random = torch.Generator().manual_seed(seed)
    x, mu = (torch.randn(B, n, D, generator=random, dtype=torch.float64).to(dtype) for n in (N, K))
    fitted = soft_kmeans(x, mu, 8, variance=variance, learn_weights=learn_weights, backend=backend)
    torch.testing.assert_close(fitted.weights.sum(-1), torch.ones(B, dtype=dtype))
    # Sums of N D squares over the variance round.
    rounding = 8 * torch.finfo(dtype).eps * N * (D * (x.square().mean() / variance + 8) + math.log(K) + 1)
    assert (fitted.elbo.diff() >= -rounding).all(), fitted.elbo
    # And a bound it is.
    later = soft_kmeans(x, fitted.slots, 1, variance=variance, backend=backend)
    evidence = torch.stack([
        (log_density(points, means, variance) - math.log(K)).logsumexp(1).sum()
        for points, means in zip(x, later.slots, strict=True)
    ])  # fmt: skip
    assert (later.elbo[:, -1] <= evidence + rounding).all()


def test_separated_clusters_are_recovered():
    centers = 10 * torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]) + 100
    labels = torch.arange(3).repeat_interleave(torch.tensor([50, 100, 150]))
    x = centers[labels] + torch.randn(300, 2)
    fitted = soft_kmeans(x, x[[0, 60, 299]], 20, learn_weights=True)
    assert (fitted.attention.argmax(0) == labels).all()
    torch.testing.assert_close(fitted.slots, torch.stack([x[labels == k].mean(0) for k in range(3)]), rtol=0, atol=1e-3)
    torch.testing.assert_close(fitted.weights, torch.tensor([1 / 6, 1 / 3, 1 / 2]), rtol=0, atol=1e-3)


def test_far_components_slots_that_broadcast_and_no_inputs():
    x = torch.randn(2, 3, 20, 2)
    mu = torch.tensor([[0.0, 0.0], [1e4, 0.0]])
    fitted = soft_kmeans(x, mu, 2, variance=0.1, learn_weights=True)
    torch.testing.assert_close(fitted.slots, x.mean(-2, keepdim=True).expand(-1, -1, 2, -1))
    assert all(x.isfinite().all() for x in fitted)
    assert soft_kmeans(x[:, :, :0], mu, 2).slots.shape == (2, 3, 2, 2)
    assert soft_kmeans(x.bfloat16(), mu, 2).slots.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slots": torch.randn(3, 4)}, r"slots: expected shape \(3, 5\)"),
        ({"iterations": 0}, "iterations: expected an int >= 1"),
        ({"variance": 0.0}, "variance: expected a number > 0"),
    ],
)
def test_what_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        soft_kmeans(**{"x": torch.randn(8, 5), "slots": torch.randn(3, 5), "iterations": 2} | changes)
