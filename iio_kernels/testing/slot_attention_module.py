"""What the Slot Attention module is tested and measured on: sample inputs, the error allowed, bytes moved and FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from iio_kernels.ops.slot_attention_module.api import SlotAttentionWeights, slot_attention_module
from iio_kernels.runtime.backends import implementation
from iio_kernels.runtime.numerics import twice_and_4_units
from iio_kernels.testing import tensors
from iio_kernels.testing.aot import arithmetic, on_meta


@dataclass(frozen=True)
class Case:
    """A named call of `iio_kernels.slot_attention_module`: x (B, N, Dx), slots (B, K, D), T iterations."""

    name: str
    B: int = 2
    N: int = 37
    K: int = 4
    Dx: int = 8
    D: int = 16
    H: int = 24
    Dk: int = 12
    T: int = 3
    options: dict[str, Any] = field(default_factory=dict)

    def make(
        self, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
    ) -> tuple[tuple[Tensor, Tensor, SlotAttentionWeights, int], dict[str, Any]]:
        """(x, slots, weights, T) and the keyword arguments, the same numbers on every device.

        x in `dtype`, all else in float32 at least, as a module under autocast has them.
        """
        random = torch.Generator().manual_seed(seed)
        wide = torch.promote_types(dtype, torch.float32)

        def randn(*shape: int, deviation: float = 1.0, mean: float = 0.0) -> Tensor:
            values = mean + deviation * torch.randn(shape, generator=random, dtype=torch.float64)
            return values.to(wide).to(device)

        def weight(out: int, into: int) -> Tensor:
            return randn(out, into, deviation=into**-0.5)

        x, slots, D = randn(self.B, self.N, self.Dx), randn(self.B, self.K, self.D), self.D
        weights = SlotAttentionWeights(
            norm_slots_weight=randn(D, deviation=0.3, mean=1.0), norm_slots_bias=randn(D, deviation=0.3),
            wq=weight(self.Dk, D), wk=weight(self.Dk, self.Dx), wv=weight(D, self.Dx),
            weight_ih=weight(3 * D, D), weight_hh=weight(3 * D, D),
            bias_ih=randn(3 * D, deviation=0.3), bias_hh=randn(3 * D, deviation=0.3),
            norm_mlp_weight=randn(D, deviation=0.3, mean=1.0), norm_mlp_bias=randn(D, deviation=0.3),
            w1=weight(self.H, D), b1=randn(self.H, deviation=0.3), w2=weight(D, self.H), b2=randn(D, deviation=0.3),
        )  # fmt: skip
        return (x.to(dtype), slots, weights, self.T), dict(self.options)

    def bytes_moved(self, dtype: torch.dtype, backward: bool = False) -> int:
        """The least traffic: x read once; the backward pass reads it too and writes its gradient."""
        return self.B * self.N * self.Dx * dtype.itemsize * (2 if backward else 1)

    def flops(self, backward: bool = False) -> int:
        """Operations of the matrix products alone.

        Those with the inputs are L and M, and backward L, dA, dp and both terms of dx; those with the maps are one
        each, and backward two, to what a map reads and to its weight.
        """
        inputs, maps = self.N * self.Dx, self.D * (4 * self.Dx + 3 * self.D + 2 * self.H)
        return 2 * self.B * self.T * self.K * ((5 if backward else 2) * inputs + (2 if backward else 1) * maps)


#: Normalisation of one feature divides 0 by it, and multiplies rounding errors.
LARGE_EPS = {"norm_eps": 0.1}

CASES = (
    Case("plain"),
    Case("one iteration", T=1),
    Case("seven iterations", B=1, N=17, T=7),
    Case("one slot", K=1),
    Case("seven slots", K=7, N=70),
    Case("sixteen slots", B=1, K=16, N=33),
    Case("one input", N=1),
    Case("one feature", Dx=1, D=1, H=1, Dk=1, options=LARGE_EPS),
    Case("one of all", B=1, N=1, K=1, Dx=1, D=1, H=1, Dk=1, T=1, options=LARGE_EPS),
    Case("odd widths", N=45, K=3, Dx=7, D=19, H=11, Dk=5),
    Case("whole vectors", N=64, Dx=32, D=32, H=64, Dk=32),
    Case("wide inputs", B=1, N=33, Dx=64, D=16),
    Case("wide slots", B=1, N=33, K=5, D=70, H=130),
    Case("many inputs", B=1, N=300, K=3),
    Case("no images", B=0),
    Case("no inputs", N=0),
    Case("options", options={"eps": 0.1, "norm_eps": 0.01, "scale": 1.7}),
    Case("zero eps", options={"eps": 0.0}),
)

# --- the formula as printed -------------------------------------------------------------------------------
# Slow, plain, the yardstick: it shares nothing with the operation's implementation, and is not to.


def literal_slot_attention_module(
    x: Tensor,
    slots: Tensor,
    weights: tuple[Tensor, ...],
    iterations: int,
    *,
    eps: float = 1e-8,
    norm_eps: float = 1e-5,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of Locatello et al. 2020, of torch's own layers: the slots and the last attention (B, K, N)."""
    g, b, wq, wk, wv, *gru, g_mlp, b_mlp, w1, b1, w2, b2 = weights
    D, scale = slots.shape[-1:], len(wq) ** -0.5 if scale is None else scale
    k, v = F.linear(x, wk), F.linear(x, wv)
    for _ in range(iterations):
        q = F.linear(F.layer_norm(slots, D, g, b, norm_eps), wq)
        attention = (k @ q.mT * scale).softmax(-1)
        W = attention + eps
        updates = (W / W.sum(1, keepdim=True)).mT @ v
        slots = torch.gru_cell(updates.flatten(0, 1), slots.flatten(0, 1), *gru).view_as(slots)
        slots = slots + F.linear(F.linear(F.layer_norm(slots, D, g_mlp, b_mlp, norm_eps), w1, b1).relu(), w2, b2)
    return slots, attention.mT


