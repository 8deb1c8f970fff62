"""Slot attention: softmax over slots fused with the weighted mean over inputs."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from iio_kernels.ops.slot_attention import reference
from iio_kernels.ops.slot_attention.common import InputOperands, Operands, Options
from iio_kernels.runtime import backends, checks
from iio_kernels.runtime.autograd import differentiable_once, signature_kept, without_autocast
from iio_kernels.runtime.numerics import arithmetic_dtype, divide
from iio_kernels.runtime.options import Backend, EpsIn, Normalize


@overload
def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = ..., eps: float = ..., eps_in: EpsIn = ...,
    normalize: Normalize = ..., joint_heads: bool = ..., slot_mask: Tensor | None = ...,
    input_mask: Tensor | None = ..., return_attention: Literal[False] = ..., backend: Backend = ...,
) -> Tensor: ...  # fmt: skip
@overload
def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = ..., eps: float = ..., eps_in: EpsIn = ...,
    normalize: Normalize = ..., joint_heads: bool = ..., slot_mask: Tensor | None = ...,
    input_mask: Tensor | None = ..., return_attention: Literal[True], backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = ..., eps: float = ..., eps_in: EpsIn = ...,
    normalize: Normalize = ..., joint_heads: bool = ..., slot_mask: Tensor | None = ...,
    input_mask: Tensor | None = ..., return_attention: bool, backend: Backend = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-8,
    eps_in: EpsIn = "weights",
    normalize: Normalize = "mean",
    joint_heads: bool = False,
    slot_mask: Tensor | None = None,
    input_mask: Tensor | None = None,
    return_attention: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """One attention step of Slot Attention: slots compete for inputs, each then takes the mean of what it won.

        L[n, s] = scale * <k[n], q[s]>
        A[n, :] = softmax over the slots s of L[n, :]
        W[n, s] = (A[n, s] + eps) / sum_n (A[n, s] + eps)
        U[s]    = sum_n W[n, s] v[n]

    Args:
        q: slots' queries, `(..., K, Dk)`. All leading dimensions are batch (images, heads, frames). Any strides.
        k: inputs' keys, `(..., N, Dk)`, with q's leading dimensions.
        v: inputs' values, `(..., N, Dv)`, with q's leading dimensions.
        scale: factor on the logits, by default `Dk ** -0.5`. Divide it by a softmax temperature to use one.
        eps: small number >= 0 that keeps the mean defined. 0 is allowed.
        eps_in: "weights" adds eps to every weight, as written above (Locatello's code and its ports);
            "denominator" adds it once to the normaliser, `W = A / (sum_n A + eps)` (SAVi, ISA, BO-QSA).
        normalize: "mean", as above, or "sum": `U[s] = sum_n A[n, s] v[n]`, where eps plays no part (the weighted
            sum of the Slot Attention ablation).
        joint_heads: q, k and v are `(..., H, K, Dk)`, `(..., H, N, Dk)` and `(..., H, N, Dv)`, and the softmax runs
            over heads and slots together (dimensions -3 and -2 of q). Otherwise heads are ordinary batch.
        slot_mask: bool, broadcasts to `(..., K)`; True = the slot takes part. A masked slot has A = 0 (eps still
            applies to it: under eps_in="weights" its U is the mean of v).
        input_mask: bool, broadcasts to `(..., N)`; True = the input takes part. A masked input has A = 0 and adds
            nothing to any sum, eps included. What is masked is never read: padding may hold NaN.
        return_attention: also return A.
        backend: "auto" takes the fastest that serves the tensors' device; see `iio_kernels.backends()`.

    Returns:
        U `(..., K, Dv)`; with `return_attention` the pair U, A, with A `(..., K, N)` before eps, differentiable too.
        Both have v's dtype. Softmax and sums are computed in at least float32 whatever the storage type or autocast
        (backend triton multiplies bfloat16 keys and values, and what meets them, in bfloat16, float16 in TF32),
        and each gradient has its input's dtype.

    Edge cases: a slot whose normaliser is exactly 0 (no inputs at all, every input masked, or no attention and
    eps = 0) has U = 0 with zero gradient. Batch and N may be 0; K may not. Values are never inspected, so a NaN or
    an infinity travels into the result and no call waits for the device.

    Raises:
        TypeError: an argument is not a floating-point (masks: boolean) tensor, or an option has the wrong type.
        ValueError: shapes or devices do not match, or an option has a value that does not exist.
        RuntimeError: the backend asked for by name cannot be used on this machine.

    Complexity: O(B N K (Dk + Dv)) operations. The least traffic is q, k, v read once and U written once; the
    backward pass recomputes A and reads them once more. The reference backend also stores a few `(..., N, K)`.

    Source: Locatello et al. 2020, "Object-Centric Learning with Slot Attention", equations 1 to 3.

    Example:
        >>> q, k, v = torch.randn(8, 4, 64), torch.randn(8, 1225, 64), torch.randn(8, 1225, 64)
        >>> slot_attention(q, k, v).shape
        torch.Size([8, 4, 64])
    """
    operands = _check(Operands(q, k, v, None, slot_mask, input_mask), joint_heads)
    checks.flag("return_attention", return_attention)
    options = _options(q, scale, eps, eps_in, normalize, joint_heads)
    device = checks.same_device(q=q, k=k, v=v, slot_mask=slot_mask, input_mask=input_mask)
    name = backends.choose("slot_attention", backend, device)
    U, _, A = attend(operands, options, return_attention, name)
    U = U.to(v.dtype)
    return U if A is None else (U, A)


@overload
def slot_attention_from_inputs(
    x: Tensor, q: Tensor, wk: Tensor, bk: Tensor | None, wv: Tensor, bv: Tensor | None, *, scale: float | None = ...,
    eps: float = ..., eps_in: EpsIn = ..., normalize: Normalize = ..., joint_heads: bool = ...,
    slot_mask: Tensor | None = ..., input_mask: Tensor | None = ..., return_attention: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...  # fmt: skip
@overload
def slot_attention_from_inputs(
    x: Tensor, q: Tensor, wk: Tensor, bk: Tensor | None, wv: Tensor, bv: Tensor | None, *, scale: float | None = ...,
    eps: float = ..., eps_in: EpsIn = ..., normalize: Normalize = ..., joint_heads: bool = ...,
    slot_mask: Tensor | None = ..., input_mask: Tensor | None = ..., return_attention: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def slot_attention_from_inputs(
    x: Tensor, q: Tensor, wk: Tensor, bk: Tensor | None, wv: Tensor, bv: Tensor | None, *, scale: float | None = ...,
    eps: float = ..., eps_in: EpsIn = ..., normalize: Normalize = ..., joint_heads: bool = ...,
    slot_mask: Tensor | None = ..., input_mask: Tensor | None = ..., return_attention: bool, backend: Backend = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def slot_attention_from_inputs(
    x: Tensor,
    q: Tensor,
    wk: Tensor,
    bk: Tensor | None,
    wv: Tensor,
    bv: Tensor | None,
    *,
    scale: float | None = None,
    eps: float = 1e-8,
    eps_in: EpsIn = "weights",
    normalize: Normalize = "mean",
    joint_heads: bool = False,
    slot_mask: Tensor | None = None,
    input_mask: Tensor | None = None,
    return_attention: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`slot_attention(q, x @ wk.mT + bk, x @ wv.mT + bv, ...)`, without ever making keys or values.

        L[n, s] = scale * (<x[n], wk^T q[s]> + <bk, q[s]>)
        U[s]    = wv sum_n W[n, s] x[n] + (sum_n W[n, s]) bv

    Two products with all N inputs become two with the K slots, and an iteration reads x alone: 32 numbers an input on
    Tetrominoes instead of 64 + 64. Forward and backward together move 3 Dx numbers an input instead of
    3 Dx + 6 (Dk + Dv), and take 7 K Dx multiply-adds instead of (Dk + Dv) (3 Dx + 3.5 K): less of both, unless there
    are some sixty slots and x is much wider than keys and values. Heads that share one x read it once each.

    Args:
        x: inputs, `(..., N, Dx)`. Its leading dimensions broadcast to q's. Any strides.
        q: slots' queries, `(..., K, Dk)`. All leading dimensions are batch.
        wk: weight of the keys, `(Dk, Dx)` as in `torch.nn.Linear`; leading dimensions broadcast to q's.
        bk: bias of the keys, `(Dk,)`, leading dimensions alike; or None.
        wv: weight of the values, `(Dv, Dx)`, leading dimensions alike.
        bv: bias of the values, `(Dv,)`, leading dimensions alike; or None.
        scale: factor on the logits, by default `Dk ** -0.5` of the projected width.
        eps, eps_in, normalize, joint_heads, slot_mask, input_mask, return_attention, backend: as in `slot_attention`.
            For H heads of one x pass `x.unsqueeze(-3)`, q `(..., H, K, Dk)` and weights `(H, Dk, Dx)`.

    Returns:
        U `(..., K, Dv)`; with `return_attention` the pair U, A, with A `(..., K, N)`. Both have x's dtype, each
        gradient its input's; arithmetic is that of `slot_attention`. Gradients go to x, q, weights and biases.

    Edge cases: those of `slot_attention`. A slot whose normaliser is exactly 0 has U = 0, bv included.

    Raises:
        TypeError, ValueError, RuntimeError: as `slot_attention`.

    Complexity: O(B K (Dk + Dv) Dx + B N K Dx) operations; the least traffic is x read once forward and once backward,
    and its gradient written once.

    Source: Locatello et al. 2020, "Object-Centric Learning with Slot Attention", equations 1 to 3, reassociated.

    Example:
        >>> x, q, wk, wv = torch.randn(8, 1225, 32), torch.randn(8, 4, 64), torch.randn(64, 32), torch.randn(64, 32)
        >>> slot_attention_from_inputs(x, q, wk, None, wv, None).shape
        torch.Size([8, 4, 64])
    """
    operands = InputOperands(x, q, wk, bk, wv, bv, None, slot_mask, input_mask)
    operands = _check_from_inputs(operands, joint_heads)
    checks.flag("return_attention", return_attention)
    options = _options(q, scale, eps, eps_in, normalize, joint_heads)
    device = checks.same_device(x=x, q=q, wk=wk, bk=bk, wv=wv, bv=bv, slot_mask=slot_mask, input_mask=input_mask)
    name = backends.choose("slot_attention", backend, device)
    U, _, A = attend_from_inputs(operands, options, return_attention, name)
    U = U.to(x.dtype)
    return U if A is None else (U, A)


def attend_from_inputs(
    operands: InputOperands, options: Options, return_attention: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """U, S and A as `attend` returns them, of operands checked already."""
    x, q, wk, bk, wv, bv, logit_bias, slot_mask, input_mask = operands
    with without_autocast(x.device):
        dtype = arithmetic_dtype(x, q, wk, wv)
        queries = q.to(dtype)
        if slot_mask is not None:
            queries = queries.masked_fill(~slot_mask.unsqueeze(-1), 0)
        if bk is not None:
            of_keys = options.scale * (queries @ bk.to(dtype).unsqueeze(-1)).squeeze(-1)
            logit_bias = of_keys if logit_bias is None else of_keys + logit_bias
        inputs = x.expand(*q.shape[:-2], *x.shape[-2:])
        projected = Operands(queries @ wk.to(dtype), inputs, None, logit_bias, slot_mask, input_mask)
        U, S, A = attend(projected, options, return_attention, backend)
        U = U @ wv.to(dtype).mT
        if bv is not None:
            U = U + _sum_of_weights(S, options).unsqueeze(-1) * bv.to(dtype).unsqueeze(-2)
        return U, S, A


def _sum_of_weights(S: Tensor, options: Options) -> Tensor:
    """sum_n W[n, s] from the normaliser."""
    if options.normalize == "sum":
        return S
    if options.eps_in == "denominator":
        return divide(S - options.eps, S)
    return torch.where(S == 0, 0.0, 1.0).to(S.dtype)


@signature_kept
class SlotAttentionFunction(torch.autograd.Function):
    """The autograd Function under `slot_attention`: one backend's `forward` and `backward`, A recomputed between.

    `SlotAttentionFunction.apply(*operands, options, return_attention, backend)` takes the six `Operands` of common.py
    and complete `Options`. It returns U, the normaliser S `(..., K)`, both in the arithmetic's dtype and
    differentiable, and A or None. It checks nothing: call `slot_attention`. It differentiates once; for second
    derivatives call `slot_attention` with `backend="reference"`, which plain autograd differentiates any number of
    times.
    """

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        logit_bias: Tensor | None,
        slot_mask: Tensor | None,
        input_mask: Tensor | None,
        options: Options,
        return_attention: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        kernels = backends.implementation("slot_attention", backend)
        operands = Operands(q, k, v, logit_bias, slot_mask, input_mask)
        return kernels.forward(operands, options, return_attention)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]) -> None:
        *operands, ctx.options, _, ctx.backend = inputs
        U, S, _ = output
        ctx.save_for_backward(*operands, U, S)
        ctx.set_materialize_grads(False)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dU: Tensor | None, dS: Tensor | None, dA: Tensor | None) -> tuple[Tensor | None, ...]:
        *operands, U, S = ctx.saved_tensors
        if dU is None:
            dU = U.new_zeros(()).expand(U.shape)
        kernels = backends.implementation("slot_attention", ctx.backend)
        return *kernels.backward(dU, dS, dA, Operands(*operands), U, S, ctx.options), *(None,) * 5


