"""Inpainting Error Maximization: cut a single image into regions that cannot predict one another, learning nothing.

    python -m models.iem photo.jpg                  # figure and ground
    python -m models.iem photo.jpg --segments 5     # as many regions

Savarese et al. 2021, "Information-Theoretic Segmentation by Inpainting Error Maximization", and its extension to K
regions by the loss of the Interaction Information Optimization paper. Masks m_1 .. m_K, one of them 1 at each pixel and
the others 0, are to maximise

    sum_k mean_S ||m_k * (X - psi_S)||_1 / ||m_k||_1  -  diversity * sum_k sum m_k * (X - mu_k)^2

where S runs over the nonempty sets of other masks, psi_S is the image inpainted from the pixels under them and mu_k the
mean color under m_k. For K = 2 that is the paper's objective: foreground and background, each predicted from the
other. A step moves boundaries: every pixel with a neighbour of another label takes the label, of its own and its
neighbours', whose mask has the largest gradient there. Then labels are smoothed over 3 x 3 pixels.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageOps
from torch import Tensor

from iio_kernels import iio_loss
from iio_kernels.runtime import checks
from iio_kernels.runtime.autograd import without_autocast
from iio_kernels.runtime.numerics import arithmetic_dtype, divide


def segment(images: Tensor, steps: int = 150, *, diversity: float = 1e-3, **inpainter: Any) -> Tensor:
    """Figure and ground of each image, starting with a centred square; the defaults are the paper's.

    Args:
        images: `(B, C, H, W)`, floating point, meant to be in [0, 1]; the paper's are 128 x 128. Any strides.
        steps: >= 0, of moves and smoothing.
        diversity: weight >= 0 of the colors' deviation from their region's mean.
        inpainter: `sigma`, `kernel_size`, `repeats`, `eps` and `backend` of `iio_loss`.

    Returns:
        bool `(B, H, W)`, True = figure. No image depends on the others of its batch. A region without pixels stays so.

    The search is local: under strong texture the boundary stays where it begins wherever that is far from the figure's.

    Smoothing makes figure of what has at least 4 of the 3 x 3 pixels around it in the figure. As in the published code,
    the image's edge counts as a boundary of both labels in a move, and what lies beyond as ground in smoothing.

    Raises:
        TypeError, ValueError, RuntimeError: images or an option is of the wrong type, shape or range, see `iio_loss`.

    Complexity: in each step that of `iio_loss` with its gradient, of 2 masks.

    Example:
        >>> figure = segment(torch.rand(8, 3, 128, 128))
        >>> figure.shape
        torch.Size([8, 128, 128])
    """
    images = _images(images)
    height, width = images.shape[-2:]
    square = torch.zeros(images.shape[0], height, width, dtype=torch.long, device=images.device)
    square[:, height // 5 : height - height // 5, width // 5 : width - width // 5] = 1
    return _maximise(images, one_hot(square, 2, images.dtype), steps, smooth_figure, diversity, inpainter)[:, 1] > 0


def segment_kway(
    images: Tensor, num_segments: int, steps: int = 150, *, diversity: float = 1e-3, **inpainter: Any
) -> Tensor:
    """K regions of each image, starting with the K-means of its colors.

    Args:
        images, steps, diversity, inpainter: as in `segment`.
        num_segments: K, 2 to 16 (12 with backend "reference"). Regions need not be connected.

    Returns:
        int64 `(B, H, W)`, labels in 0..K-1. No image depends on the others of its batch. A region without pixels stays
        so: an image of fewer colors has fewer regions.

    Smoothing gives a pixel the commonest label of the 3 x 3 around it, its own where that is one of them.

    Raises:
        TypeError, ValueError, RuntimeError: as `segment`.

    Complexity: in each step that of `iio_loss` with its gradient, O(2^K) a pixel.
    """
    images = _images(images)
    checks.integer("num_segments", num_segments, at_least=2)
    masks = one_hot(color_clusters(images, num_segments), num_segments, images.dtype)
    return _maximise(images, masks, steps, smooth_labels, diversity, inpainter).argmax(1)


def _maximise(
    images: Tensor,
    masks: Tensor,
    steps: int,
    smooth: Callable[[Tensor], Tensor],
    diversity: float,
    inpainter: dict[str, Any],
) -> Tensor:
    """The masks (B, K, H, W), of zeros and ones, after so many moves."""
    checks.integer("steps", steps, at_least=0)
    checks.number("diversity", diversity, at_least=0)
    with without_autocast(images.device):
        for _ in range(steps):
            masks = smooth(move_boundaries(masks, gradient(images, masks, diversity, **inpainter)))
    return masks


def gradient(images: Tensor, masks: Tensor, diversity: float, **inpainter: Any) -> Tensor:
    """The objective's gradient to the masks, both (B, K, H, W)."""
    with torch.enable_grad():
        leaf = masks.detach().requires_grad_()
        loss = iio_loss(images, leaf, terms="mean", reduction="sum", **inpainter)
        (of_errors,) = torch.autograd.grad(-loss, leaf)
    # The deviation's, sum m_k * (X - mu_k)^2, passes by the mean, which is where the deviation is least.
    means = divide(masks.flatten(2) @ images.flatten(2).mT, masks.sum((2, 3)).unsqueeze(2))
    deviations = [(images - mean[..., None, None]).square().sum(1) for mean in means.unbind(1)]
    return of_errors - diversity * torch.stack(deviations, 1)


