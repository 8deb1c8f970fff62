"""What the IIO loss is made of, entropies, interaction information and inpainting, against the literal formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from iio_kernels import conditional_entropies, iio_loss, inpaint, interaction_information
from iio_kernels.testing.iio_loss import (
    CASES,
    Case,
    literal_conditional_entropy,
    literal_inpaint,
    others_subsets,
)

OPERATION = "iio_loss"
# The literal formula takes K 2^(K-1) pairs of blurs: up to six masks it is quick.
LITERAL = [case for case in CASES if case.K <= 6]
named = {"ids": lambda case: case.name}
NAN = float("nan")


def entropies_by_subset(image, masks, **inpainter) -> Tensor:
    """The literal (B, K, 2^(K-1) - 1), each subset found by writing its position in binary."""
    K = masks.shape[1]
    rows = []
    for m in range(K):
        others = [i for i in range(K) if i != m]
        for j in range(1, 2 ** (K - 1)):
            subset = [i for bit, i in enumerate(others) if j >> bit & 1]
            given = masks[:, subset].sum(1)
            rows.append(literal_conditional_entropy(image, masks[:, m], given, **inpainter))
    return torch.stack(rows, 1).unflatten(1, (K, -1))


@pytest.mark.parametrize("case", [case for case in LITERAL if case.K < 6], **named)
def test_conditional_entropies_in_their_order(case, backend, device):
    (image, masks), options = case.make(device=device)
    H = conditional_entropies(image, masks, backend=backend, **options)
    assert H.shape == (case.B, case.K, 2 ** (case.K - 1) - 1)
    torch.testing.assert_close(H, entropies_by_subset(image, masks, **options), rtol=1e-10, atol=1e-14)
    assert (H >= 0).all()
    assert (H <= 1 + 1e-12).all()


def test_conditional_entropies_of_the_documented_example(backend, device):
    (image, masks), _ = Case("example", K=4).make(device=device)
    H = conditional_entropies(image, masks, backend=backend)
    sets = [(0,), (2,), (0, 2), (3,), (0, 3), (2, 3), (0, 2, 3)]
    for j, members in enumerate(sets):
        expected = literal_conditional_entropy(image, masks[:, 1], sum(masks[:, i] for i in members))
        torch.testing.assert_close(H[:, 1, j], expected, rtol=1e-10, atol=0)


def test_loss_is_minus_the_sum_of_conditional_entropies(backend, device):
    (image, masks), _ = Case("sum", B=3).make(device=device)
    H = conditional_entropies(image, masks, backend=backend)
    torch.testing.assert_close(iio_loss(image, masks, backend=backend), -H.sum((1, 2)).mean())


@pytest.mark.parametrize("K", [2, 3, 4, 5])
def test_interaction_information_is_the_signed_sum(K, backend, device):
    (image, masks), _ = Case("signed", K=K).make(device=device)
    expected = torch.ones(2, K, dtype=image.dtype, device=device)
    for m in range(K):
        for subset in others_subsets(K, m):
            given = masks[:, list(subset)].sum(1)
            entropy = literal_conditional_entropy(image, masks[:, m], given)
            expected[:, m] += (-1) ** len(subset) * entropy
    torch.testing.assert_close(interaction_information(image, masks, backend=backend), expected)


def test_interaction_information_of_two_masks_is_mutual_information(backend, device):
    (image, masks), _ = Case("mutual", K=2).make(device=device)
    H = conditional_entropies(image, masks, backend=backend)
    torch.testing.assert_close(interaction_information(image, masks, backend=backend), 1 - H[..., 0])


def test_maximal_entropies(backend, device):
    """A black and a white half predict each other all wrong: every entropy is 1, the information 0."""
    image = torch.zeros(1, 3, 12, 12, dtype=torch.float64, device=device)
    image[..., 6:] = 1
    masks = torch.cat([1 - image[:, :1], image[:, :1]], 1)
    torch.testing.assert_close(conditional_entropies(image, masks, backend=backend), masks.new_ones(1, 2, 1))
    torch.testing.assert_close(iio_loss(image, masks, backend=backend), masks.new_tensor(-2.0))
    torch.testing.assert_close(
        interaction_information(image, masks, backend=backend), masks.new_zeros(1, 2), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("K", [3, 4, 6])
def test_signs_cancel_where_all_entropies_are_maximal(K, backend, device):
    """The first mask takes all white pixels, the others share the black: given these, white is missed."""
    (_, masks), _ = Case("cancel", K=K).make(device=device)
    image = (torch.rand(2, 1, 13, 12, device=device) < 0.5).double()
    masks = torch.cat([image, (1 - image) * masks[:, 1:] / masks[:, 1:].sum(1, keepdim=True)], 1)
    assert torch.allclose(conditional_entropies(image, masks, backend=backend)[:, 0], masks.new_ones(()))
    information = interaction_information(image, masks, backend=backend)
    torch.testing.assert_close(information[:, 0], masks.new_zeros(2), rtol=0, atol=1e-12)


def test_interaction_information_of_an_empty_mask_is_zero(backend, device):
    (image, masks), _ = Case("empty", K=4, masks="empty").make(device=device)
    information = interaction_information(image, masks, backend=backend)
    assert (information[:, 2:] == 0).all()
    assert (information[:, :2] != 0).all()


@pytest.mark.parametrize("case", LITERAL, **named)
def test_inpaint_equals_the_literal_formula(case, backend, device):
    (image, masks), options = case.make(device=device)
    got = inpaint(image, masks, backend=backend, **options)
    assert got.shape == (case.B, case.K, case.C, case.H, case.W)
    for i in range(case.K):
        expected = literal_inpaint(image, masks[:, i], **options)
        torch.testing.assert_close(got[:, i], expected, rtol=1e-10, atol=1e-14)


def test_inpaint_gradients(backend, device, interpreted):
    (image, masks), _ = Case("inpaint", B=1, C=2, K=2, H=5, W=4).make(device=device)
    leaves = image.requires_grad_(), masks.requires_grad_()
    options = {"sigma": 1.0, "kernel_size": 3, "backend": backend}
    assert torch.autograd.gradcheck(lambda x, m: inpaint(x, m, **options), leaves, fast_mode=interpreted)


def test_inpaint_predicts_convex_combinations(backend, device):
    (image, masks), _ = Case("convex", masks="one-hot").make(device=device)
    inside = torch.where(masks.unsqueeze(2) == 1, image.unsqueeze(1), NAN).flatten(3)
    psi = inpaint(image, masks, backend=backend).flatten(3)
    low, high = inside.nan_to_num(2).amin(-1, keepdim=True), inside.nan_to_num(-1).amax(-1, keepdim=True)
    assert (psi >= low - 1e-12).all()
    assert (psi <= high + 1e-12).all()


def test_far_from_the_mask_inpaint_predicts_its_mean_color(backend, device):
    image = torch.rand(1, 3, 11, 60, dtype=torch.float64, device=device)
    mask = torch.zeros(1, 1, 11, 60, dtype=torch.float64, device=device)
    mask[..., :4] = 1
    psi = inpaint(image, mask, backend=backend)
    mean = image[..., :4].mean((2, 3))
    torch.testing.assert_close(psi[0, 0, :, :, -1], mean[0, :, None].expand(3, 11))
    assert (inpaint(image, mask, eps=0, backend=backend)[..., -1] == 0).all()


@pytest.mark.parametrize("function", [iio_loss, conditional_entropies, interaction_information, inpaint])
def test_options_default_to_the_documented_ones(function, backend, device):
    (image, masks), _ = Case("defaults").make(device=device)
    explicit = function(image, masks, sigma=5.0, kernel_size=11, repeats=2, eps=1e-8, backend=backend)
    assert torch.equal(function(image, masks, backend=backend), explicit)
    for changed in ({"sigma": 3.0}, {"kernel_size": 7}, {"repeats": 1}, {"eps": 1e-2}):
        assert not torch.allclose(function(image, masks, backend=backend, **changed), explicit)
