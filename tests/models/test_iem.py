"""Inpainting Error Maximization: its moves by brute force, its objective as printed, and what it finds."""

from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from data import metrics
from iio_kernels.testing.iio_loss import literal_iio_loss
from models import iem

NAN = float("nan")


def random_masks(B, K, H, W):
    return iem.one_hot(torch.randint(K, (B, H, W)), K, torch.float64)


def disc(row, column, radius, size):
    """bool (1, size, size); the rest in fractions of size."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return ((y - row * size) ** 2 + (x - column * size) ** 2 < (radius * size) ** 2).unsqueeze(0)


def textured(labels, contrast):
    """Images (B, 3, H, W) of labels (B, H, W) in 0..2: stripes, checks and dots of a color each, with noise."""
    y, x = torch.meshgrid(*map(torch.arange, labels.shape[1:]), indexing="ij")
    textures = torch.stack([(x + 2 * y) % 9 < 4, (x // 3 + y // 3) % 2 == 1, x * y % 5 < 2])
    colors = torch.tensor([[0.3, 0.4, 0.3], [0.7, 0.5, 0.3], [0.4, 0.3, 0.8]])
    images = colors[labels].movedim(-1, 1) + contrast * (
        (textures * iem.one_hot(labels, 3, torch.float32)).sum(1, keepdim=True) - 0.5
    )
    return (images + 0.05 * torch.randn(images.shape)).clamp(0, 1)


def iou(a, b):
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2))


# --- the steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [2, 4])
def test_moves_are_those_of_each_pixel_by_itself(K):
    masks, gradient = random_masks(2, K, 7, 6), torch.randn(2, K, 7, 6, dtype=torch.float64)
    masks[0], masks[1, :, :4] = (torch.eye(K)[k].view(1, K, 1, 1)[0].expand(K, h, 6) for k, h in ((0, 7), (1, 4)))
    gradient[1, :, :2] = 1.0  # where no label gains, each keeps its own
    got = iem.move_boundaries(masks, gradient).argmax(1)
    labels = masks.argmax(1)
    for b, i, j in product(range(2), range(7), range(6)):
        own, present = labels[b, i, j].item(), set(labels[b].flatten().tolist())
        around = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
        inside = [(y, x) for y, x in around if 0 <= y < 7 and 0 <= x < 6]
        choices = {labels[b, y, x].item() for y, x in inside} if len(inside) == 4 else present
        best = max({own, *choices}, key=lambda k: (gradient[b, k, i, j].item(), k == own))
        assert got[b, i, j] == best


def test_a_move_of_two_labels_is_the_sign_of_the_gradient_on_the_boundary():
    """As the paper has it: m = 1 where the gradient to m is positive, 0 where it is negative, at boundary pixels."""
    figure = random_masks(1, 2, 9, 8)[:, 1]
    slope = torch.randn(1, 9, 8, dtype=torch.float64)
    slope[:, ::3] = 0
    got = iem.move_boundaries(torch.stack([1 - figure, figure], 1), torch.stack([0 * slope, slope], 1))[:, 1]
    kernel = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]], dtype=torch.float64)[None, None]
    edge = [torch.nn.functional.conv2d(m.unsqueeze(1), kernel, padding=1)[:, 0] > 0.5 for m in (figure, 1 - figure)]
    expected = torch.where((edge[0] | edge[1]) & (slope != 0), (slope > 0).double(), figure)
    assert torch.equal(got, expected)
    assert not torch.equal(got, figure)


def test_smoothing_counts_the_3_by_3():
    figure, labels = random_masks(2, 2, 6, 9), random_masks(2, 3, 6, 9)
    smooth_figure, smooth_labels = iem.smooth_figure(figure).argmax(1), iem.smooth_labels(labels).argmax(1)
    for b, i, j in product(range(2), range(6), range(9)):
        square = np.s_[b, :, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
        assert smooth_figure[b, i, j] == (figure[square][1].sum() >= 4)
        votes, own = labels[square].sum((1, 2)).tolist(), labels[b, :, i, j].argmax().item()
        most = [k for k in range(3) if votes[k] == max(votes)]
        assert smooth_labels[b, i, j] == (own if own in most else most[0])


@pytest.mark.parametrize("K", [2, 3])
def test_the_gradient_is_that_of_the_objective_as_printed(K):
    images, masks = torch.rand(2, 3, 13, 12, dtype=torch.float64), random_masks(2, K, 13, 12).requires_grad_()
    objective = -literal_iio_loss(images, masks) / (2 ** (K - 1) - 1)
    for m in masks.unbind(1):
        m = m.unsqueeze(1)
        mean = (m * images).sum((2, 3), keepdim=True) / m.sum((2, 3), keepdim=True)
        objective = objective - 0.02 * (m * (images - mean) ** 2).sum((1, 2, 3))
    (expected,) = torch.autograd.grad(objective.sum(), masks)
    torch.testing.assert_close(iem.gradient(images, masks, 0.02), expected, rtol=1e-9, atol=1e-12)


# --- the whole -------------------------------------------------------------------------------------------------------


def test_discs_are_found_and_no_image_sees_another():
    discs = torch.cat([disc(0.5, 0.4, 0.33, 96), disc(0.6, 0.6, 0.25, 96)])
    images = textured(discs.long(), 0.1)
    start, figure = iem.segment(images, 0), iem.segment(images)
    assert figure.dtype == torch.bool
    assert (start[:, 19:77, 19:77].all(), start.sum()) == (True, 2 * 58**2)
    assert iou(start, discs).max() < 0.7
    assert iou(figure, discs).min() >= 0.9, iou(figure, discs)
    transposed = images[1:].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(iem.segment(transposed)[0], figure[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(iem.segment(images[1:], 20), iem.segment(images, 20)[1:])
    for x in (images.double(), images.half(), images[:0]):
        assert iem.segment(x, 2).shape == iem.segment_kway(x, 3, 2).shape == (len(x), 96, 96)


def test_kway_mends_what_colors_alone_get_wrong():
    labels = torch.where(disc(0.7, 0.75, 0.2, 64), 2, disc(0.5, 0.4, 0.33, 64).long())
    images = torch.cat([textured(labels, 0.2), textured(labels, 0.1)])
    start, found = iem.segment_kway(images, 3, 0), iem.segment_kway(images, 3, 30)
    assert found.dtype == torch.int64
    before, after = (metrics.adjusted_rand_index(labels, x[:1]).item() for x in (start, found))
    assert before < 0.93 < 0.98 < after, (before, after)
    assert torch.equal(iem.segment_kway(images[1:], 3, 30)[0], found[1])


@pytest.mark.parametrize("fill", [0.5, NAN])
def test_an_image_with_nothing_to_find(fill):
    """One color, or no numbers, ends in some mask; the image beside it is cut as ever."""
    images = textured(disc(0.5, 0.4, 0.3, 32).long().repeat(2, 1, 1), 0.1)
    expected = iem.segment(images, 5), iem.segment_kway(images, 3, 5)
    images[0] = fill
    got = iem.segment(images, 5), iem.segment_kway(images, 3, 5)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours[1], theirs[1])
    assert not got[1][0].any() or fill != fill


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.zeros(3, 32, 32), 5), ValueError, r"images: expected shape \(B, C, H, W\)"),
        ((torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 5), TypeError, "images: expected dtype"),
        ((torch.zeros(1, 3, 32, 32), -1), ValueError, "steps: expected an int >= 0, got -1"),
        ((torch.zeros(1, 3, 32, 8), 1), ValueError, "kernel_size: expected at most the image's smaller side, 8"),
    ],
)
def test_what_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        iem.segment(*arguments)


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [None, 3])
def test_the_command_writes_labels_and_overlay(segments, tmp_path, capsys):
    image = textured(disc(0.5, 0.4, 0.3, 64).long(), 0.1)[0].permute(1, 2, 0).mul(255).byte().numpy()
    Image.fromarray(np.concatenate([image[:, :9], image, image[:, -9:]], 1)).save(tmp_path / "photo.png")
    options = [] if segments is None else ["--segments", str(segments)]
    iem.main([str(tmp_path / "photo.png"), "--out", str(tmp_path / "out"), "--size", "32", "--steps", "20", *options])
    files = [tmp_path / "out" / f"photo-{name}.png" for name in ("labels", "overlay")]
    assert capsys.readouterr().out.split() == list(map(str, files))
    assert sorted((tmp_path / "out").iterdir()) == files
    with Image.open(files[0]) as labels, Image.open(files[1]) as overlay:
        assert (labels.size, labels.mode, overlay.size, overlay.mode) == ((64, 64), "P", (64, 64), "RGB")
        assert set(np.unique(labels)) == set(range(segments or 2))


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_photographs_of_more_than_8_bits_are_segmented_as_those_of_8(kind, tmp_path):
    """Darkest to brightest is taken as 0 to 255."""
    gray = textured(disc(0.5, 0.4, 0.3, 48).long(), 0.1)[0].mean(0).mul(255).round()
    gray = ((gray - gray.min()) * (255 / (gray.max() - gray.min()))).round().numpy()
    options = ["--size", "48", "--steps", "20", "--out", str(tmp_path)]
    Image.fromarray(gray.astype(np.uint8)).save(tmp_path / "plain.png")
    Image.fromarray((gray * 100 + 3).astype(kind)).save(tmp_path / "deep.tiff")
    for name in ("plain.png", "deep.tiff"):
        iem.main([str(tmp_path / name), *options])
    assert (tmp_path / "deep-labels.png").read_bytes() == (tmp_path / "plain-labels.png").read_bytes()
    assert (tmp_path / "deep-overlay.png").read_bytes() == (tmp_path / "plain-overlay.png").read_bytes()


@pytest.mark.parametrize("what", ["nothing there", "no image"])
def test_the_command_says_what_it_cannot_read(what, tmp_path, capsys):
    photo = tmp_path / "photo.jpg"
    if what == "no image":
        photo.write_text("not a picture")
    with pytest.raises(SystemExit) as stop:
        iem.main([str(photo), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("models.iem: ")
    assert "photo.jpg" in error
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_sizes_below_the_inpainter(tmp_path, capsys):
    with pytest.raises(SystemExit):
        iem.main([str(tmp_path / "photo.jpg"), "--size", "0"])
    assert "size: expected an int >= 11, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("segments", ["1", "17"])
def test_the_command_refuses_other_numbers_of_segments(segments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        iem.main([str(tmp_path / "photo.jpg"), "--segments", segments])
    assert f"--segments: expected 2 to 16, got {segments}" in capsys.readouterr().err