def move_boundaries(masks: Tensor, gradient: Tensor) -> Tensor:
    """Each pixel takes the label of largest gradient of its own and its 4 neighbours'; its own if none is larger.

    Beyond the image's edge lies every label; of labels without pixels, none.
    """
    padded = F.pad(masks, (1, 1, 1, 1), value=1)
    vertical, horizontal = padded[:, :, :, 1:-1], padded[:, :, 1:-1, :]
    near = masks + vertical[:, :, :-2] + vertical[:, :, 2:] + horizontal[..., :-2] + horizontal[..., 2:]
    within_reach = (near > 0) & (masks.sum((2, 3), keepdim=True) > 0)
    gain = (gradient - (masks * gradient).sum(1, keepdim=True)).masked_fill(~within_reach, -torch.inf)
    largest, label = gain.max(1)
    return one_hot(torch.where(largest > 0, label, masks.argmax(1)), masks.shape[1], masks.dtype)


def smooth_figure(masks: Tensor) -> Tensor:
    """Of ground and figure (B, 2, H, W): figure is what has at least 4 of the 3 x 3 pixels around it in the figure."""
    return one_hot((_in_3x3(masks[:, 1:])[:, 0] >= 4).long(), 2, masks.dtype)


def smooth_labels(masks: Tensor) -> Tensor:
    """Each pixel takes the label that most of the 3 x 3 around it have, its own where no other has more."""
    votes = _in_3x3(masks)
    most, label = votes.max(1)
    own = (votes * masks).sum(1)
    return one_hot(torch.where(most > own, label, masks.argmax(1)), masks.shape[1], masks.dtype)


def _in_3x3(masks: Tensor) -> Tensor:
    """How many of the 3 x 3 pixels around each are 1; zeros outside."""
    return F.avg_pool2d(masks, 3, stride=1, padding=1, divisor_override=1)


def one_hot(labels: Tensor, num_labels: int, dtype: torch.dtype) -> Tensor:
    """Integers (B, H, W) -> masks (B, K, H, W) of zeros and ones."""
    return (labels.unsqueeze(1) == torch.arange(num_labels, device=labels.device)[:, None, None]).to(dtype)


def color_clusters(images: Tensor, num_clusters: int, iterations: int = 20) -> Tensor:
    """Labels (B, H, W) by K-means of the colors, begun with the one nearest to the mean, then always the farthest."""
    colors = images.flatten(2)  # (B, C, N)

    def distances(centers: list[Tensor]) -> Tensor:
        return torch.stack([(colors - center).square().sum(1) for center in centers], 1)

    def of_pixel(index: Tensor) -> Tensor:
        return colors.gather(2, index[:, None, None].expand(-1, colors.shape[1], 1))

    centers = [of_pixel(distances([colors.mean(2, keepdim=True)]).amin(1).argmin(1))]
    while len(centers) < num_clusters:
        centers.append(of_pixel(distances(centers).amin(1).argmax(1)))
    for _ in range(iterations):
        nearest = distances(centers).argmin(1)
        for k, center in enumerate(centers):
            size = (nearest == k).sum(1)[:, None, None]
            mean = (colors * (nearest == k).unsqueeze(1)).sum(2, keepdim=True) / size
            centers[k] = torch.where(size > 0, mean, center)
    return distances(centers).argmin(1).unflatten(1, images.shape[2:])


