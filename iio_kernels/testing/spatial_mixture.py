"""What the spatial mixture is tested and measured on: sample inputs, the formula as printed, the error allowed, bytes
moved and FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from iio_kernels.runtime.backends import implementation
from iio_kernels.runtime.numerics import twice_and_4_units
from iio_kernels.testing.aot import arithmetic, on_meta
from iio_kernels.testing.tensors import random_like


@dataclass(frozen=True)
class Case:
    """A named call of `iio_kernels.spatial_mixture`: image (B, C, H, W), decoded (B, K, C + 1, H, W).

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
        """(image, decoded) and the keyword arguments, the same numbers on every device and in either layout.

        Half of the means lie within two sigma or so of the image, so that slots compete.
        """
        random = torch.Generator().manual_seed(seed)
        image = torch.rand(self.B, self.C, self.H, self.W, generator=random, dtype=torch.float64)
        decoded = torch.randn(self.B, self.K, self.C + 1, self.H, self.W, generator=random, dtype=torch.float64)
        near = torch.rand(self.B, self.K, 1, self.H, self.W, generator=random, dtype=torch.float64) < 0.5
        decoded[:, :, :-1] *= torch.where(near, 0.1, 0.5)
        decoded[:, :, :-1] += image.unsqueeze(1)
        decoded[:, :, -1] *= 2
        if self.channels_last:
            decoded = decoded.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        return (image.to(dtype).to(device), decoded.to(dtype).to(device)), dict(self.options)

    def bytes_moved(self, dtype: torch.dtype, backward: bool = False) -> int:
        """The least traffic: image (float32) and decoded read, and all results written in float32; with `backward` that
        of the backward pass alone, which reads them too, the gradients to three results, and writes decoded's."""
        decoded, image = self.K * (self.C + 1) * dtype.itemsize, 4 * self.C
        if backward:
            return self.B * self.H * self.W * (2 * decoded + image + 4 * (1 + 2 * self.K))
        return self.B * self.H * self.W * (decoded + image + 4 * (1 + 3 * self.K + self.K * (self.C + 1)))

    def flops(self, backward: bool = False) -> int:
        """Operations on slots and channels, an exponential or a logarithm counted as one.

        A pixel takes 3 K (C + 1) for the squared distances, three softmaxes of 4 K each, K + 1 logarithms with their
        sums, 4 K, and 2 K (C + 1) for the gradients. The backward pass takes distances and softmaxes too, then 8 K for
        the gradients to likelihoods and logits, and 2 C K for those to the means.
        """
        pixel = 3 * self.K * (self.C + 1) + 12 * self.K
        pixel += 8 * self.K + 2 * self.C * self.K if backward else 5 * self.K + 1 + 2 * self.K * (self.C + 1)
        return self.B * self.H * self.W * pixel


# --- the formula as printed -------------------------------------------------------------------------------
# Slow, plain, the yardstick: it shares nothing with the operation's implementation, and is not to.


def literal_spatial_mixture(image: Tensor, decoded: Tensor, sigma: float = 0.1) -> tuple[Tensor, ...]:
    """log p (B, H, W), masks, posterior and leave-one-out (B, K, H, W), and d(-log p), for which decoded is a leaf."""
    log_m = decoded[:, :, -1].log_softmax(1)
    normals = [Normal(slot[:, :-1], sigma, validate_args=False) for slot in decoded.unbind(1)]
    log_p_k = torch.stack([normal.log_prob(image).sum(1) for normal in normals], 1)
    joint, masks = log_m + log_p_k, log_m.exp()
    log_p, K = joint.logsumexp(1), decoded.shape[1]
    others = [joint[:, [j for j in range(K) if j != k]].logsumexp(1) for k in range(K)]
    leave_one_out = torch.stack(others, 1) - (1 - masks).log()
    (d_decoded,) = torch.autograd.grad(-log_p.sum(), decoded, retain_graph=True)
    return log_p, masks, log_p_k.softmax(1), leave_one_out.detach(), d_decoded


# --- what tests call --------------------------------------------------------------------------------------


#: What the results and gradients of a call are, in this order.
NAMES = ("log_likelihood", "masks", "posterior", "leave_one_out", "d_decoded", "dimage", "ddecoded")