# --- what tests call --------------------------------------------------------------------------------------


#: The tensors of a call, and what the results and gradients are, in this order.
INPUTS = ("x", "slots", *SlotAttentionWeights._fields)
NAMES = ("slots out", "attention", *(f"d{name}" for name in INPUTS))

#: A call that is small enough to be differentiated number by number.
SMALL = Case("small", B=1, N=5, K=2, Dx=2, D=3, H=2, Dk=2, T=2)

#: x, slots, weights and T.
Arguments: TypeAlias = tuple[Tensor, Tensor, SlotAttentionWeights, int]


#: Drawn in float64, whatever the dtype.
random_like = partial(tensors.random_like, drawn_in=torch.float64)


def results(
    function: Callable[..., Sequence[Tensor]],
    x: Tensor,
    slots: Tensor,
    weights: Sequence[Tensor],
    T: int,
    incoming: Sequence[Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The slots, the attention, and the gradients to x, slots and each of the weights from those that come in,
    `incoming` or else random (fixed seed)."""
    leaves = [y.detach().requires_grad_() for y in (x, slots, *weights)]
    outputs = function(*leaves[:2], SlotAttentionWeights(*leaves[2:]), T, **options)
    incoming = random_like(*outputs) if incoming is None else incoming
    gradients = torch.autograd.grad(outputs, leaves, incoming, allow_unused=True, materialize_grads=True)
    return *(y.detach() for y in outputs), *gradients


def run(
    arguments: Arguments, backend: str, incoming: Sequence[Tensor] | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """What a backend makes of the arguments: see `results`."""
    return results(
        slot_attention_module, *arguments, incoming=incoming, return_attention=True, backend=backend, **options
    )


def literally(arguments: Arguments, incoming: Sequence[Tensor] | None = None, **options: Any) -> tuple[Tensor, ...]:
    """What the literal algorithm makes of the arguments: see `results`."""
    return results(literal_slot_attention_module, *arguments, incoming=incoming, **options)


def cast(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """All tensors in `dtype`."""
    x, slots, weights, T = arguments
    return x.to(dtype), slots.to(dtype), SlotAttentionWeights(*(w.to(dtype) for w in weights)), T


# --- what is measured -------------------------------------------------------------------------------------

#: The sizes in use, for benchmarks; for a CPU in batches that it gets through.
BENCHMARKS = {
    "cpu": (
        Case("Tetrominoes", B=64, N=35**2, Dx=32, D=64, H=128, Dk=64),
        Case("Tetrominoes, quick", B=16, N=35**2, Dx=64, D=64, H=128, Dk=64),
        Case("CLEVR6", B=8, N=128**2, K=7, Dx=64, D=64, H=128, Dk=64),
    ),
    "cuda": (
        Case("Tetrominoes", B=64, N=35**2, Dx=32, D=64, H=128, Dk=64),
        Case("Tetrominoes, quick", B=16, N=35**2, Dx=64, D=64, H=128, Dk=64),
        Case("CLEVR6", B=64, N=128**2, K=7, Dx=64, D=64, H=128, Dk=64),
    ),
    "toy": (Case("toy"),),
}


def allowed_error(truth: Tensor, eager: Tensor) -> float:
    """How far a result may lie from the `truth`, computed in float64 from the same stored inputs.

    Three times as far as `eager`, the literal algorithm computed in float32 and stored in the result's type, and 6
    units in the last place of the largest value: errors grow from one iteration to the next, here and there otherwise.
    And 16 float32 units of 1 besides, since some gradients are 0 but for rounding: that to norm_slots_bias, as what all
    queries have in common changes no softmax over slots.
    """
    return 1.5 * twice_and_4_units(truth, eager) + 16 * torch.finfo(torch.float32).eps


def launch(
    way: str, B: int, N: int, K: int, Dx: int, D: int, H: int, dtype: torch.dtype, attention: bool = False
) -> None:
    """Forward or backward, of three iterations."""
    kernels = implementation("slot_attention_module", "triton")
    from iio_kernels.ops.slot_attention_module.common import made_by_maps, on_tape, read_by_maps

    own, results = (partial(on_meta, dtype=x) for x in (dtype, arithmetic(dtype)))
    x, slots, made = own(B, N, Dx), results(B, K, D), made_by_maps(D, Dx, H)
    weights = [results(*shape) for shape in zip(made, read_by_maps(D, Dx, H), strict=True)]
    if way == "forward":
        kernels._iterations_forward(x, slots, weights, [results(width) for width in made], 3, 1e-8, 1e-5, attention)
    else:
        tape, dA = results(B, 3, K, sum(on_tape(D, Dx, H))), results(B, K, N) if attention else None
        kernels._iterations_backward(slots, dA, x, tape, weights, 1e-8)


F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
#: Calls that are compiled for GPUs that are not here.
LAUNCHES: dict[str, Callable[[], None]] = {
    f"{name}, {way}": partial(launch, way, *arguments)
    for name, arguments in (
        ("Tetrominoes", (64, 1225, 4, 32, 64, 128, F32)),
        ("Tetrominoes bfloat16", (64, 1225, 4, 32, 64, 128, BF16)),
        ("CLEVR6", (64, 16384, 7, 64, 64, 128, F32)),
        ("CLEVR6 bfloat16", (64, 16384, 7, 64, 64, 128, BF16)),
        ("K16 D256", (64, 1024, 16, 64, 256, 256, F32, True)),
        ("Tetrominoes with attention", (64, 1225, 4, 32, 64, 128, F32, True)),
        ("float64", (4, 300, 7, 32, 64, 128, F64)),
    )
    for way in ("forward", "backward")
}
