"""What slot attention is tested and measured on: sample inputs, the error allowed, bytes moved and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from iio_kernels.ops.slot_attention.api import slot_attention
from iio_kernels.runtime.backends import implementation
from iio_kernels.runtime.numerics import twice_and_4_units
from iio_kernels.testing.aot import arithmetic, on_meta
from iio_kernels.testing.tensors import random_like


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

# --- the formula as printed -------------------------------------------------------------------------------
# Slow, plain, the yardstick: it shares nothing with the operation's implementation, and is not to.


def literal_slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-8,
    eps_in: str = "weights",
    normalize: str = "mean",
    joint_heads: bool = False,
    slot_mask: Tensor | None = None,
    input_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """U (..., K, Dv) and A (..., K, N). An image at a time; what is masked is left out, not filled in."""
    batch, (K, Dk), N = q.shape[:-2], q.shape[-2:], k.shape[-2]
    scale = Dk**-0.5 if scale is None else scale
    slots = (torch.tensor(True) if slot_mask is None else slot_mask).to(q.device).expand(*batch, K)
    inputs = (torch.tensor(True) if input_mask is None else input_mask).to(q.device).expand(*batch, N)

    places, shares = [], []
    images = batch[:-1] if joint_heads else batch
    for image in product(*map(range, images)):
        heads = [(*image, h) for h in range(batch[-1])] if joint_heads else [image]
        for n in range(N):
            # Everything that competes for input n: the slots of all these heads.
            rivals = [(*head, s) for head in heads for s in range(K) if inputs[head][n] and slots[head][s]]
            if rivals:
                logits = torch.stack([scale * (q[rival] * k[rival[:-1]][n]).sum() for rival in rivals])
                places += [(*rival, n) for rival in rivals]
                shares.append(logits.softmax(0))
    A = q.new_zeros(*batch, K, N)
    if places:
        A = A.index_put(tuple(torch.tensor(places, device=q.device).T), torch.cat(shares))

    U = []
    for slot in product(*map(range, (*batch, K))):
        taking_part = inputs[slot[:-1]]
        weights, values = A[slot][taking_part], v[slot[:-1]][taking_part]
        if normalize == "mean":
            weights = weights + eps if eps_in == "weights" else weights
            total = weights.sum() + (eps if eps_in == "denominator" else 0)
            weights = weights * 0 if total == 0 else weights / total
        U.append((weights.unsqueeze(1) * values).sum(0))
    return torch.stack(U).view(*batch, K, -1) if U else v.new_zeros(*batch, K, v.shape[-1]), A


# --- what tests call --------------------------------------------------------------------------------------


#: What the results and gradients of a call are, in this order.
NAMES = ("U", "A", "dq", "dk", "dv")

#: Calls that are small enough to be differentiated number by number.
SMALL = (
    Case("weights", batch=(2,), K=3, N=4, Dk=2, Dv=3, options={"eps": 0.1}),
    Case("denominator", batch=(2,), K=3, N=4, Dk=2, Dv=3, options={"eps": 0.1, "eps_in": "denominator"}),
    Case("sum", batch=(2,), K=3, N=4, Dk=2, Dv=3, options={"normalize": "sum"}),
    Case("joint", batch=(2,), K=2, N=3, Dk=2, Dv=3, options={"joint_heads": True}, slots="some", inputs="some"),
)


def case_named(name: str) -> Case:
    """That of `CASES`."""
    return next(case for case in CASES if case.name == name)


def results(
    function: Callable[..., Sequence[Tensor]],
    tensors: Iterable[Tensor],
    incoming: Sequence[Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """U, A and the gradients to q, k, v; those to U and A are `incoming`, else random (fixed seed)."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    outputs = function(*leaves, **options)
    incoming = random_like(*outputs) if incoming is None else incoming
    # Of nothing at all (no images, everything masked) the literal formula has no graph.
    pairs = [(x, g) for x, g in zip(outputs, incoming, strict=True) if x.requires_grad]
    gradients: Sequence[Tensor] = [torch.zeros_like(x) for x in leaves]
    if pairs:
        gradients = torch.autograd.grad(
            [x for x, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True, materialize_grads=True
        )
    return *(x.detach() for x in outputs), *gradients


def run(
    tensors: Iterable[Tensor], backend: str, incoming: Sequence[Tensor] | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """What a backend makes of q, k and v: see `results`."""
    return results(slot_attention, tensors, incoming, backend=backend, return_attention=True, **options)


def from_inputs(
    case: Case, device: str, biases: bool = True, joint_heads: bool = False
) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """x, q, wk, bk, wv, bv and the options of a case, keys and values projected from inputs 6 wide."""
    (q, _, _), options = case.make(device=device)
    random = torch.Generator().manual_seed(4)
    heads = (case.batch[-1],) if joint_heads else ()
    shapes = [(*case.batch, case.N, 6), q.shape, (*heads, case.Dk, 6), (*heads, case.Dk), (*heads, case.Dv, 6)]
    shapes.append((*heads, case.Dv))
    x, _, wk, bk, wv, bv = (torch.randn(shape, generator=random, dtype=q.dtype).to(device) for shape in shapes)
    return (x, q, wk, bk if biases else None, wv, bv if biases else None), options


# --- what is measured -------------------------------------------------------------------------------------

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