def _images(images: Tensor) -> Tensor:
    """The images, checked and in the dtype of the arithmetic."""
    checks.tensor("images", images, "(B, C, H, W)")
    return images.detach().to(arithmetic_dtype(images))


# --- the command line ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arguments:
    """Segment a photograph by maximising inpainting errors; write PHOTO-labels.png and PHOTO-overlay.png.

    Both show the photograph's centred square: the labels as a palette PNG, whose values are the labels (of two, 1 is
    the figure), and the photograph tinted by them.
    """

    photo: Annotated[Path, tyro.conf.Positional]
    """Any image that Pillow reads. Of one with more than 8 bits a pixel, darkest to brightest is taken as 0 to 255."""
    segments: int | None = None
    """K, the number of regions, 2 to 16; without it figure and ground, as published."""
    out: Path = Path()
    """Folder for the results."""
    size: int = 128
    """Height and width at which it is segmented, in pixels, at least 11."""
    steps: int = 150
    """Moves of the boundaries."""
    diversity: float = 1e-3
    """Weight of the colors' deviation from their region's mean."""


def run(arguments: Arguments) -> None:
    """Segment a photograph and write what came out."""
    checks.integer("size", arguments.size, at_least=11)  # the inpainter's taps
    if arguments.segments is not None and not 2 <= arguments.segments <= len(COLORS):
        raise ValueError(f"--segments: expected 2 to {len(COLORS)}, got {arguments.segments}")
    with Image.open(arguments.photo) as file:
        photo = ImageOps.exif_transpose(file)
    if photo.mode.startswith(("I", "F")):  # more than 8 bits a pixel, which Pillow would cut off at 255
        values = np.asarray(photo, np.float64)
        low, high = values.min(), values.max()
        if not np.isfinite(high - low):
            raise ValueError(f"photo: expected finite pixels, got {low} to {high}")
        photo = Image.fromarray(((values - low) * (255 / ((high - low) or 1))).round().astype(np.uint8))
    photo = photo.convert("RGB")
    small = ImageOps.fit(photo, (arguments.size, arguments.size), Image.Resampling.NEAREST)
    images = torch.from_numpy(np.array(small)).permute(2, 0, 1).unsqueeze(0) / 255
    if arguments.segments is None:
        labels = segment(images, arguments.steps, diversity=arguments.diversity).long()
    else:
        labels = segment_kway(images, arguments.segments, arguments.steps, diversity=arguments.diversity)

    square = ImageOps.fit(photo, (min(photo.size), min(photo.size)))
    palette = Image.fromarray(labels[0].numpy().astype(np.uint8)).resize(square.size, Image.Resampling.NEAREST)
    palette.putpalette(COLORS.tobytes())
    overlay = Image.blend(square, palette.convert("RGB"), 0.5)
    arguments.out.mkdir(parents=True, exist_ok=True)
    files = {arguments.out / f"{arguments.photo.stem}-{name}.png": x
             for name, x in (("labels", palette), ("overlay", overlay))}  # fmt: skip
    for path, picture in files.items():
        # Whole or not at all: a reader never meets half of it.
        temporary = path.with_name(path.name + ".tmp")
        picture.save(temporary, "png")
        os.replace(temporary, path)
        print(path)


def main(arguments: list[str] | None = None) -> None:
    """The command, of `sys.argv` unless arguments are given."""
    try:
        run(tyro.cli(Arguments, args=arguments))
    except (OSError, TypeError, ValueError, Image.DecompressionBombError) as error:
        print(f"models.iem: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


#: A color for each of 16 labels: ground dark, figure bright, the others apart from both.
COLORS = np.array(
    [
        *([20, 20, 60], [255, 180, 40], [60, 180, 75], [230, 25, 75], [0, 130, 200], [145, 30, 180], [70, 240, 240]),
        *([240, 50, 230], [210, 245, 60], [250, 190, 212], [0, 128, 128], [170, 110, 40], [255, 250, 200]),
        *([128, 0, 0], [170, 255, 195], [128, 128, 128]),
    ],
    dtype=np.uint8,
)

if __name__ == "__main__":
    main()
