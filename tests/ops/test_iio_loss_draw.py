"""The draw of subsets: the estimated IIO loss is unbiased and varies little."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from iio_kernels import iio_loss
from iio_kernels.ops.iio_loss import reference, sampling
from iio_kernels.ops.iio_loss.common import Inpainter
from iio_kernels.testing.iio_loss import Case, assert_all_close, results, run_drawn, seeded

OPERATION = "iio_loss"
CPU = torch.device("cpu")


def scene(kind: str, K: int, B: int, size: int = 7) -> tuple[Tensor, Tensor, dict[str, object]]:
    """B times the same image and masks, each of which has a draw of its own."""
    case = Case("once", B=1, C=1, K=K, H=size, W=size, options={"kernel_size": 5, "sigma": 2.0})
    (image, masks), options = case.make()
    if kind == "nearly one-hot":
        masks = (8 * torch.nn.functional.one_hot(masks.argmax(1), K).movedim(-1, 1) + masks.log()).softmax(1)
    return image.expand(B, -1, -1, -1), masks.expand(B, -1, -1, -1), options


# --- the draw ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("K", "subsets"), [(2, 2), (3, 2), (5, 12), (6, 6), (8, 240), (8, 254), (12, 2000), (24, 256), (32, 32)]
)
def test_a_design_is_of_distinct_pairs_with_the_weights_of_their_sizes(K, subsets):
    words, weights = sampling.design(K, subsets // 2)
    full = 2**K - 1
    assert len(words) == subsets // 2
    assert len({min(word, full - word) for word in words}) == len(words)
    for size in range(1, K // 2 + 1):
        own = [weight for word, weight in zip(words, weights, strict=True) if word.bit_count() == size]
        assert sum(own) == pytest.approx(math.comb(K, size) / (1 + (2 * size == K)))
        assert len(set(own)) == 1


@pytest.mark.parametrize(("K", "subsets"), [(3, 2), (4, 4), (4, 8), (5, 8), (6, 6), (6, 20)])
def test_every_subset_has_the_expected_weight_1(K, subsets):
    """Exactly: over all K! orders, each of which is equally likely."""
    words, weights = sampling.design(K, subsets // 2)
    orders = torch.tensor(list(itertools.permutations(range(K))))
    pairs = sampling.renamed(torch.tensor(words), orders)
    sets = torch.cat([pairs, 2**K - 1 - pairs], 1)
    expected = torch.zeros(2**K, dtype=torch.float64)
    expected.index_put_((sets,), torch.tensor(weights, dtype=torch.float64).repeat(2) / len(orders), accumulate=True)
    torch.testing.assert_close(expected[1:-1], torch.ones(2**K - 2, dtype=torch.float64))
    assert expected[0] == expected[-1] == 0


def test_every_order_of_the_masks_is_equally_likely():
    """The word with mask 0 in one set, 1 and 2 in another, and so on tells the order; chi-square, 23 degrees."""
    words, B = torch.tensor([1, 2, 4]), 24_000
    names = torch.empty(B, 4, dtype=torch.float64).uniform_(generator=seeded()).argsort(1)
    _, counts = sampling.renamed(words, names).unique(dim=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - B / 24) ** 2 / (B / 24)).sum() < 60
    draw = sampling.draw(B, 4, 4, CPU, seeded())
    _, counts = draw.pairs.unique(dim=0, return_counts=True)
    assert counts.max() < 1.2 * counts.min()


def test_images_have_draws_of_their_own_that_a_generator_repeats(any_device):
    device = torch.device(any_device)
    first, again = (sampling.draw(9, 20, 64, device, seeded(3, any_device)) for _ in range(2))
    assert torch.equal(first.pairs, again.pairs)
    assert first.pairs.shape == (9, 32)
    assert len(first.pairs.unique(dim=0)) == 9
    generator = seeded(3, any_device)
    assert torch.equal(sampling.draw(9, 20, 64, device, generator).pairs, first.pairs)
    assert not torch.equal(sampling.draw(9, 20, 64, device, generator).pairs, first.pairs)
    torch.manual_seed(5)
    default = sampling.draw(9, 20, 64, device)
    torch.manual_seed(5)
    assert torch.equal(sampling.draw(9, 20, 64, device).pairs, default.pairs)


# --- the estimate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["soft", "nearly one-hot"])
def test_the_mean_over_draws_is_the_loss_and_its_gradient(kind):
    """Within the standard error, each of the gradients' elements, too."""
    image, masks, options = scene(kind, K=8, B=3000)
    exact = results(iio_loss, image[:1], masks[:1], torch.ones(1, dtype=image.dtype), reduction="none", **options)
    ones = torch.ones(3000, dtype=image.dtype)
    for estimate, expected in zip(
        run_drawn(image, masks, "reference", ones, subsets=24, **options), exact, strict=True
    ):
        error = estimate.std(0, keepdim=True) / len(ones) ** 0.5
        assert (error > 0).any()
        z = (estimate.mean(0, keepdim=True) - expected) / (error + 1e-12 * expected.abs().max())
        assert z.abs().max() < 5
        assert z.square().mean() < 2.5


@pytest.mark.parametrize("kind", ["soft", "nearly one-hot"])
@pytest.mark.parametrize("subsets", [16, 32, 48])
def test_variance_is_below_half_of_that_of_plain_sampling(kind, subsets):
    """Against as many of the 62 sets, drawn uniformly and independently, whose variance can be told exactly."""
    K, B = 6, 1000
    image, masks, options = scene(kind, K, B)
    inpainter = Inpainter(repeats=2, eps=1e-8, **options)
    leaf = masks[:1].clone().requires_grad_()
    g = leaf / leaf.sum((-2, -1), keepdim=True)
    every = reference._Every(K)
    e = reference._errors(image[:1], leaf, inpainter, every)
    losses = -(every.sums_outside(g) * e).sum((2, 3))[0, 1:-1]
    gradients = torch.stack([torch.autograd.grad(loss, leaf, retain_graph=True)[0].flatten() for loss in losses])
    loss, _, dmasks = run_drawn(image, masks, "reference", torch.ones(B, dtype=image.dtype), subsets=subsets, **options)
    for one, estimates in ((losses.detach()[:, None], loss[:, None]), (gradients, dmasks.flatten(1))):
        plain = len(one) ** 2 / subsets * one.var(0, correction=0).sum()
        assert estimates.var(0).sum() < 0.5 * plain


@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("more", [0, 1, 1000])
def test_all_subsets_are_the_exact_loss(K, more, backend, device):
    (image, masks), _ = Case("all", K=K).make(device=device)
    expected = results(iio_loss, image, masks, reduction="none", backend=backend)
    assert_all_close(run_drawn(image, masks, backend, subsets=2**K - 2 + more), expected)


@pytest.mark.long("triton")
def test_terms_and_reductions(backend, device):
    (image, masks), _ = Case("reduced", B=3, K=20).make(device=device)

    def loss(**options):
        return iio_loss(image, masks, subsets=24, generator=seeded(0, device), backend=backend, **options)

    losses = loss(reduction="none")
    assert losses.shape == (3,)
    torch.testing.assert_close(loss(), losses.mean())
    torch.testing.assert_close(loss(reduction="sum"), losses.sum())
    torch.testing.assert_close(loss(terms="mean"), losses.mean() / (2**19 - 1))
    assert -20 <= loss(terms="mean") <= 0
