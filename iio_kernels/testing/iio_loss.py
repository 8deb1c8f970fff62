"""What the IIO loss is tested and measured on: sample inputs, the formula as printed, the error allowed, bytes moved
and FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iio_kernels.ops.iio_loss import reference, sampling
from iio_kernels.ops.iio_loss.api import iio_loss
from iio_kernels.ops.iio_loss.common import Inpainter
from iio_kernels.runtime.backends import implementation
from iio_kernels.runtime.numerics import twice_and_4_units
from iio_kernels.testing.aot import arithmetic, on_meta


@dataclass(frozen=True)
class Case:
    """A named call of `iio_kernels.iio_loss`: image (B, C, H, W), masks (B, K, H, W).

    image: "noise" (uniform) or "flat" (one color throughout).
    masks: "soft" (a softmax), "one-hot", "empty" (one-hot, the last two without a pixel), or "single"
        (one-hot, all pixels in the first).
    """

    name: str
    B: int = 2
    C: int = 3
    K: int = 4
    H: int = 13
    W: int = 12
    options: dict[str, Any] = field(default_factory=dict)
    image: str = "noise"
    masks: str = "soft"

    @property
    def smooth(self) -> bool:
        """Whether gradients can be compared: where a residual is 0, its sign is decided by rounding.

        A single tap predicts every pixel by itself, so that all residuals are 0.
        """
        return self.image == "noise" and self.masks == "soft" and self.options.get("kernel_size") != 1

    def make(
        self, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """(image, masks) and the keyword arguments, the same numbers on every device."""
        random = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(self.B, self.K, self.H, self.W, generator=random, dtype=torch.float64)
        if self.masks == "soft":
            masks = logits.softmax(1)
        else:
            used = {"one-hot": self.K, "empty": max(self.K - 2, 1), "single": 1}[self.masks]
            winner = logits[:, :used].argmax(1, keepdim=True)
            masks = torch.zeros_like(logits).scatter_(1, winner, 1)
        masks = masks.to(dtype)
        shape = (self.B, self.C, self.H, self.W) if self.image == "noise" else (self.B, self.C, 1, 1)
        image = torch.rand(shape, generator=random, dtype=torch.float64).to(dtype)
        image = image.expand(self.B, self.C, self.H, self.W).contiguous()
        if self.smooth and self.K <= 7:  # beyond, subsets are too many to look at each
            _move_off_kinks(image, masks, self.options, random)
        return (image.to(device), masks.to(device)), dict(self.options)

    def bytes_moved(self, dtype: torch.dtype, backward: bool = False) -> int:
        """The least traffic: image and masks read, each image's float32 loss written; with `backward` both
        gradients written as well (one pass serves loss and gradient)."""
        planes = (self.C + self.K) * (2 if backward else 1)
        return self.B * (planes * self.H * self.W * dtype.itemsize + 4)

    def flops(self, backward: bool = False) -> int:
        """Operations of the subset sums; with `backward` those of loss and gradient together.

        A pixel takes: for each of K (C + 1) blurred planes 2 axes x repeats x taps multiply-adds; for each of
        the 2^K - 2 subsets C + 1 additions to its parent, C absolute values, C - 1 additions, a reciprocal, a
        product and an addition to T. The gradient blurs as many planes again and takes for each subset C + 1
        products and C + 1 additions up the tree, and 2 operations for w. A listed set has no parent: it adds up R, D
        and w from tables of three masks each, and adds what comes back into as many.
        """
        taps, repeats = self.options.get("kernel_size", 11), self.options.get("repeats", 2)
        blur = self.K * (self.C + 1) * 4 * repeats * taps
        subsets = self.options.get("subsets", 2**self.K - 2)
        tables = -(-self.K // 3) * (self.C + 2) if "subsets" in self.options else 0
        pixel = blur + subsets * (3 * self.C + 3 + tables)
        if backward:
            pixel += blur + subsets * (2 * self.C + 4 + tables)
        return self.B * self.H * self.W * pixel


def _move_off_kinks(image: Tensor, masks: Tensor, options: dict[str, Any], random: torch.Generator) -> None:
    """Redraw the pixels within 1e-5 of some subset's prediction: float32 may take the kink's wrong side."""
    inpainter = Inpainter(**{"sigma": 5.0, "kernel_size": 11, "repeats": 2, "eps": 1e-8, **options})
    K = masks.shape[1]
    members = torch.tensor([[s >> i & 1 for i in range(K)] for s in range(1, 2**K - 1)], dtype=torch.float64)
    sets = torch.einsum("si,bihw->bshw", members, masks.double())
    for _ in range(100):
        near = ((image.double().unsqueeze(1) - reference.inpaint(image.double(), sets, inpainter)).abs() < 1e-5).any(1)
        if not near.any():
            return
        image[near] = torch.rand(int(near.sum()), generator=random, dtype=torch.float64).to(image.dtype)
    raise RuntimeError("no image away from all kinks was found")


# --- the formula as printed -------------------------------------------------------------------------------
# Slow, plain, the yardstick: it shares nothing with the operation's implementation, and is not to.


def others_subsets(K: int, centre: int) -> list[tuple[int, ...]]:
    """All nonempty subsets of the masks other than `centre`."""
    others = [i for i in range(K) if i != centre]
    return list(chain.from_iterable(combinations(others, size) for size in range(1, K)))


def _literal_blur(planes: Tensor, sigma: float, kernel_size: int, repeats: int) -> Tensor:
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


def _literal_filtered(
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
    planes = _literal_blur(planes, sigma, kernel_size, repeats) + eps * planes.sum((2, 3), keepdim=True)
    return planes[:, :-1], planes[:, -1:]


def literal_inpaint(image: Tensor, mask: Tensor, **inpainter: Any) -> Tensor:
    """psi (B, C, H, W), the image predicted from the pixels under mask (B, H, W)."""
    numerator, denominator = _literal_filtered(image, mask, **inpainter)
    return torch.where(denominator == 0, 0, numerator / torch.where(denominator == 0, 1, denominator))


def literal_conditional_entropy(image: Tensor, centre: Tensor, given: Tensor, **inpainter: Any) -> Tensor:
    """(B,): || centre * (image - psi_given) ||_1 / || centre ||_1; pixels out of `given`'s reach count 0."""
    _, denominator = _literal_filtered(image, given, **inpainter)
    error = (image - literal_inpaint(image, given, **inpainter)).abs()
    error = torch.where(denominator == 0, 0, error).mean(1)
    norm = centre.sum((1, 2))
    return torch.where(norm == 0, 0, (centre * error).sum((1, 2)) / torch.where(norm == 0, 1, norm))