def attend(
    operands: Operands, options: Options, return_attention: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`SlotAttentionFunction.apply`, but the reference is differentiated by autograd itself, any number of times."""
    if backend == "reference":
        return reference.forward(operands, options, return_attention)
    return SlotAttentionFunction.apply(*operands, options, return_attention, backend)


def _options(
    q: Tensor, scale: float | None, eps: float, eps_in: EpsIn, normalize: Normalize, joint_heads: bool
) -> Options:
    checks.option("eps_in", eps_in, ("weights", "denominator"))
    checks.option("normalize", normalize, ("mean", "sum"))
    return Options(
        scale=q.shape[-1] ** -0.5 if scale is None else checks.number("scale", scale),
        eps=checks.number("eps", eps, at_least=0),
        eps_in=eps_in,
        normalize=normalize,
        joint_heads=joint_heads,
    )


def _check(operands: Operands, joint_heads: bool) -> Operands:
    """Check the tensors; return them with the masks expanded, and without values that are the keys."""
    q, k, v, logit_bias, slot_mask, input_mask = operands
    checks.flag("joint_heads", joint_heads)
    heads, dims = ("H, ", 3) if joint_heads else ("", 2)
    checks.tensor("q", q, f"(..., {heads}K, Dk)", min_dims=dims)
    checks.tensor("k", k, f"(..., {heads}N, Dk)", min_dims=dims)
    v = checks.tensor("v", v, f"(..., {heads}N, Dv)", min_dims=dims)
    batch, (K, Dk), N = tuple(q.shape[:-2]), q.shape[-2:], k.shape[-2]
    if K == 0 or Dk == 0:
        raise ValueError(f"q: expected at least one slot and one feature, got shape {tuple(q.shape)}")
    if tuple(k.shape[:-2]) != batch or k.shape[-1] != Dk:
        expected = "(" + ", ".join(map(str, (*batch, "N", Dk))) + ")"
        raise ValueError(f"k: expected shape {expected} to match q {tuple(q.shape)}, got {tuple(k.shape)}")
    if tuple(v.shape[:-1]) != (*batch, N):
        expected = "(" + ", ".join(map(str, (*batch, N, "Dv"))) + ")"
        raise ValueError(f"v: expected shape {expected} to match k {tuple(k.shape)}, got {tuple(v.shape)}")
    if slot_mask is not None:
        slot_mask = checks.mask("slot_mask", slot_mask, (*batch, K), "(..., K)")
    if input_mask is not None:
        input_mask = checks.mask("input_mask", input_mask, (*batch, N), "(..., N)")
    return Operands(q, k, None if v is k else v, logit_bias, slot_mask, input_mask)


def _check_from_inputs(operands: InputOperands, joint_heads: bool) -> InputOperands:
    """Check the tensors; return them with the masks expanded."""
    x, q, wk, bk, wv, bv, logit_bias, slot_mask, input_mask = operands
    checks.flag("joint_heads", joint_heads)
    heads, dims = ("H, ", 3) if joint_heads else ("", 2)
    checks.tensor("x", x, "(..., N, Dx)", min_dims=2)
    checks.tensor("q", q, f"(..., {heads}K, Dk)", min_dims=dims)
    checks.tensor("wk", wk, "(..., Dk, Dx)", min_dims=2)
    checks.tensor("wv", wv, "(..., Dv, Dx)", min_dims=2)
    batch, (K, Dk), (N, Dx) = tuple(q.shape[:-2]), q.shape[-2:], x.shape[-2:]
    if K == 0 or Dk == 0:
        raise ValueError(f"q: expected at least one slot and one feature, got shape {tuple(q.shape)}")
    if Dx == 0:
        raise ValueError(f"x: expected at least one feature, got shape {tuple(x.shape)}")
    checks.broadcasts("x", x, batch, (N, Dx), "q")
    checks.broadcasts("wk", wk, batch, (Dk, Dx), "q and x")
    checks.broadcasts("wv", wv, batch, (wv.shape[-2], Dx), "q and x")
    for name, bias, width in (("bk", bk, Dk), ("bv", bv, wv.shape[-2])):
        if bias is not None:
            checks.tensor(name, bias, "(..., D)", min_dims=1)
            checks.broadcasts(name, bias, batch, (width,), "its weight")
    if slot_mask is not None:
        slot_mask = checks.mask("slot_mask", slot_mask, (*batch, K), "(..., K)")
    if input_mask is not None:
        input_mask = checks.mask("input_mask", input_mask, (*batch, N), "(..., N)")
    return InputOperands(x, q, wk, bk, wv, bv, logit_bias, slot_mask, input_mask)
