"""What slot composition is tested and measured on: sample inputs, the formula as printed, the error allowed, bytes
moved and FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from iio_kernels.ops.compose.api import compose, composition_error
from iio_kernels.runtime.backends import implementation
from iio_kernels.runtime.numerics import twice_and_4_units
from iio_kernels.testing.aot import arithmetic, on_meta
from iio_kernels.testing.tensors import random_like


@dataclass(frozen=True)
class Case:
    """A named call of `iio_kernels.composition_error`: image (B, C, H, W), decoded (B, K, C + 1, H, W).

    With `channels_last` a pixel's C + 1 numbers of decoded are adjacent.
    """

    name: str
    B: int = 2
    K: int = 4
    C: int = 3
    H: int = 13
    W: int = 12
    channels_last: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32  # in benchmarks

    def make(
        self, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """(image, decoded) and the keyword arguments, the same numbers on every device and in either layout."""
        random = torch.Generator().manual_seed(seed)
        decoded = torch.randn(self.B, self.K, self.C + 1, self.H, self.W, generator=random, dtype=torch.float64)
        image = torch.rand(self.B, self.C, self.H, self.W, generator=random, dtype=torch.float64)
        decoded[:, :, -1] *= 2
        if self.channels_last:
            decoded = decoded.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        return (image.to(dtype).to(device), decoded.to(dtype).to(device)), dict(self.options)

    def bytes_moved(self, dtype: torch.dtype, backward: bool = False) -> int:
        """The least traffic: image (float32) and decoded read; with `backward` those of the backward pass alone, which
        reads them too and writes decoded's gradient."""
        decoded = self.K * (self.C + 1) * dtype.itemsize
        return self.B * self.H * self.W * (decoded * (2 if backward else 1) + 4 * self.C)

    def flops(self, backward: bool = False) -> int:
        """Operations of the sums over slots and channels, and an exponential for each slot counted as one.

        A pixel takes K exponentials, sums of them and products with their inverse, C K multiply-adds and C squared
        differences; the backward pass takes the same but for the squares, then C K multiply-adds for da, C K products
        for d_rgb and 2 multiply-adds a slot for d_alpha.
        """
        pixel = 3 * self.K + 2 * self.C * self.K + 3 * self.C
        if backward:
            pixel += 3 * self.C * self.K + 4 * self.K
        return self.B * self.H * self.W * pixel


# --- the formula as printed -------------------------------------------------------------------------------
# Slow, plain, the yardstick: it shares nothing with the operation's implementation, and is not to.


def literal_compose(decoded: Tensor) -> tuple[Tensor, Tensor]:
    """The reconstruction (B, C, H, W) and the masks (B, K, H, W), slot by slot."""
    likelihoods = [slot[:, -1].exp() for slot in decoded.unbind(1)]
    total = torch.stack(likelihoods).sum(0)
    masks = [likelihood / total for likelihood in likelihoods]
    pictures = [mask.unsqueeze(1) * slot[:, :-1] for mask, slot in zip(masks, decoded.unbind(1), strict=True)]
    return torch.stack(pictures).sum(0), torch.stack(masks, 1)


def literal_composition_error(image: Tensor, decoded: Tensor) -> tuple[Tensor, Tensor]:
    """Each image's mean squared error (B,), and the masks."""
    reconstruction, masks = literal_compose(decoded)
    return ((reconstruction - image) ** 2).mean((1, 2, 3)), masks


# --- what tests call --------------------------------------------------------------------------------------


#: What the results and gradients of a call are, in this order.
NAMES = ("error or reconstruction", "masks", "dimage", "ddecoded")


