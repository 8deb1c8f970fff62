"""The whole Slot Attention module: all of its iterations in one operator."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from iio_kernels.ops.slot_attention.api import slot_attention_from_inputs
from iio_kernels.ops.slot_attention_module import reference
from iio_kernels.ops.slot_attention_module.common import Maps, Operands, Options, gradients_to_maps
from iio_kernels.runtime import backends, checks
from iio_kernels.runtime.autograd import differentiable_once, signature_kept, without_autocast
from iio_kernels.runtime.numerics import arithmetic_dtype, cast
from iio_kernels.runtime.options import Backend


class SlotAttentionWeights(NamedTuple):
    """What a Slot Attention module has learnt, for slots of width D and inputs of width Dx.

    The layers' own tensors, as torch stores them: `Linear` without biases for queries, keys and values, `GRUCell`, and
    `LayerNorm`, `Linear`, `ReLU`, `Linear` for the MLP, whose hidden width is H.
    """

    norm_slots_weight: Tensor  # (D,)
    norm_slots_bias: Tensor  # (D,)
    wq: Tensor  # (Dk, D)
    wk: Tensor  # (Dk, Dx)
    wv: Tensor  # (D, Dx)
    weight_ih: Tensor  # (3 D, D): the GRU's, its gates in torch's order, r, z, n
    weight_hh: Tensor  # (3 D, D)
    bias_ih: Tensor  # (3 D,)
    bias_hh: Tensor  # (3 D,)
    norm_mlp_weight: Tensor  # (D,)
    norm_mlp_bias: Tensor  # (D,)
    w1: Tensor  # (H, D)
    b1: Tensor  # (H,)
    w2: Tensor  # (D, H)
    b2: Tensor  # (D,)


@overload
def slot_attention_module(
    x: Tensor, slots: Tensor, weights: SlotAttentionWeights, iterations: int, *, eps: float = ...,
    norm_eps: float = ..., scale: float | None = ..., return_attention: Literal[False] = ..., backend: Backend = ...,
) -> Tensor: ...  # fmt: skip
@overload
def slot_attention_module(
    x: Tensor, slots: Tensor, weights: SlotAttentionWeights, iterations: int, *, eps: float = ...,
    norm_eps: float = ..., scale: float | None = ..., return_attention: Literal[True], backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def slot_attention_module(
    x: Tensor, slots: Tensor, weights: SlotAttentionWeights, iterations: int, *, eps: float = ...,
    norm_eps: float = ..., scale: float | None = ..., return_attention: bool, backend: Backend = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def slot_attention_module(
    x: Tensor,
    slots: Tensor,
    weights: SlotAttentionWeights,
    iterations: int,
    *,
    eps: float = 1e-8,
    norm_eps: float = 1e-5,
    scale: float | None = None,
    return_attention: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """All iterations of Slot Attention: attention, GRU and residual MLP, without ever making keys or values.

        for each of `iterations`:
            q = norm_slots(slots) @ wq.mT
            A = softmax over slots of scale * q @ (x @ wk.mT).mT
            W = (A + eps) / sum over inputs of (A + eps)
            updates = W @ (x @ wv.mT)
            h = GRU(updates, slots)
            slots = h + w2 @ relu(w1 @ norm_mlp(h) + b1) + b2

    What stands between the slots and x, `wk^T wq`, and between the means of x and the GRU, `weight_ih wv`, is
    multiplied once, as are the weights and biases of both normalisations with what follows them. An iteration then
    reads x alone.

    Args:
        x: inputs, `(B, N, Dx)`, normalised already where the module normalises them. Any strides.
        slots: initial slots, `(B, K, D)`.
        weights: what is learnt, a `SlotAttentionWeights`.
        iterations: T >= 1.
        eps: small number >= 0 that keeps the mean defined, added to every weight. 0 is allowed.
        norm_eps: small number > 0 added to the variances of both normalisations.
        scale: factor on the logits, by default `Dk ** -0.5`.
        return_attention: also return A of the last iteration.
        backend: "auto" takes the fastest that serves the tensors' device; see `iio_kernels.backends()`. On a GPU it
            takes the single launch of `triton` for sizes that suit it, see `suits_one_launch`, and for others
            `slot_attention_from_inputs` and torch's own layers in turn.

    Returns:
        The slots `(B, K, D)` after the last iteration, in slots' dtype; with `return_attention` the pair slots, A, with
        A `(B, K, N)` before eps, differentiable too and in at least float32. Arithmetic is at least float32 whatever
        the storage type or autocast, and each gradient has its input's dtype, that of each of the weights included.

    Edge cases: a slot whose normaliser is exactly 0 (no inputs at all, or no attention and eps = 0) has updates of 0
    with zero gradient. B and N may be 0. Values are never inspected, so a NaN or an infinity travels into the results
    of its image, and no call waits for the device.

    Raises:
        TypeError: an argument is not a floating-point tensor, or an option has the wrong type.
        ValueError: shapes or devices do not match, an option has a value that does not exist, or the sizes are beyond
            those of a backend asked for by name.
        RuntimeError: the backend asked for by name cannot be used on this machine.

    Complexity: O(B T K (N Dx + D (Dx + D + H))) operations. The least traffic is x read once, which the caches then
    hold for all iterations if an image's inputs fit, and backward once more, with its gradient written once. For the
    backward pass some `7 D + 2 Dx + H` numbers an image, iteration and slot are kept, and nothing of size N. An image
    is one task, forward and backward: no more cores, or multiprocessors, have work than there are images.

    Source: Locatello et al. 2020, "Object-Centric Learning with Slot Attention", algorithm 1, reassociated.

    Example:
        >>> x, slots = torch.randn(8, 1225, 32), torch.randn(8, 4, 64)
        >>> gru, norm = torch.nn.GRUCell(64, 64), torch.nn.LayerNorm(64)
        >>> wq, wk, wv, w1, w2 = (torch.randn(s) / 8 for s in ((64, 64), (64, 32), (64, 32), (128, 64), (64, 128)))
        >>> weights = SlotAttentionWeights(
        ...     norm.weight, norm.bias, wq, wk, wv, gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh,
        ...     norm.weight, norm.bias, w1, torch.zeros(128), w2, torch.zeros(64))
        >>> slot_attention_module(x, slots, weights, 3).shape
        torch.Size([8, 4, 64])
    """
    weights = _check(x, slots, weights)
    options = Options(
        iterations=checks.integer("iterations", iterations, at_least=1),
        eps=checks.number("eps", eps, at_least=0),
        norm_eps=checks.number("norm_eps", norm_eps, above=0),
    )
    scale = len(weights.wq) ** -0.5 if scale is None else checks.number("scale", scale)
    checks.flag("return_attention", return_attention)
    device = checks.same_device(x=x, slots=slots, **weights._asdict())
    name = backends.choose("slot_attention_module", backend, device)
    if backend == "triton" and not fits_triton(x, slots, weights):
        raise ValueError(
            f"backend: 'triton' has no kernels for {slots.shape[1]} slots and features of "
            f"{slots.shape[2]}, {x.shape[2]} and {len(weights.w1)}: expected one of 'auto', 'reference'"
        )
    A: Tensor | None
    with without_autocast(device):
        dtype = arithmetic_dtype(x, slots, *weights)
        s, weights = slots.to(dtype), SlotAttentionWeights(*(w.to(dtype) for w in weights))
        if name == "triton" and backend == "auto" and not suits_one_launch(x, slots, weights):
            s, A = _one_by_one(x, s, weights, scale, options)
        else:
            s, A, _ = _iterate(Operands(x, s, _maps(weights, scale)), options, return_attention, name)
    s = cast(s, slots.dtype)
    return (s, A) if return_attention and A is not None else s


@signature_kept
class IterationsFunction(torch.autograd.Function):
    """The autograd Function under `slot_attention_module`: one backend's `forward` and `backward`.

    `IterationsFunction.apply(x, slots, iterations, eps, norm_eps, return_attention, backend, *maps)` returns the slots,
    A or None, and the tape, which is not differentiable. slots and the `Maps` of common.py are in the dtype of the
    arithmetic. It checks nothing: call `slot_attention_module`. It differentiates once; for second derivatives call
    that with `backend="reference"`, which plain autograd differentiates any number of times.
    """

    @staticmethod
    def forward(
        x: Tensor, slots: Tensor, iterations: int, eps: float, norm_eps: float, return_attention: bool, backend: str,
        wp: Tensor, wi: Tensor, wj: Tensor, w1: Tensor, w2: Tensor,
        bp: Tensor, bi: Tensor, bj: Tensor, b1: Tensor, b2: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        # Named one by one: without gradients, torch.compile counts the parameters to tell whether a context is wanted.
        kernels = backends.implementation("slot_attention_module", backend)
        operands = Operands(x, slots, Maps(wp, wi, wj, w1, w2, bp, bi, bj, b1, b2))
        return kernels.forward(operands, Options(iterations, eps, norm_eps), return_attention)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None, Tensor]) -> None:
        x, slots, *options, _, ctx.backend = inputs[:7]
        maps = inputs[7:]
        ctx.options = Options(*options)
        *_, tape = output
        ctx.mark_non_differentiable(tape)
        # Some are for `differentiable_once` alone: gradients depend on them through the tape.
        ctx.save_for_backward(tape, x, slots, *maps)
        ctx.set_materialize_grads(False)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, ds: Tensor | None, dA: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        tape, x, slots, *maps = ctx.saved_tensors
        if ds is None:
            ds = slots.new_zeros(()).expand(slots.shape)
        operands = Operands(x, slots, Maps(*maps))
        kernels = backends.implementation("slot_attention_module", ctx.backend)
        dx, ds, made = kernels.backward(ds, dA, operands, tape, ctx.options)
        return dx, ds, *(None,) * 5, *gradients_to_maps(tape, made, operands)


def _iterate(
    operands: Operands, options: Options, return_attention: bool, backend: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`IterationsFunction.apply`, but the reference is differentiated by autograd itself, any number of times."""
    if backend == "reference":
        return reference.forward(operands, options, return_attention)
    x, slots, maps = operands
    return IterationsFunction.apply(x, slots, *options, return_attention, backend, *maps)


