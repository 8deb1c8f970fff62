"""What the broadcast convolution is tested and measured on: sample inputs, the error allowed, bytes moved and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iio_kernels.ops.broadcast_conv2d.api import broadcast_conv2d
from iio_kernels.ops.broadcast_conv2d.common import classes
from iio_kernels.runtime.backends import implementation
from iio_kernels.runtime.numerics import twice_and_4_units
from iio_kernels.testing import tensors
from iio_kernels.testing.aot import arithmetic, on_meta


@dataclass(frozen=True)
class Case:
    """A named call of `iio_kernels.broadcast_conv2d`: z (*batch, D), a kernel (kh, kw) of O channels, a grid `size`."""

    name: str
    batch: tuple[int, ...] = (2, 3)
    D: int = 6
    O: int = 8
    size: tuple[int, int] = (9, 7)
    kernel: tuple[int, int] = (5, 5)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (2, 2)
    output_padding: tuple[int, int] = (0, 0)
    transposed: bool = False
    relu: bool = True
    dtype: torch.dtype = torch.float32  # in benchmarks

    @property
    def axes(self) -> list[tuple[int, int, int, int, int, bool]]:
        """For rows and columns: the grid's and the result's size, taps, stride, padding, transposed."""
        return [
            (
                n,
                (n - 1) * s - 2 * p + k + more if self.transposed else (n + 2 * p - k) // s + 1,
                k,
                s,
                p,
                self.transposed,
            )
            for n, k, s, p, more in zip(
                self.size, self.kernel, self.stride, self.padding, self.output_padding, strict=True
            )
        ]

    @property
    def result(self) -> tuple[int, int, int]:
        """(O, H', W')"""
        return self.O, self.axes[0][1], self.axes[1][1]

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments."""
        geometry = {"size": self.size, "stride": self.stride, "padding": self.padding}
        return geometry | {"transposed": self.transposed, "relu": self.relu}

    def make(
        self, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """(z, weight, position_map) and the keyword arguments, the same numbers on every device."""
        random = torch.Generator().manual_seed(seed)
        channels = (self.D, self.O) if self.transposed else (self.O, self.D)
        shapes = (*self.batch, self.D), (*channels, *self.kernel), self.result
        z, weight, position_map = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)
        weight /= math.sqrt(self.D * math.prod(self.kernel))
        z, weight, position_map = (x.to(dtype).to(device) for x in (z, weight, position_map))
        return (z, weight, position_map), self.options

    def bytes_moved(self, dtype: torch.dtype, backward: bool = False) -> int:
        """The least traffic: the result written; with `backward` that of the backward pass alone, its gradient read."""
        return math.prod(self.batch) * math.prod(self.result) * dtype.itemsize

    def flops(self, backward: bool = False) -> int:
        """Multiply-adds of z with the sums of taps, as two, and an addition and the ReLU at each pixel; backwards two
        products, that addition again and two sums."""
        M, kinds = math.prod(self.batch), math.prod(sum(classes(*axis)) for axis in self.axes)
        product, pixels = 2 * M * self.D * self.O * kinds, M * math.prod(self.result)
        return 2 * product + 4 * pixels if backward else product + 2 * pixels


CASES = (
    Case("plain"),
    Case("no ReLU", relu=False),
    Case("one kernel tap", kernel=(1, 1), padding=(0, 0)),
    Case("no padding", padding=(0, 0)),
    Case("much padding", kernel=(3, 2), padding=(7, 4)),
    Case("even kernel", kernel=(4, 2), padding=(1, 1)),
    Case("kernel larger than the grid", size=(2, 3), kernel=(7, 5), padding=(3, 2)),
    Case("stride 2", stride=(2, 2)),
    Case("stride 3 and 2", size=(11, 12), stride=(3, 2), kernel=(4, 3), padding=(1, 0)),
    Case("strides past the kernel", size=(13, 10), stride=(3, 4), kernel=(2, 3), padding=(2, 1)),
    Case("transposed", size=(6, 5), stride=(2, 2), output_padding=(1, 1), transposed=True),
    Case("transposed, no output padding", size=(6, 5), stride=(2, 2), transposed=True, relu=False),
    Case("transposed, stride 1", transposed=True),
    Case("transposed, stride 3 and 2", (3,), size=(4, 5), kernel=(4, 3), stride=(3, 2), padding=(0, 1), transposed=True,
         output_padding=(2, 0)),
    Case("transposed, stride past the kernel", size=(3, 4), kernel=(2, 1), stride=(3, 2), padding=(0, 0),
         transposed=True),
    Case("transposed, one pixel", size=(1, 1), stride=(2, 2), transposed=True, padding=(0, 2), output_padding=(0, 1)),
    Case("no batch", ()),
    Case("no slots", (2, 0)),
    Case("one of all", (1,), D=1, O=1, size=(1, 1), kernel=(1, 1), padding=(0, 0)),
    Case("one channel", O=1),
    Case("odd channels", D=1, O=21),
    Case("many channels", (2,), O=67, size=(5, 6), kernel=(3, 3), padding=(1, 1)),
    Case("several chunks of images", (19,), O=16),
    Case("one row", size=(1, 40)),
    Case("one column", size=(40, 1)),
)  # fmt: skip

# --- the formula as printed -------------------------------------------------------------------------------
# Slow, plain, the yardstick: it shares nothing with the operation's implementation, and is not to.


