"""How well a predicted segmentation or reconstruction agrees with the truth, scene by scene.

Segmentations are integer labels, one a pixel; a label's value means nothing beyond "the same
entity", except that true label 0 is the background. They need not be consecutive: ids of 24 bits are numbered anew.
All functions are pure, work on the device of their inputs in float64 and are deterministic. Counting costs O(pixels) a
scene, and with many entities the table of all pairs of a true and a predicted one.
"""

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from data.properties import NUM_PROPERTIES, kinds

__all__ = [
    "METRICS",
    "Metric",
    "adjusted_rand_index",
    "average_precision",
    "mean_best_overlap",
    "mean_iou",
    "mean_squared_error",
]

MANY = 256  # labels from here on are numbered anew, unless their number is given


def adjusted_rand_index(
    true_labels: Tensor,
    pred_labels: Tensor,
    *,
    num_true: int | None = None,
    num_pred: int | None = None,
    ignore_background: bool = False,
) -> Tensor:
    """Adjusted Rand index: 1 for the same partition of the pixels, 0 on average for a random one.

    Hubert and Arabie, "Comparing partitions" (1985), with the value of
    `sklearn.metrics.adjusted_rand_score` in every degenerate case: two partitions that agree on all
    pairs of pixels score 1, even of one cluster, of one pixel or of none. With `ignore_background`
    this is the FG-ARI of Multi-Object Datasets: pixels of true label 0 are left out.

    Args:
        true_labels: integers (B, H, W) or (B, N).
        pred_labels: integers of the same shape.
        num_true: labels run from 0 to `num_true - 1`. None looks at the labels, for
            which the host waits for the device; given, nothing waits. A scene with a label outside
            the range scores NaN, and without a range one with a negative label.
        num_pred: the same for `pred_labels`.
        ignore_background: leave out the pixels whose true label is 0.

    Returns:
        float64 (B,), at most 1.

    Raises:
        TypeError: the labels are no tensors of integers, or a number is no integer.
        ValueError: they differ in shape or device, or a number is below 1.
    """
    counts = _contingency(true_labels, pred_labels, num_true, num_pred)
    if ignore_background:
        counts = counts[:, 1:]
    # Ordered pairs of distinct pixels: together in both, in the truth, in the prediction, and all.
    both = (counts * (counts - 1)).sum((1, 2))
    true, pred, total = (n * (n - 1) for n in (counts.sum(2), counts.sum(1), counts.sum((1, 2))))
    true, pred = true.sum(1), pred.sum(1)
    only_true, only_pred = true - both, pred - both
    neither = total - true - only_pred
    numerator = 2 * (both * neither - only_true * only_pred)
    denominator = true * (only_true + neither) + pred * (only_pred + neither)
    agree = (only_true == 0) & (only_pred == 0)
    return torch.where(agree, 1.0, numerator / denominator)


def mean_iou(
    true_labels: Tensor,
    pred_labels: Tensor,
    *,
    num_true: int | None = None,
    num_pred: int | None = None,
    ignore_background: bool = False,
) -> Tensor:
    """Mean over the true entities of the IoU with their matched prediction.

    True and predicted entities are matched one to one so that the sum of the IoUs (intersection
    over union, in pixels) is largest. An entity left without a match counts 0; one without pixels
    does not count. The matching runs on the host: O(entities^3) a scene.

    Args:
        true_labels, pred_labels, num_true, num_pred: as for `adjusted_rand_index`.
        ignore_background: match and average the objects alone, not true label 0. The predicted
            masks keep their pixels on the background: those lower the IoU.

    Returns:
        float64 (B,) in 0..1, on the device of the labels; NaN for a scene without true entities.

    Raises:
        TypeError, ValueError: as for `adjusted_rand_index`.
    """
    overlap, count = _overlaps(true_labels, pred_labels, num_true, num_pred, ignore_background)
    matched = []
    for scene in overlap.cpu().numpy():
        if np.isnan(scene).any():  # labels out of range: no matching
            matched.append(np.nan)
        else:  # an entity without pixels overlaps nothing and takes no match that is worth anything
            matched.append(scene[linear_sum_assignment(scene, maximize=True)].sum())
    return torch.tensor(matched, dtype=torch.float64, device=count.device) / count


def mean_best_overlap(
    true_labels: Tensor,
    pred_labels: Tensor,
    *,
    num_true: int | None = None,
    num_pred: int | None = None,
    ignore_background: bool = False,
) -> Tensor:
    """Mean over the true entities of their largest IoU with any prediction (mBO).

    Pont-Tuset et al., "Multiscale combinatorial grouping" (2017). Unlike `mean_iou`, one prediction
    may serve several entities. Arguments, result and errors are those of `mean_iou`; nothing waits
    for the device when `num_true` and `num_pred` are given.
    """
    overlap, count = _overlaps(true_labels, pred_labels, num_true, num_pred, ignore_background)
    return overlap.amax(2).sum(1) / count