def results(
    function: Callable[..., Sequence[Tensor]],
    image: Tensor,
    decoded: Tensor,
    incoming: Sequence[Tensor] | None = None,
    copy: bool = True,
    **options: Any,
) -> tuple[Tensor, ...]:
    """What `function` returns but for views of it, and the gradients to image and decoded from those that come to the
    first three, `incoming` or else random (fixed seed)."""
    leaves = [x.detach() for x in (image, decoded)]
    leaves = [x.clone(memory_format=torch.preserve_format) if copy else x for x in leaves]
    outputs = function(*(x.requires_grad_() for x in leaves), **options)[:5]
    incoming = random_like(*outputs[:3]) if incoming is None else incoming
    return *(x.detach() for x in outputs), *torch.autograd.grad(outputs[:3], leaves, incoming)


def literally(
    image: Tensor, decoded: Tensor, incoming: Sequence[Tensor] | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """`results` of the formula as printed."""
    return results(literal_spatial_mixture, image, decoded, incoming, **options)


# --- the samples -------------------------------------------------------------------------------------------

CASES = (
    Case("plain"),
    Case("channels last", channels_last=True),
    Case("two slots", K=2, channels_last=True),
    Case("seven slots", K=7),
    Case("many slots", B=1, K=24, H=5, W=7, channels_last=True),
    Case("wide", options={"sigma": 0.7}),
    Case("narrow", options={"sigma": 0.05}),
    Case("gray", C=1),
    Case("six channels, channels last", K=3, C=6, channels_last=True),
    Case("no images", B=0),
    Case("one pixel", H=1, W=1),
    Case("one column", H=67, W=1, channels_last=True),
    Case("whole blocks", K=3, H=16, W=16),
    Case("two chunks", B=1, K=2, H=35, W=35),
    Case("two chunks, channels last", B=1, K=2, H=35, W=35, channels_last=True),
)

#: The sizes in use, for benchmarks, with layout and dtype as decoders leave them; for a CPU in batches that it gets
#: through.
BENCHMARKS = {
    "cpu": (
        Case("Tetrominoes", B=32, H=35, W=35),
        Case("CLEVR", B=8, K=7, H=128, W=128),
        Case("CLEVR, channels last", B=8, K=7, H=128, W=128, channels_last=True),
    ),
    "cuda": (
        Case("Tetrominoes", B=32, H=35, W=35, channels_last=True),
        Case("Multi-dSprites", B=32, K=6, H=64, W=64, channels_last=True),
        Case("CLEVR", B=32, K=7, H=128, W=128),
        Case("CLEVR, channels last", B=32, K=7, H=128, W=128, channels_last=True),
        Case("CLEVR, bfloat16", B=32, K=7, H=128, W=128, channels_last=True, dtype=torch.bfloat16),
    ),
    "toy": (Case("toy", B=2, H=7, W=9, channels_last=True),),
}


def allowed_error(truth: Tensor, eager: Tensor) -> float:
    """How far a result may lie from the `truth`, computed in float64 from the same stored inputs.

    Twice as far as `eager`, the literal formula computed in float32 and stored in the result's type; and 4 units in
    the last place of the largest value besides, since eager may be exact.
    """
    return twice_and_4_units(truth, eager)


def launch(
    way: str, B: int, K: int, C: int, H: int, W: int, dtype: torch.dtype, channels_last: bool, everything: bool = True
) -> None:
    """With `everything` all results, or all gradients; otherwise the log-likelihood's."""
    kernels = implementation("spatial_mixture", "triton")

    own, results = (partial(on_meta, dtype=x) for x in (dtype, arithmetic(dtype)))
    decoded, image = own(B, K, C + 1, H, W), results(B, C, H, W)
    if channels_last:
        decoded = own(B, K, H, W, C + 1).permute(0, 1, 4, 2, 3)
    if way == "forward":
        kernels._mixture_forward(image, decoded, 0.1, everything)
    else:
        incoming = results(B, H, W), *(results(B, K, H, W) if everything else None for _ in range(2))
        kernels._mixture_backward(*incoming, image, decoded, 0.1, everything)


F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
#: Calls that are compiled for GPUs that are not here.
LAUNCHES: dict[str, Callable[[], None]] = {
    f"{name}, {way}": partial(launch, way, *arguments)
    for name, arguments in (
        ("Tetrominoes", (32, 4, 3, 35, 35, F32, True)),
        ("log-likelihood", (32, 4, 3, 35, 35, F32, True, False)),
        ("CLEVR plain", (32, 7, 3, 128, 128, F32, False)),
        ("CLEVR bfloat16", (32, 7, 3, 128, 128, BF16, True)),
        ("K24", (8, 24, 3, 64, 64, BF16, True)),
        ("float64", (8, 4, 3, 35, 35, F64, False)),
    )
    for way in ("forward", "backward")
}