def literal_broadcast_conv2d(
    z: Tensor,
    weight: Tensor,
    position_map: Tensor,
    size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    transposed: bool = False,
    relu: bool = False,
) -> Tensor:
    """(..., O, H', W'): z at every pixel of the grid, convolved there."""
    grid = z.reshape(-1, z.shape[-1], 1, 1).expand(-1, -1, *size)
    if transposed:
        sizes = zip(position_map.shape[1:], size, stride, padding, weight.shape[2:], strict=True)
        over = [out - ((n - 1) * s - 2 * p + k) for out, n, s, p, k in sizes]
        convolved = F.conv_transpose2d(grid, weight, None, stride, padding, over)
    else:
        convolved = F.conv2d(grid, weight, None, stride, padding)
    out = convolved + position_map
    return (out.relu() if relu else out).view(*z.shape[:-1], *position_map.shape)


# --- what tests call --------------------------------------------------------------------------------------


#: What the results and gradients of a call are, in this order.
NAMES = ("out", "dz", "dweight", "dposition_map")

#: A decoder's layer that doubles the size of the grid.
STRIDED_CONV = Case("transposed", size=(6, 5), stride=(2, 2), output_padding=(1, 1), transposed=True)


def random_like(x: Tensor) -> Tensor:
    """Random numbers (fixed seed) in x's shape and dtype."""
    return tensors.random_like(x)[0]


def results(
    function: Callable[..., Tensor], tensors: Iterable[Tensor], incoming: Tensor | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """What `function` returns, and the gradients to its tensors from the one that comes in, `incoming` or else random
    (fixed seed)."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    out = function(*leaves, **options)
    incoming = random_like(out) if incoming is None else incoming
    return out.detach(), *torch.autograd.grad(out, leaves, incoming)


def run(tensors: Iterable[Tensor], backend: str, incoming: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
    """What a backend makes of the tensors: see `results`."""
    return results(broadcast_conv2d, tensors, incoming, backend=backend, **options)


def literally(tensors: Iterable[Tensor], incoming: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
    """What literally convolving the grid makes of the tensors: see `results`."""
    return results(literal_broadcast_conv2d, tensors, incoming, **options)


# --- what is measured -------------------------------------------------------------------------------------

#: The sizes in use, for benchmarks: all slots of a batch.
BENCHMARKS = {
    "cpu": (
        Case("Tetrominoes", (256,), D=64, O=32, size=(35, 35)),
        Case("Tetrominoes, quick", (64,), D=64, O=32, size=(35, 35), dtype=torch.bfloat16),
        Case("CLEVR6", (112,), D=64, O=64, size=(8, 8), stride=(2, 2), output_padding=(1, 1), transposed=True),
    ),
    "cuda": (
        Case("Tetrominoes", (256,), D=64, O=32, size=(35, 35)),
        Case("Tetrominoes, bfloat16", (256,), D=64, O=32, size=(35, 35), dtype=torch.bfloat16),
        Case("Multi-dSprites", (384,), D=64, O=32, size=(64, 64)),
        Case("CLEVR6", (448,), D=64, O=64, size=(8, 8), stride=(2, 2), output_padding=(1, 1), transposed=True),
    ),
    "toy": (Case("toy", (3,), size=(7, 9)),),
}


def allowed_error(truth: Tensor, eager: Tensor) -> float:
    """How far a result may lie from the `truth`, computed in float64 from the same stored inputs.

    Twice as far as `eager`, the literal formula computed in float32 and stored in the result's type; and 4 units in
    the last place of the largest value besides, since eager may be exact.
    """
    return twice_and_4_units(truth, eager)


def launch(
    way: str, M: int, H: int, W: int, O: int, rows: list[int], columns: list[int], dtype: torch.dtype, relu: bool = True
) -> None:
    """Forward or backward, of M images."""
    kernels = implementation("broadcast_conv2d", "triton")

    sums = partial(on_meta, dtype=arithmetic(dtype))
    inputs = sums(M, sum(rows), sum(columns), O), sums(H, W, O)
    if way == "forward":
        kernels._broadcast_forward(*inputs, rows, columns, relu, dtype)
    else:
        kernels._broadcast_backward(on_meta(M, H, W, O, dtype=dtype), *inputs, rows, columns, relu)


F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SAME, TRANSPOSED = [2, 1, 2], [1, 2, 2]  # classes of 5 taps: stride 1, and a transposed convolution of stride 2
#: Calls that are compiled for GPUs that are not here.
LAUNCHES: dict[str, Callable[[], None]] = {
    f"{name}, {way}": partial(launch, way, *arguments)
    for name, arguments in (
        ("Tetrominoes", (256, 35, 35, 32, SAME, SAME, F32)),
        ("Tetrominoes bfloat16", (256, 35, 35, 32, SAME, SAME, BF16)),
        ("Tetrominoes float16", (256, 35, 35, 32, SAME, SAME, F16)),
        ("no ReLU", (256, 35, 35, 32, SAME, SAME, F32, False)),
        ("CLEVR6", (448, 16, 16, 64, TRANSPOSED, TRANSPOSED, F32)),
        ("CLEVR6 bfloat16", (448, 16, 16, 64, TRANSPOSED, TRANSPOSED, BF16)),
        ("IODINE", (448, 128, 128, 64, SAME, SAME, F32)),
        ("float64", (256, 35, 35, 32, SAME, SAME, F64)),
    )
    for way in ("forward", "backward")
}