def mean_squared_error(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Mean over channels and pixels of the squared difference.

    Args:
        reconstruction: floating point (B, C, H, W).
        image: floating point of the same shape, on the same scale.

    Returns:
        (B,), float64 for float64 inputs and float32 for all others.

    Raises:
        TypeError, ValueError: an argument is no tensor or not floating point, or the shapes differ.
    """
    _check_tensors(reconstruction=reconstruction, image=image)
    for argument, tensor in (("reconstruction", reconstruction), ("image", image)):
        if not tensor.is_floating_point():
            raise TypeError(f"{argument}: expected a floating point tensor, got {tensor.dtype}")
    if reconstruction.ndim != 4 or reconstruction.shape != image.shape:
        shapes = f"{tuple(reconstruction.shape)} and {tuple(image.shape)}"
        raise ValueError(f"reconstruction and image: expected one shape (B, C, H, W), got {shapes}")
    dtype = torch.promote_types(torch.promote_types(reconstruction.dtype, image.dtype), torch.float32)
    return (reconstruction.to(dtype) - image.to(dtype)).square().mean((1, 2, 3))


def _contingency(true: Tensor, pred: Tensor, num_true: int | None, num_pred: int | None) -> Tensor:
    """Count pixels by true and by predicted label: float64 (B, num_true, num_pred), NaN for a bad scene."""
    _check_tensors(true_labels=true, pred_labels=pred)
    for argument, labels in (("true_labels", true), ("pred_labels", pred)):
        if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"{argument}: expected integers, got {labels.dtype}")
    if true.ndim < 2 or true.shape != pred.shape:
        shapes = f"{tuple(true.shape)} and {tuple(pred.shape)}"
        raise ValueError(f"true_labels and pred_labels: expected one shape (B, H, W) or (B, N), got {shapes}")
    if true.device != pred.device:
        raise ValueError(f"true_labels and pred_labels: on {true.device} and on {pred.device}")
    true, num_true, true_valid = _consecutive("num_true", num_true, true.flatten(1).long())
    pred, num_pred, pred_valid = _consecutive("num_pred", num_pred, pred.flatten(1).long())

    valid = true_valid & pred_valid
    cells = torch.where(valid, true * num_pred + pred, 0)
    # Counted in integers, whose sum does not depend on the order in which a GPU adds them.
    counts = torch.zeros(len(true), num_true * num_pred, dtype=torch.int64, device=true.device)
    counts.scatter_add_(1, cells, torch.ones_like(cells))
    return torch.where(valid, counts.double(), torch.nan).unflatten(1, (num_true, num_pred))


def _consecutive(argument: str, number: int | None, labels: Tensor) -> tuple[Tensor, int, Tensor]:
    """Number labels so that their table is no larger than it must be, and find the scenes with none out of range.

    Args:
        argument: the name of `number`.
        number: the range that the user gave, or None.
        labels: int64.

    Returns:
        The same labels, or others of which each stands for one of theirs and 0 for 0; the end of their range; bool
        (B, 1), whether all of a scene's labels are in the range that was given.
    """
    if number is not None:
        number = _integer(argument, number)
        if number < 1:
            raise ValueError(f"{argument}: expected 1 or more, got {number}")
    valid = labels >= 0 if number is None else (labels >= 0) & (labels <= min(number, 2**63) - 1)
    valid = valid.all(1, keepdim=True)
    if number is None:
        largest = int(labels.amax()) if labels.numel() else 0
        if largest < MANY:
            return labels, max(largest, 0) + 1, valid
        labels = _ranks(labels)
        return labels, int(labels.amax()) + 1, valid
    # A scene has no more labels than pixels, one of which is 0 without a pixel.
    if number > (most := labels.shape[1] + 1):
        return _ranks(labels), most, valid
    return labels, number, valid


def _ranks(labels: Tensor) -> Tensor:
    """Rank each label among those of its scene, (B, N), with 0 for label 0, whether or not it is among them."""
    ordered, order = labels.sort(1)
    rises = torch.cat([ordered[:, :1] != 0, ordered[:, 1:] != ordered[:, :-1]], 1)
    return torch.empty_like(labels).scatter_(1, order, rises.cumsum(1))


def _integer(argument: str, number: int) -> int:
    try:
        return operator.index(number)
    except TypeError:
        raise TypeError(f"{argument}: expected an integer, got {number!r}") from None


def _check_tensors(**arguments: Tensor) -> None:
    for argument, tensor in arguments.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{argument}: expected a tensor, got {type(tensor).__name__}")


def _overlaps(
    true: Tensor, pred: Tensor, num_true: int | None, num_pred: int | None, ignore_background: bool
) -> tuple[Tensor, Tensor]:
    """Compute the IoU of every true with every predicted entity (B, R, C), and how many true ones have pixels (B,)."""
    counts = _contingency(true, pred, num_true, num_pred)
    area, pred_area = counts.sum(2, keepdim=True), counts.sum(1, keepdim=True)
    overlap = counts / (area + pred_area - counts).clamp(min=1)  # 0 where neither has a pixel
    if ignore_background:
        overlap, area = overlap[:, 1:], area[:, 1:]
    return overlap, (area.squeeze(2) > 0).sum(1)


def average_precision(predicted: Tensor, objects: Tensor, distance: float = math.inf) -> float:
    """Average precision of predicted objects, over all scenes together.

    Predictions are taken in the order of their confidence, the last property, whatever their scene. Each stands for the
    nearest object of its scene with the same size, material, shape and color; it is right if that lies less than
    `distance` away, on CLEVR's scale of 6 from end to end, and was not found before. The precision at a recall is the
    highest at that recall or a higher one.

    Locatello et al., "Object-Centric Learning with Slot Attention" (2020), and its published code; after Everingham et
    al., "The Pascal Visual Object Classes challenge: a retrospective" (2015).

    Args:
        predicted: (B, K, 19), laid out like `objects`; of one-hot properties the largest number counts.
        objects: (B, M, 19): coordinates (3) in [0, 1], size (2), material (2), shape (3), color (8), and 1 for an
            object or 0 for none.
        distance: nearer than this, on that scale, counts; infinity asks for the right properties alone.

    Returns:
        In [0, 1]; NaN where no scene has an object. Complexity O(B K M).

    Raises:
        TypeError, ValueError: an argument is no tensor, or of another shape.
    """
    _check_tensors(predicted=predicted, objects=objects)
    for argument, tensor in (("predicted", predicted), ("objects", objects)):
        if tensor.ndim != 3 or tensor.shape[2] != NUM_PROPERTIES:
            raise ValueError(f"{argument}: expected shape (B, K, {NUM_PROPERTIES}), got {tuple(tensor.shape)}")
    if len(predicted) != len(objects):
        raise ValueError(f"predicted and objects: expected as many scenes, got {len(predicted)} and {len(objects)}")
    predicted, objects = predicted.detach().double().cpu(), objects.detach().double().cpu()
    same = objects[..., None, :, -1] > 0.5
    for ours, theirs in zip(kinds(predicted), kinds(objects), strict=True):
        same = same & (ours.unsqueeze(-1) == theirs.unsqueeze(-2))
    away = 6 * torch.linalg.vector_norm(predicted[..., None, :3] - objects[:, None, :, :3], dim=-1)
    away, nearest = torch.where(same, away, math.inf).min(-1)  # (B, K)
    scene = torch.arange(len(objects)).unsqueeze(1)
    found = torch.where(away < distance, scene * objects.shape[1] + nearest, -1)

    by_confidence = predicted[..., -1].flatten().argsort(descending=True, stable=True)
    found = found.flatten()[by_confidence].numpy()
    first = np.unique(found, return_index=True)[1]
    right = np.zeros(len(found))
    right[first] = 1
    right[found < 0] = 0
    total = float((objects[..., -1] > 0.5).sum())
    if total == 0:
        return math.nan
    hits = right.cumsum()
    precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
    return float((precision * right).sum() / total)


class Metric(NamedTuple):
    """What tables call a score, and how it is computed.

    Attributes:
        name: of the score in files of results.
        label: of its column in tables.
        compares: what `function` takes: "labels" (true and predicted, `num_true=` and `num_pred=`) and "images"
            (reconstruction and image) score each scene, "objects" (predicted and true) all scenes together.
        function: gives the score.
        unit: "%" where tables show it times 100, or "" where they show it as it is.
        higher_is_better: whether a perfect prediction has the highest value.
        in_tables: whether tables show it; files of results have all.
    """

    name: str
    label: str
    compares: Literal["labels", "images", "objects"]
    function: Callable[..., Any]
    unit: str = "%"
    higher_is_better: bool = True
    in_tables: bool = True


def _precision_within(distance: str, label: str) -> Metric:
    return Metric(f"ap_{distance}", label, "objects", partial(average_precision, distance=float(distance)))


#: All scores by name.
METRICS = {
    metric.name: metric
    for metric in (
        Metric("ari", "ARI", "labels", adjusted_rand_index),
        Metric("fg_ari", "FG-ARI", "labels", partial(adjusted_rand_index, ignore_background=True)),
        Metric("miou", "mIoU", "labels", mean_iou),
        Metric("mbo", "mBO", "labels", mean_best_overlap, in_tables=False),
        Metric("mse", "MSE", "images", mean_squared_error, unit="", higher_is_better=False),
        _precision_within("inf", "AP"),
        _precision_within("1", "AP 1"),
        _precision_within("0.5", "AP 0.5"),
        _precision_within("0.25", "AP 0.25"),
        _precision_within("0.125", "AP 0.125"),
    )
}
