"""The scores agree with scikit-learn, with worked examples, and with themselves under relabelling."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from data.metrics import (
    METRICS,
    adjusted_rand_index,
    average_precision,
    mean_best_overlap,
    mean_iou,
    mean_squared_error,
)

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
SEGMENTATION_SCORES = [adjusted_rand_index, mean_iou, mean_best_overlap]


def close(got, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-12, atol=1e-12, equal_nan=True)


# Adjusted Rand index


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pixels", [1, 2, 3, 10, 100])
def test_ari_is_scikit_learns(pixels, device):
    rng = np.random.default_rng(pixels)
    for groups, pred_groups in itertools.product((1, 2, 4, 9), repeat=2):
        true, pred = rng.integers(0, groups, (60, pixels)), rng.integers(0, pred_groups, (60, pixels))
        pred[::3] = np.where(rng.random((20, pixels)) < 0.9, true[::3], pred[::3])  # close to the truth
        got = adjusted_rand_index(torch.tensor(true, device=device), torch.tensor(pred, device=device))
        close(got, [adjusted_rand_score(*scene) for scene in zip(true, pred, strict=True)])
        objects = adjusted_rand_index(torch.tensor(true), torch.tensor(pred), ignore_background=True)
        close(objects, [adjusted_rand_score(t[t > 0], p[t > 0]) for t, p in zip(true, pred, strict=True)])


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 12).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 5), min_size=n, max_size=n)] * 2)))
def test_ari_is_scikit_learns_on_anything_small(labels):
    true, pred = labels
    close(adjusted_rand_index(torch.tensor([true]), torch.tensor([pred])), [adjusted_rand_score(true, pred)])


@pytest.mark.parametrize(
    ("true", "pred", "expected"),
    [
        ([0, 0, 0, 0], [2, 2, 2, 2], 1),  # one cluster in both
        ([0, 1, 2, 3], [3, 1, 0, 2], 1),  # every pixel its own in both
        ([0, 0, 0, 0], [0, 1, 2, 3], 0),
        ([0, 1, 2, 3], [0, 0, 0, 0], 0),
        ([0, 0, 1, 1], [0, 1, 0, 1], -0.5),
        ([0], [0], 1),
    ],
)
def test_ari_of_degenerate_cases(true, pred, expected):
    assert adjusted_rand_score(true, pred) == expected
    close(adjusted_rand_index(torch.tensor([true]), torch.tensor([pred])), [expected])


def test_ari_without_pixels_is_one():
    assert adjusted_rand_score([], []) == 1
    close(adjusted_rand_index(torch.zeros(2, 0).long(), torch.zeros(2, 0).long()), [1, 1])
    background = torch.zeros(1, 5, 5, dtype=torch.uint8)
    pred = torch.arange(25).view(1, 5, 5)
    close(adjusted_rand_index(background, pred, ignore_background=True), [1])


def test_ari_of_large_images():
    """240 x 320 pixels: products of pair counts exceed 64 bits."""
    rng = np.random.default_rng(0)
    true, pred = rng.integers(0, 11, (2, 240, 320)), rng.integers(0, 7, (2, 240, 320))
    pred[1] = np.where(rng.random((240, 320)) < 0.99, true[1] % 7, pred[1])
    got = adjusted_rand_index(torch.tensor(true, dtype=torch.uint8), torch.tensor(pred, dtype=torch.uint8))
    close(got, [adjusted_rand_score(t.ravel(), p.ravel()) for t, p in zip(true, pred, strict=True)])


# Mean IoU and mean best overlap, worked by hand
#
#   true  0 0 0 0 1 1 1 2      IoU   pred 0  pred 1  pred 2
#   pred  0 0 1 1 1 1 2 2      true 0   2/4     2/6     0
#                              true 1    0      2/5    1/4
#                              true 2    0       0     1/2

TRUE = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2]])
PRED = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2]])


@pytest.mark.parametrize("score", [mean_iou, mean_best_overlap])
def test_overlaps_by_hand(score):
    close(score(TRUE, PRED), [(2 / 4 + 2 / 5 + 1 / 2) / 3])
    close(score(TRUE, PRED, ignore_background=True), [(2 / 5 + 1 / 2) / 2])


def test_one_prediction_serves_one_entity_or_several():
    #   true 0 0 1 1 2 2, pred all 0: IoU 1/3 each, but only one can be matched
    true, pred = torch.tensor([[0, 0, 1, 1, 2, 2]]), torch.zeros(1, 6).long()
    close(mean_iou(true, pred), [1 / 9])
    close(mean_best_overlap(true, pred), [1 / 3])
    close(mean_iou(true, pred, ignore_background=True), [1 / 6])
    close(mean_best_overlap(true, pred, ignore_background=True), [1 / 3])


def test_matching_takes_the_best_sum_not_the_best_first():
    #   IoU: true 0 with pred 0 3/7, with pred 1 2/5; true 1 with pred 0 2/5, with pred 1 0.
    #   The largest, 3/7, would leave 0 for true 1.
    true = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 2, 2]])
    pred = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 2, 2]])
    close(mean_iou(true, pred), [(2 / 5 + 2 / 5 + 1) / 3])


def test_matching_is_the_best_of_all():
    rng = np.random.default_rng(1)
    true, pred = rng.integers(0, 3, (50, 12)), rng.integers(0, 4, (50, 12))
    expected = []
    for t, p in zip(true, pred, strict=True):
        iou = [
            [(((t == i) & (p == j)).sum()) / max(((t == i) | (p == j)).sum(), 1) for j in range(4)] for i in range(3)
        ]
        best = max(sum(iou[i][j] for i, j in enumerate(order)) for order in itertools.permutations(range(4), 3))
        expected.append(best / len(set(t)))
    close(mean_iou(torch.tensor(true), torch.tensor(pred)), expected)


@pytest.mark.parametrize("score", [mean_iou, mean_best_overlap])
def test_entities_without_pixels_do_not_count(score):
    close(score(TRUE, PRED, num_true=9, num_pred=5), score(TRUE, PRED))
    labels = torch.tensor([[0, 0, 4, 4]])
    close(score(labels, labels, num_true=6), [1])
    close(score(labels, labels, ignore_background=True), [1])


@pytest.mark.parametrize("score", [mean_iou, mean_best_overlap])
def test_overlaps_without_objects(score):
    labels = torch.zeros(2, 7).long()
    labels[1, 0] = 1
    close(score(labels, labels, ignore_background=True), [math.nan, 1])
    close(score(labels[:1], labels[:1], ignore_background=True), [math.nan])


# All segmentation scores


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ignore_background", [False, True])
@pytest.mark.parametrize("score", SEGMENTATION_SCORES)
def test_common_properties(score, ignore_background, device):
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(0, 4, (40, 9, 11), generator=generator, dtype=torch.uint8).to(device)
    pred = torch.randint(0, 6, (40, 9, 11), generator=generator).to(device)
    options = {"ignore_background": ignore_background}
    got = score(true, pred, **options)
    assert (got.shape, got.dtype, got.device) == ((40,), torch.float64, true.device)
    # the truth itself scores 1
    close(score(true, true, **options), torch.ones(40))
    # the names of the predictions do not matter, nor flattening, given numbers, or the other scenes
    names = torch.randperm(6, generator=generator).to(device)
    close(got, score(true, names[pred], **options).cpu())
    close(got, score(true.flatten(1), pred.flatten(1).int(), **options).cpu())
    close(got, score(true, pred, num_true=5, num_pred=8, **options).cpu())
    close(got[7:8], score(true[7:8], pred[7:8], **options).cpu())
    assert torch.equal(got, score(true, pred, **options))
    assert score(true[:0], pred[:0], **options).shape == (0,)


@pytest.mark.parametrize("score", SEGMENTATION_SCORES)
def test_labels_out_of_range_score_nan(score):
    true = torch.tensor([[0, 1, 2], [0, 1, 1], [0, 1, -1]])
    pred = torch.tensor([[0, 1, 0], [0, 1, 1], [0, 1, 1]])
    close(score(true, pred, num_true=2, num_pred=2), [math.nan, 1, math.nan])
    close(score(pred, true, num_true=2, num_pred=2), [math.nan, 1, math.nan])
    close(score(-torch.ones(1, 3, dtype=torch.long), pred[:1]), [math.nan])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ignore_background", [False, True])
@pytest.mark.parametrize("numbers", [{}, {"num_true": 2**24, "num_pred": 2**63}], ids=["looked for", "given"])
@pytest.mark.parametrize("score", SEGMENTATION_SCORES)
def test_labels_need_not_be_consecutive(score, numbers, ignore_background, device):
    """As ids packed from the colors of a picture, or hashes: a table of all up to the largest has terabytes."""
    rng = np.random.default_rng(0)
    true, pred = torch.tensor(rng.integers(0, 6, (30, 40))), torch.tensor(rng.integers(0, 9, (30, 40)))
    true[:10] += 1  # scenes without a background
    true, pred = true.to(device), pred.to(device)
    ids = torch.tensor([0, *rng.choice(np.arange(1, 2**24), 6, replace=False)], device=device)
    hashes = torch.tensor(rng.choice(2**62, 9), device=device)
    hashes[4] = 2**63 - 1
    expected = score(true, pred, ignore_background=ignore_background)
    close(score(ids[true], hashes[pred], ignore_background=ignore_background, **numbers), expected.cpu())
    outside = hashes.clone()
    outside[0] = -1
    got = score(ids[true], outside[pred], ignore_background=ignore_background, **numbers)
    assert got.isnan().tolist() == (pred == 0).any(1).tolist()
    if numbers:
        assert score(ids[true] + 2**24, hashes[pred], **numbers).isnan().all()


@pytest.mark.parametrize("score", SEGMENTATION_SCORES)
@pytest.mark.parametrize(
    ("true", "pred", "options", "error", "message"),
    [
        (TRUE.numpy(), PRED, {}, TypeError, "true_labels: expected a tensor, got ndarray"),
        (TRUE, PRED.tolist(), {}, TypeError, "pred_labels: expected a tensor, got list"),
        (TRUE, PRED, {"num_true": 3.0}, TypeError, "num_true: expected an integer, got 3.0"),
        (TRUE, PRED, {"num_pred": "3"}, TypeError, "num_pred: expected an integer, got '3'"),
        (torch.zeros(2, 3), TRUE, {}, TypeError, "true_labels: expected integers, got torch.float32"),
        (TRUE, TRUE > 0, {}, TypeError, "pred_labels: expected integers, got torch.bool"),
        (TRUE, TRUE[:, :3], {}, ValueError, r"expected one shape .*, got \(1, 8\) and \(1, 3\)"),
        (TRUE[0], TRUE[0], {}, ValueError, r"expected one shape .*, got \(8,\) and \(8,\)"),
        (TRUE, PRED, {"num_true": 0}, ValueError, "num_true: expected 1 or more, got 0"),
        (TRUE, PRED.to("meta"), {}, ValueError, "on cpu and on meta"),
    ],
)
def test_bad_labels(score, true, pred, options, error, message):
    with pytest.raises(error, match=message):
        score(true, pred, **options)


# Mean squared error


@pytest.mark.parametrize(
    ("dtype", "result"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_mean_squared_error(dtype, result):
    image = torch.arange(2 * 3 * 4 * 5, dtype=dtype).view(2, 3, 4, 5) % 8 / 8
    got = mean_squared_error(image + torch.tensor([0.5, 2], dtype=dtype).view(2, 1, 1, 1), image)
    assert got.dtype == result
    assert got.tolist() == [0.25, 4]


def test_mean_squared_error_of_bad_input():
    image = torch.zeros(1, 3, 4, 4)
    with pytest.raises(TypeError, match=r"image: expected a floating point tensor, got torch.uint8"):
        mean_squared_error(image, image.byte())
    with pytest.raises(TypeError, match=r"image: expected a tensor, got ndarray"):
        mean_squared_error(image, image.numpy())
    with pytest.raises(ValueError, match=r"expected one shape .*, got \(1, 3, 4, 4\) and \(3, 4, 4\)"):
        mean_squared_error(image, image[0])


def test_average_precision_of_bad_input():
    objects = torch.zeros(2, 5, 19)
    with pytest.raises(TypeError, match=r"objects: expected a tensor, got ndarray"):
        average_precision(objects, objects.numpy())
    with pytest.raises(ValueError, match=r"predicted and objects: expected as many scenes, got 2 and 1"):
        average_precision(objects, objects[:1])
    with pytest.raises(ValueError, match=r"predicted: expected shape \(B, K, 19\), got \(2, 5, 18\)"):
        average_precision(objects[..., 1:], objects)


@pytest.mark.parametrize("name", METRICS)
def test_the_table_tells_how_scores_are_computed(name):
    metric = METRICS[name]
    assert metric.name == name
    labels, image = torch.arange(3).repeat(2, 4), torch.rand(2, 3, 4, 4)
    objects = torch.zeros(2, 3, 19)
    objects[..., [3, 5, 7, 10, 18]] = 1
    objects[..., 0] = torch.arange(3) / 3  # apart from each other
    perfect = {"labels": (labels, labels), "images": (image, image), "objects": (objects, objects)}[metric.compares]
    wrong = {"labels": (labels, labels * 0), "images": (image, 1 - image), "objects": (-objects, objects)}[
        metric.compares
    ]
    best, worse = (torch.as_tensor(metric.function(*given)).double().mean().item() for given in (perfect, wrong))
    assert best == (1 if metric.higher_is_better else 0)
    assert (best > worse) == metric.higher_is_better