def _maps(weights: SlotAttentionWeights, scale: float) -> Maps:
    """The module's linear maps, those that follow each other multiplied."""
    w = weights
    from_slots = scale * w.wk.mT @ w.wq
    return Maps(
        wp=from_slots * w.norm_slots_weight, bp=from_slots @ w.norm_slots_bias,
        wi=w.weight_ih @ w.wv, bi=w.bias_ih,
        wj=w.weight_hh, bj=w.bias_hh,
        w1=w.w1 * w.norm_mlp_weight, b1=w.b1 + w.w1 @ w.norm_mlp_bias,
        w2=w.w2, b2=w.b2,
    )  # fmt: skip


#: What a program of the Triton kernels has registers for: so many slots, inputs as wide, and slots and MLP. And the
#: bytes of an image's inputs beyond which a program for each image is too little for a GPU, whose multiprocessors then
#: better share an image, as they do in `slot_attention_from_inputs`.
MOST_SLOTS, WIDEST_INPUTS, WIDEST_SLOTS, MOST_BYTES = 16, 64, 256, 256 << 10


def fits_triton(x: Tensor, slots: Tensor, weights: SlotAttentionWeights) -> bool:
    """Whether there are Triton kernels for sizes such as these."""
    _, K, D = slots.shape
    return K <= MOST_SLOTS and x.shape[2] <= WIDEST_INPUTS and max(D, len(weights.w1)) <= WIDEST_SLOTS


