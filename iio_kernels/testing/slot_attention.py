"""What slot attention is tested and measured on: sample inputs, the error allowed, bytes moved and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from iio_kernels.runtime.backends import implementation
from iio_kernels.runtime.numerics import twice_and_4_units
from iio_kernels.testing.aot import arithmetic, on_meta


@dataclass(frozen=True)
class Case:
    """A named call of `iio_kernels.slot_attention`: q (*batch, K, Dk), k (*batch, N, Dk), v (*batch, N, Dv).

    `slots` and `inputs` say which of them take part: "all" (no mask), "some" (drawn at random, nothing at all
    in the first batch entry), "none", or "shared" (one random row, to be broadcast over the batch).
    """

    name: str
    batch: tuple[int, ...] = (2,)
    K: int = 4
    N: int = 37
    Dk: int = 16
    Dv: int = 16
    options: dict[str, Any] = field(default_factory=dict)
    slots: str = "all"
    inputs: str = "all"

    def make(
        self, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """(q, k, v) and the keyword arguments, the same numbers on every device."""
        random = torch.Generator().manual_seed(seed)
        shapes = (
            (*self.batch, self.K, self.Dk),
            (*self.batch, self.N, self.Dk),
            (*self.batch, self.N, self.Dv),
        )
        tensors = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
        masks = {
            name: _mask(kind, (*self.batch, size), random).to(device)
            for name, kind, size in (
                ("slot_mask", self.slots, self.K),
                ("input_mask", self.inputs, self.N),
            )
            if kind != "all"
        }
        q, k, v = (x.to(dtype).to(device) for x in tensors)
        return (q, k, v), {**self.options, **masks}

    def bytes_moved(self, dtype: torch.dtype, backward: bool = False) -> int:
        """The least traffic: q, k, v read and U written once; backward reads dU too and writes dq, dk, dv."""
        queries, keys, values = self.K * self.Dk, self.N * self.Dk, self.N * self.Dv
        elements = (queries + keys + values) * (2 if backward else 1) + self.K * self.Dv
        return math.prod(self.batch) * elements * dtype.itemsize

    def flops(self, backward: bool = False) -> int:
        """Operations of the matrix products alone: L and U; backward L, dA, dv, dk and dq."""
        width = 3 * self.Dk + 2 * self.Dv if backward else self.Dk + self.Dv
        return 2 * math.prod(self.batch) * self.N * self.K * width


def _mask(kind: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    if kind == "none":
        return torch.zeros(shape, dtype=torch.bool)
    if kind == "shared":
        return torch.rand(shape[-1], generator=random) < 0.7
    mask = torch.rand(shape, generator=random) < 0.7
    if len(shape) > 1:
        mask.flatten(0, -2)[:1] = False
    return mask


DENOMINATOR = {"eps_in": "denominator"}
SUM = {"normalize": "sum"}
JOINT = {"joint_heads": True}

CASES = (
    Case("plain"),
    Case("narrow values", K=7, Dk=8, Dv=5),
    Case("wide values", K=11, Dk=6, Dv=24),
    Case("wide features", N=9, K=7, Dk=192, Dv=192),
    Case("many inputs", batch=(1,), N=300, Dk=8, Dv=8),
    Case("no batch", batch=(), N=13),
    Case("two batch dimensions", batch=(2, 3), N=13),
    Case("one slot", K=1),
    Case("one input", N=1),
    Case("one feature", Dk=1, Dv=1),
    Case("one of all", batch=(1,), K=1, N=1, Dk=1, Dv=1),
    Case("no images", batch=(0,)),
    Case("no inputs", N=0),
    Case("no inputs, denominator", N=0, options=DENOMINATOR),
    Case("no inputs, sum", N=0, options=SUM),
    Case("no value features", Dv=0),
    Case("scale", options={"scale": 1.7}),
    Case("negative scale", options={"scale": -0.3}),
    Case("zero eps", options={"eps": 0}),
    Case("large eps", options={"eps": 0.1}),
    Case("denominator", options=DENOMINATOR),
    Case("denominator of one", options={**DENOMINATOR, "eps": 1.0}),
    Case("denominator, zero eps", options={**DENOMINATOR, "eps": 0.0}),
    Case("sum", options=SUM),
    Case("joint heads", batch=(2, 3), N=13, options=JOINT),
    Case("joint heads, no batch", batch=(3,), N=13, options=JOINT),
    Case("joint heads, one head", batch=(2, 1), N=13, options=JOINT),
    Case("joint heads, denominator", batch=(2, 3), N=13, options={**JOINT, **DENOMINATOR}),
    Case("joint heads, masks", batch=(2, 3), N=13, options=JOINT, slots="some", inputs="some"),
    Case("slot mask", slots="some"),
    Case("slot mask, large eps", options={"eps": 0.1}, slots="some"),
    Case("slot mask, zero eps", options={"eps": 0}, slots="some"),
    Case("slot mask, denominator", options={**DENOMINATOR, "eps": 1.0}, slots="some"),
    Case("slot mask, sum", options=SUM, slots="some"),
    Case("shared slot mask", slots="shared"),
    Case("no slot", slots="none"),
    Case("no slot, zero eps", options={"eps": 0.0}, slots="none"),
    Case("input mask", inputs="some"),
    Case("input mask, large eps", options={"eps": 0.1}, inputs="some"),
    Case("input mask, denominator", options={**DENOMINATOR, "eps": 1.0}, inputs="some"),
    Case("input mask, sum", options=SUM, inputs="some"),
    Case("shared input mask", batch=(2, 3), N=13, inputs="shared"),
    Case("no input", inputs="none"),
    Case("both masks", options={"eps": 0.1}, slots="some", inputs="some"),
)

#: The sizes in use, for benchmarks; for a CPU in batches that it gets through. "From inputs", Dv is the width of x.
BENCHMARKS = {
    "cpu": (
        Case("Tetrominoes", batch=(64,), N=35**2, Dk=64, Dv=64),
        Case("CLEVR6", batch=(8,), K=7, N=128**2, Dk=64, Dv=64),
        Case("DINOSAUR", batch=(32,), K=7, N=28**2, Dk=256, Dv=256),
    ),
    "cpu, from inputs": (
        Case("Tetrominoes", batch=(64,), N=35**2, Dk=64, Dv=32),
        Case("DINOSAUR", batch=(32,), K=7, N=28**2, Dk=256, Dv=256),
    ),
    "cuda": (
        Case("Tetrominoes", batch=(64,), N=35**2, Dk=64, Dv=64),
        Case("Multi-dSprites", batch=(64,), K=6, N=64**2, Dk=64, Dv=64),
        Case("CLEVR6", batch=(64,), K=7, N=128**2, Dk=64, Dv=64),
        Case("set prediction", batch=(512,), K=10, N=32**2, Dk=64, Dv=64),
        Case("DINOSAUR", batch=(64,), K=7, N=28**2, Dk=256, Dv=256),
        Case("SAVi", batch=(64,), K=24, N=64**2, Dk=192, Dv=192),
    ),
    "cuda, from inputs": (
        Case("Tetrominoes", batch=(64,), N=35**2, Dk=64, Dv=32),
        Case("CLEVR6", batch=(64,), K=7, N=128**2, Dk=64, Dv=64),
        Case("DINOSAUR", batch=(64,), K=7, N=28**2, Dk=256, Dv=256),
    ),
    "toy": (Case("toy", batch=(2,), N=45, Dk=16, Dv=16),),
    "toy, from inputs": (Case("toy", batch=(2,), N=45, Dk=16, Dv=8),),
}


def allowed_error(truth: Tensor, eager: Tensor) -> float:
    """How far a result may lie from the `truth`, computed in float64 from the same stored inputs.

    Twice as far as `eager`, the formula in plain PyTorch computed in the storage type throughout, and 4 units
    in the last place of the largest value besides, since eager may be exact. An eager result that
    overflowed or divided by an underflowed eps excuses nothing.
    """
    return twice_and_4_units(truth, eager)


def launch(
    way: str, batch: int, K: int, N: int, D: int, dtype: torch.dtype, heads: int = 1, everything: bool = False,
    values: bool = True,
) -> None:  # fmt: skip
    """With `everything`, with each of its options, heads joint."""
    kernels = implementation("slot_attention", "triton")

    own, sums = (partial(on_meta, batch, heads, dtype=x) for x in (dtype, arithmetic(dtype)))
    options = sums(K), own(K).bool(), own(N).bool()
    inputs = own(K, D), own(N, D), own(N, D) if values else None, *(options if everything else (None,) * 3)
    arguments = D**-0.5, 1e-8, True, True, everything
    if way == "forward":
        kernels.slot_attention_forward(*inputs, *arguments, everything)
    else:
        dS, dA = (sums(K), own(K, N)) if everything else (None, None)
        kernels.slot_attention_backward(sums(K, D), dS, dA, *inputs, sums(K, D), sums(K), *arguments)


F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
#: Every row of the table of settings at least once, and the sizes in use.
LAUNCHED: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "Tetrominoes": ((64, 4, 1225, 64, F32), {}),
    "CLEVR6": ((64, 7, 16384, 64, F32), {}),
    "set prediction": ((512, 10, 1024, 64, F32), {}),
    "DINOSAUR float32": ((64, 7, 784, 256, F32), {}),
    "SAVi": ((64, 24, 4096, 192, F32), {}),
    "K64 D1024": ((64, 64, 1024, 1024, F32), {}),
    "Tetrominoes bfloat16": ((64, 4, 1225, 64, BF16), {}),
    "DINOSAUR": ((64, 7, 784, 256, BF16), {}),
    "SAVi bfloat16": ((64, 24, 4096, 192, BF16), {}),
    "K10 D1024 bfloat16": ((64, 10, 1024, 1024, BF16), {}),
    "K64 D128 bfloat16": ((64, 64, 1024, 128, BF16), {}),
    "DINOSAUR float16": ((64, 7, 784, 256, F16), {}),
    "SAVi float16": ((64, 24, 4096, 192, F16), {}),
    "K64 D128 float16": ((64, 64, 1024, 128, F16), {}),
    "float64": ((4, 7, 300, 64, F64), {}),
    "all options": ((16, 7, 1024, 64, F32), {"heads": 4, "everything": True}),
    "all options bfloat16": ((16, 24, 1024, 192, BF16), {"heads": 4, "everything": True}),
    "from inputs": ((64, 4, 1225, 32, F32), {"values": False}),
}
#: Calls that are compiled for GPUs that are not here.
LAUNCHES: dict[str, Callable[[], None]] = {
    f"{name}, {way}": partial(launch, way, *sizes, **options)
    for name, (sizes, options) in LAUNCHED.items()
    for way in ("forward", "backward")
}