def results(
    function: Callable[..., Sequence[Tensor]],
    image: Tensor,
    decoded: Tensor,
    incoming: Sequence[Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """What `function` returns, and the gradients to image and decoded (0 where there is none) from those that come in,
    `incoming` or else random (fixed seed)."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in (image, decoded)]
    outputs = function(*leaves, **options)
    incoming = random_like(*outputs) if incoming is None else incoming
    gradients = torch.autograd.grad(outputs, leaves, incoming, allow_unused=True, materialize_grads=True)
    return *(x.detach() for x in outputs), *gradients


def run(image: Tensor, decoded: Tensor, backend: str, incoming: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
    """Each image's error, the masks, and the gradients to image and decoded."""
    options = {"reduction": "none", "return_masks": True, "backend": backend}
    return results(composition_error, image, decoded, incoming, **options)


def composed(
    image: Tensor, decoded: Tensor, backend: str | None = None, incoming: Sequence[Tensor] | None = None
) -> tuple[Tensor, ...]:
    """The reconstruction, the masks, no gradient to the image, and that to decoded; literal without a backend."""
    options = {} if backend is None else {"backend": backend}
    function = literal_compose if backend is None else compose
    return results(lambda _, decoded: function(decoded, **options), image, decoded, incoming)


# --- the samples -------------------------------------------------------------------------------------------

CASES = (
    Case("plain"),
    Case("channels last", channels_last=True),
    Case("one slot", K=1),
    Case("two slots", K=2, channels_last=True),
    Case("seven slots", K=7),
    Case("many slots", B=1, K=24, H=5, W=7, channels_last=True),
    Case("gray", C=1),
    Case("gray, channels last", C=1, channels_last=True),
    Case("two channels, channels last", C=2, channels_last=True),
    Case("six channels", K=3, C=6),
    Case("six channels, channels last", K=3, C=6, channels_last=True),
    Case("no images", B=0),
    Case("no images, channels last", B=0, channels_last=True),
    Case("one pixel", H=1, W=1),
    Case("one pixel, channels last", H=1, W=1, channels_last=True),
    Case("one row", H=1, W=67),
    Case("one column", H=67, W=1, channels_last=True),
    Case("one of all", B=1, K=1, C=1, H=1, W=1),
    Case("whole blocks", K=3, H=16, W=16),
    Case("whole blocks, channels last", K=3, H=16, W=16, channels_last=True),
    Case("two chunks", B=1, K=2, H=35, W=35),
    Case("two chunks, channels last", B=1, K=2, H=35, W=35, channels_last=True),
)

#: The sizes in use, for benchmarks, with layout and dtype as decoders leave them; for a CPU in batches that it gets
#: through.
BENCHMARKS = {
    "cpu": (
        Case("Tetrominoes", B=64, H=35, W=35),
        Case("Tetrominoes, quick", B=16, H=35, W=35, channels_last=True, dtype=torch.bfloat16),
        Case("CLEVR6", B=16, K=7, H=128, W=128),
        Case("CLEVR6, channels last", B=16, K=7, H=128, W=128, channels_last=True),
    ),
    "cuda": (
        Case("Tetrominoes", B=64, H=35, W=35, channels_last=True),
        Case("Multi-dSprites", B=64, K=6, H=64, W=64, channels_last=True),
        Case("CLEVR6", B=64, K=7, H=128, W=128),
        Case("CLEVR6, channels last", B=64, K=7, H=128, W=128, channels_last=True),
        Case("CLEVR6, bfloat16", B=64, K=7, H=128, W=128, channels_last=True, dtype=torch.bfloat16),
    ),
    "toy": (Case("toy", B=2, H=7, W=9, channels_last=True),),
}


def allowed_error(truth: Tensor, eager: Tensor) -> float:
    """How far a result may lie from the `truth`, computed in float64 from the same stored inputs.

    Twice as far as `eager`, the literal formula computed in float32 and stored in the result's type; and 4 units in
    the last place of the largest value besides, since eager may be exact.
    """
    return twice_and_4_units(truth, eager)


#: The cases have an image to compare with.
FUNCTION = composition_error


def launch(
    way: str, B: int, K: int, C: int, H: int, W: int, dtype: torch.dtype, channels_last: bool, everything: bool = False
) -> None:
    """The error; with `everything` all results and all gradients."""
    kernels = implementation("compose", "triton")

    own, results = (partial(on_meta, dtype=x) for x in (dtype, arithmetic(dtype)))
    decoded, image = own(B, K, C + 1, H, W), results(B, C, H, W)
    if channels_last:
        decoded = own(B, K, H, W, C + 1).permute(0, 1, 4, 2, 3)
    if way == "forward":
        kernels._composition_forward(decoded, image, everything, everything)
    else:
        incoming = (results(B, C, H, W), results(B, K, H, W)) if everything else (None, None)
        kernels._composition_backward(*incoming, results(B), decoded, image, everything)


F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
#: Calls that are compiled for GPUs that are not here.
LAUNCHES: dict[str, Callable[[], None]] = {
    f"{name}, {way}": partial(launch, way, *arguments)
    for name, arguments in (
        ("Tetrominoes", (64, 4, 3, 35, 35, F32, True)),
        ("Tetrominoes bfloat16", (64, 4, 3, 35, 35, BF16, True)),
        ("CLEVR6 plain", (64, 7, 3, 128, 128, F32, False)),
        ("all results", (64, 7, 3, 128, 128, F32, True, True)),
        ("K24", (8, 24, 3, 64, 64, BF16, True)),
        ("float64", (8, 4, 3, 35, 35, F64, False)),
    )
    for way in ("forward", "backward")
}