def suits_one_launch(x: Tensor, slots: Tensor, weights: SlotAttentionWeights) -> bool:
    """Whether "auto" takes one launch for all iterations on a GPU: there are kernels, and images are small enough."""
    return fits_triton(x, slots, weights) and x.shape[1] * x.shape[2] * x.element_size() <= MOST_BYTES


def _one_by_one(
    x: Tensor, slots: Tensor, weights: SlotAttentionWeights, scale: float, options: Options
) -> tuple[Tensor, Tensor]:
    """The slots and the last attention, of an operator for each step; all but x in the dtype of the arithmetic."""
    w, D = weights, slots.shape[-1:]
    x = x.to(slots.dtype)
    for _ in range(options.iterations):
        q = F.linear(F.layer_norm(slots, D, w.norm_slots_weight, w.norm_slots_bias, options.norm_eps), w.wq)
        updates, A = slot_attention_from_inputs(
            x, q, w.wk, None, w.wv, None, scale=scale, eps=options.eps, return_attention=True
        )
        gates = w.weight_ih, w.weight_hh, w.bias_ih, w.bias_hh
        h = torch.gru_cell(updates.flatten(0, 1), slots.flatten(0, 1), *gates).view_as(slots)
        h_norm = F.layer_norm(h, D, w.norm_mlp_weight, w.norm_mlp_bias, options.norm_eps)
        slots = h + F.linear(F.linear(h_norm, w.w1, w.b1).relu(), w.w2, w.b2)
    return slots, A