def literal_iio_loss(image: Tensor, masks: Tensor, **inpainter: Any) -> Tensor:
    """(B,): each image's loss, a term for every centre and every nonempty subset of the other masks."""
    K = masks.shape[1]
    loss = image.new_zeros(image.shape[0])
    for m in range(K):
        for subset in others_subsets(K, m):
            given = sum((masks[:, i] for i in subset), torch.zeros_like(masks[:, 0]))
            loss = loss - literal_conditional_entropy(image, masks[:, m], given, **inpainter)
    return loss


# --- what tests call --------------------------------------------------------------------------------------


def results(
    function: Callable[..., Tensor], image: Tensor, masks: Tensor, incoming: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Each image's loss and the gradients to image and masks; `incoming` is that to the losses."""
    leaves = [x.detach().clone().requires_grad_() for x in (image, masks)]
    losses = function(*leaves, **options)
    if incoming is None:
        incoming = torch.linspace(-1, 2, len(losses)).to(losses)
    dimage, dmasks = torch.autograd.grad(losses, leaves, incoming)
    return losses.detach(), dimage, dmasks


def run(
    image: Tensor, masks: Tensor, backend: str, incoming: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`results` of `iio_loss`."""
    return results(iio_loss, image, masks, incoming, backend=backend, reduction="none", **options)


def seeded(seed: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator on that device."""
    return torch.Generator(device).manual_seed(seed)


def run_drawn(
    image: Tensor, masks: Tensor, backend: str, incoming: Tensor | None = None, seed: int = 0, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`results` of `iio_loss` for the draw of a seed, of some 14 subsets."""
    options = {
        "subsets": max(14, sampling.least(masks.shape[1])),
        **options,
        "generator": seeded(seed, image.device),
        "backend": backend,
    }
    return results(iio_loss, image, masks, incoming, reduction="none", **options)


def assert_all_close(
    got: Sequence[Tensor], expected: Sequence[Tensor], relative: float = 1e-10, absolute: float = 1e-14
) -> None:
    """Each result is as expected, relative to its largest value."""
    for name, x, y in zip(("loss", "dimage", "dmasks"), got, expected, strict=True):
        scale = y.abs().max().item() if y.numel() else 1
        torch.testing.assert_close(x, y, rtol=0, atol=relative * scale + absolute, msg=partial("{}: {}".format, name))


# --- the samples -------------------------------------------------------------------------------------------

CASES = (
    Case("plain"),
    Case("two masks", K=2),
    Case("three masks", K=3),
    Case("five masks", K=5),
    Case("six masks", K=6, B=1),
    Case("seven masks", K=7, B=1, C=1, H=11, W=11),
    Case("one channel", C=1),
    Case("five channels", C=5, K=3),
    Case("odd sizes", B=3, K=3, H=11, W=29),
    Case("tall", B=1, K=3, H=70, W=11),
    Case("one pixel", K=3, H=1, W=1, options={"kernel_size": 1}),
    Case("one row", K=3, H=1, W=17, options={"kernel_size": 1}),
    Case("one tap", K=3, options={"kernel_size": 1}),
    Case("no images", B=0),
    Case("narrow", options={"sigma": 0.8, "kernel_size": 3}),
    Case("wide", options={"sigma": 20.0}),
    Case("once", options={"repeats": 1}),
    Case("three times", options={"repeats": 3, "kernel_size": 5}),
    Case("large eps", options={"eps": 1e-2}),
    Case("zero eps", options={"eps": 0}),
    Case("one-hot", masks="one-hot"),
    Case("one-hot, zero eps", masks="one-hot", options={"eps": 0.0, "kernel_size": 3, "repeats": 1}),
    Case("empty masks", masks="empty"),
    Case("empty masks, zero eps", masks="empty", options={"eps": 0, "kernel_size": 3}),
    Case("single mask", masks="single"),
    Case("flat", image="flat"),
    Case("flat, one-hot", image="flat", masks="one-hot", options={"sigma": 2.0, "kernel_size": 7}),
)

#: The sizes in use, for benchmarks; for a CPU in batches that it gets through.
BENCHMARKS = {
    "cpu": (
        Case("Tetrominoes", B=64, K=4, H=35, W=35),
        Case("seven masks", B=16, K=7, H=64, W=64),
        Case("eleven masks", B=2, K=11, H=64, W=64),
        Case("fourteen masks", B=1, K=14, H=32, W=32),
        Case("256 subsets of 24 masks", B=16, K=24, H=64, W=64, options={"subsets": 256}),
    ),
    "cuda": (
        Case("Tetrominoes", B=64, K=4, H=35, W=35),
        Case("Multi-dSprites", B=64, K=6, H=64, W=64),
        Case("seven masks", B=16, K=7, H=64, W=64),
        Case("CLEVR6", B=64, K=7, H=128, W=128),
    ),
    "toy": (Case("toy", B=1, K=3, H=12, W=13),),
}


def allowed_error(truth: Tensor, eager: Tensor) -> float:
    """How far a result may lie from the `truth`, computed in float64 from the same stored inputs.

    Twice as far as `eager`, the literal formula computed in float32 and stored in the result's type; and 4
    units in the last place of the largest value besides, since eager may be exact.
    """
    return twice_and_4_units(truth, eager)


def launch(
    operator: str, B: int, K: int, C: int, H: int, W: int, dtype: torch.dtype, *needs: bool, kernel_size: int = 11,
    repeats: int = 2, subsets: int = 256,
) -> None:  # fmt: skip
    """One of the operators, with what it `needs` besides."""
    kernels = implementation("iio_loss", "triton")

    own, results = (partial(on_meta, dtype=x) for x in (dtype, arithmetic(dtype)))
    incoming = {
        "conditional_entropies_backward": (B, K, 2 ** (K - 1) - 1),
        "inpaint_backward": (B, K, C, H, W),
    }
    grad = (results(*incoming[operator]),) if operator in incoming else ()
    pairs = on_meta(B, subsets // 2, dtype=torch.int64)
    listed = (pairs, results(subsets // 2)) if operator == "sampled_iio_loss" else ()
    inputs = *grad, own(B, C, H, W), own(B, K, H, W), *listed
    getattr(kernels, f"_{operator}")(*inputs, 5.0, kernel_size, repeats, 1e-8, *needs)


F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
#: Calls that are compiled for GPUs that are not here.
LAUNCHES: dict[str, Callable[[], None]] = {
    name: partial(launch, *arguments, **dict(*options))
    for name, arguments, *options in (
        ("Tetrominoes", ("iio_loss", 64, 4, 3, 35, 35, F32, False, True)),
        ("Tetrominoes bfloat16", ("iio_loss", 64, 4, 3, 35, 35, BF16, True, True)),
        ("CLEVR6", ("iio_loss", 64, 7, 3, 128, 128, F32, False, True)),
        ("CLEVR6 both gradients", ("iio_loss", 64, 7, 3, 128, 128, F32, True, True)),
        ("CLEVR6 loss alone", ("iio_loss", 64, 7, 3, 128, 128, F32, False, False)),
        ("K11", ("iio_loss", 8, 11, 3, 64, 64, F32, False, True)),
        ("K16", ("iio_loss", 1, 16, 3, 35, 35, F32, False, True)),
        ("gray 512x512", ("iio_loss", 8, 2, 1, 512, 512, F32, False, True)),
        ("33 taps", ("iio_loss", 8, 2, 3, 64, 64, F32, False, True), {"kernel_size": 33, "repeats": 1}),
        ("25 taps thrice", ("iio_loss", 8, 2, 3, 64, 64, F32, False, True), {"kernel_size": 25, "repeats": 3}),
        ("3 taps often", ("iio_loss", 8, 2, 3, 64, 64, F32, False, True), {"kernel_size": 3, "repeats": 22}),
        ("256 subsets of 24", ("sampled_iio_loss", 16, 24, 3, 64, 64, F32, False, True)),
        ("256 subsets, both gradients", ("sampled_iio_loss", 16, 24, 3, 64, 64, BF16, True, True)),
        ("256 subsets, loss alone", ("sampled_iio_loss", 16, 24, 3, 64, 64, F32, False, False)),
        ("256 subsets, gray", ("sampled_iio_loss", 16, 24, 1, 64, 64, F32, False, True)),
        ("256 subsets, float64", ("sampled_iio_loss", 16, 24, 3, 64, 64, F64, True, True)),
        ("entropies", ("conditional_entropies", 64, 7, 3, 128, 128, F32)),
        ("entropies backward", ("conditional_entropies_backward", 64, 7, 3, 128, 128, F32, True)),
        ("predictions", ("inpaint", 64, 7, 3, 128, 128, F32)),
        ("predictions backward", ("inpaint_backward", 64, 7, 3, 128, 128, F32)),
        ("float64", ("iio_loss", 8, 4, 3, 35, 35, F64, True, True)),
    )
}