def _check(x: Tensor, slots: Tensor, weights: SlotAttentionWeights) -> SlotAttentionWeights:
    """Check the tensors; return the weights by their names."""
    checks.tensor("x", x, "(B, N, Dx)")
    checks.tensor("slots", slots, "(B, K, D)")
    (B, _, Dx), (_, K, D) = x.shape, slots.shape
    if Dx == 0:
        raise ValueError(f"x: expected at least one feature, got shape {tuple(x.shape)}")
    if K == 0 or D == 0:
        raise ValueError(f"slots: expected at least one slot and one feature, got shape {tuple(slots.shape)}")
    if len(slots) != B:
        raise ValueError(f"slots: expected shape ({B}, K, D) to match x {tuple(x.shape)}, got {tuple(slots.shape)}")
    names = SlotAttentionWeights._fields
    if not isinstance(weights, tuple) or len(weights) != len(names):
        got = type(weights).__name__ + (f" of {len(weights)}" if isinstance(weights, (tuple, list)) else "")
        raise TypeError(f"weights: expected a SlotAttentionWeights, {len(names)} tensors, got {got}")
    weights = SlotAttentionWeights(*weights)
    Dk, H = (len(checks.tensor(f"weights.{name}", getattr(weights, name), "(out, in)")) for name in ("wq", "w1"))
    if Dk == 0 or H == 0:
        raise ValueError(f"weights.{'wq' if Dk == 0 else 'w1'}: expected at least one feature, got none")
    shapes = {"wq": (Dk, D), "wk": (Dk, Dx), "wv": (D, Dx), "w1": (H, D), "b1": (H,), "w2": (D, H)}
    shapes |= dict.fromkeys(("weight_ih", "weight_hh"), (3 * D, D)) | dict.fromkeys(("bias_ih", "bias_hh"), (3 * D,))
    for name, weight in zip(names, weights, strict=True):
        shape = shapes.get(name, (D,))
        checks.tensor(f"weights.{name}", weight, "(out, in)" if len(shape) == 2 else "(out,)", min_dims=len(shape))
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"weights.{name}: expected shape {shape} to match x {tuple(x.shape)} and slots {tuple(slots.shape)}, "
                f"got {tuple(weight.shape)}"
            )
    return weights
