"""Slot composition: what a decoder drew for each slot, put together by a softmax of its masks, and compared."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from iio_kernels.ops.compose import reference
from iio_kernels.ops.compose.common import Incoming, Operands, Wanted
from iio_kernels.runtime import backends, checks
from iio_kernels.runtime.autograd import differentiable_once, signature_kept
from iio_kernels.runtime.docs import documented
from iio_kernels.runtime.options import Backend, Reduction

# What the public functions say in the same words; `documented` puts it in place of {these names}.
_SHARED = {
    "decoded": """decoded: `(B, K, C + 1, H, W)`: for each of K slots a picture of any C >= 1 channels and, last, the
            logit of its mask. Read where it lies if plain or channels last (a pixel's C + 1 numbers adjacent), other
            strides after a copy.""",
    "backend": """backend: "auto" takes the fastest that serves the tensors' device; see `iio_kernels.backends()`.""",
    "edge": """Edge cases: B may be 0; the mean over no images is NaN, as in torch. Values are never inspected, so a NaN
    or an infinity travels into the result and no call waits for the device.""",
    "raises": """Raises:
        TypeError: a tensor is not a floating-point tensor, or an option has the wrong type.
        ValueError: shapes or devices do not fit, or an option has a value that does not exist.
        RuntimeError: the backend asked for by name cannot be used on this machine.""",
    "source": """Source: Locatello et al. 2020, "Object-Centric Learning with Slot Attention", section 2.2.""",
}


@documented(_SHARED)
def compose(decoded: Tensor, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """The slots' pictures under their masks, which are a softmax over slots, and those masks.

        masks[k]       = softmax over the slots k of decoded[k, C]
        reconstruction = sum_k masks[k] * decoded[k, :C]

    Args:
        {decoded}
        {backend}

    Returns:
        The reconstruction `(B, C, H, W)` and the masks `(B, K, H, W)`, both differentiable and in at least float32
        whatever decoded's dtype or autocast: so is the arithmetic. The gradient has decoded's dtype.

    {edge}

    {raises}

    Complexity: O(B K C H W). The least traffic is decoded read once and both results written once; the backward pass
    recomputes the masks, reads decoded once more and writes its gradient, in decoded's layout. The reference backend
    also stores a few tensors of decoded's size.

    {source}

    Example:
        >>> reconstruction, masks = compose(torch.randn(8, 4, 3 + 1, 35, 35))
        >>> reconstruction.shape, masks.shape
        (torch.Size([8, 3, 35, 35]), torch.Size([8, 4, 35, 35]))
    """
    _check(decoded)
    name = backends.choose("compose", backend, decoded.device)
    reconstruction, masks, _ = _compose(decoded, None, True, True, name)
    return reconstruction, masks


@overload
def composition_error(
    image: Tensor, decoded: Tensor, *, reduction: Reduction = ..., return_masks: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...  # fmt: skip
@overload
def composition_error(
    image: Tensor, decoded: Tensor, *, reduction: Reduction = ..., return_masks: Literal[True], backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def composition_error(
    image: Tensor, decoded: Tensor, *, reduction: Reduction = ..., return_masks: bool, backend: Backend = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@documented(_SHARED)
def composition_error(
    image: Tensor,
    decoded: Tensor,
    *,
    reduction: Reduction = "mean",
    return_masks: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """How far the composed slots are from an image: the mean squared error of `compose`'s reconstruction.

        error = mean over channels and pixels of (reconstruction - image)^2

    The reconstruction itself is never written to memory.

    Args:
        image: `(B, C, H, W)`, any strides.
        {decoded}
        reduction: over images, "mean", "sum" or "none" (returns `(B,)`).
        return_masks: also return the masks, as `compose` does.
        {backend}

    Returns:
        A scalar, or `(B,)` for reduction="none"; with `return_masks` the pair error, masks `(B, K, H, W)`. All are in
        at least float32 (the wider of the inputs' dtypes) whatever the storage type or autocast, and so is the
        arithmetic. Gradients go to image and decoded, through error and masks, each in its input's dtype.

    {edge}

    {raises}

    Complexity: O(B K C H W). The least traffic is image and decoded read once; the backward pass recomputes the masks,
    reads both once more and writes decoded's gradient, in decoded's layout. The reference backend also stores a few
    tensors of decoded's size.

    {source}

    Example:
        >>> image, decoded = torch.rand(8, 3, 35, 35), torch.randn(8, 4, 3 + 1, 35, 35, requires_grad=True)
        >>> composition_error(image, decoded).backward()
    """
    _check(decoded, image)
    checks.option("reduction", reduction, ("mean", "sum", "none"))
    checks.flag("return_masks", return_masks)
    name = backends.choose("compose", backend, checks.same_device(image=image, decoded=decoded))
    _, masks, errors = _compose(decoded, image, False, return_masks, name)
    error = errors if reduction == "none" else errors.mean() if reduction == "mean" else errors.sum()
    return (error, masks) if return_masks else error


@signature_kept
class CompositionFunction(torch.autograd.Function):
    """The autograd Function under the composition functions: one backend's `forward` and `backward`.

    `CompositionFunction.apply(decoded, image, return_reconstruction, return_masks, backend)` returns the
    reconstruction and the masks, or None where not asked for, and each image's error `(B,)`, or None where image is
    None. It checks nothing: call `compose` or `composition_error`. It differentiates once; for second derivatives call
    these with `backend="reference"`, which plain autograd differentiates any number of times.
    """

    @staticmethod
    def forward(
        decoded: Tensor, image: Tensor | None, return_reconstruction: bool, return_masks: bool, backend: str
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        kernels = backends.implementation("compose", backend)
        return kernels.forward(Operands(decoded, image), Wanted(return_reconstruction, return_masks))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        decoded, image, _, _, ctx.backend = inputs
        ctx.save_for_backward(decoded, image)
        ctx.set_materialize_grads(False)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        kernels = backends.implementation("compose", ctx.backend)
        operands = Operands(*ctx.saved_tensors)
        d_decoded, d_image = kernels.backward(Incoming(*incoming), operands, ctx.needs_input_grad[1])
        return d_decoded, d_image, None, None, None


def _compose(
    decoded: Tensor, image: Tensor | None, return_reconstruction: bool, return_masks: bool, backend: str
) -> tuple[Any, Any, Any]:
    """`CompositionFunction.apply`, but the reference is differentiated by autograd itself, any number of times."""
    if backend == "reference":
        return reference.forward(Operands(decoded, image), Wanted(return_reconstruction, return_masks))
    return CompositionFunction.apply(decoded, image, return_reconstruction, return_masks, backend)


def _check(decoded: Tensor, image: Tensor | None = None) -> None:
    checks.tensor("decoded", decoded, "(B, K, C + 1, H, W)")
    B, K, channels, H, W = decoded.shape
    if K == 0 or channels < 2 or H * W == 0:
        raise ValueError(
            f"decoded: expected at least one slot, one channel beside that of the masks, and one pixel, got shape "
            f"{tuple(decoded.shape)}"
        )
    if image is None:
        return
    checks.tensor("image", image, "(B, C, H, W)")
    expected = (B, channels - 1, H, W)
    if tuple(image.shape) != expected:
        raise ValueError(
            f"image: expected shape {expected} to match decoded {tuple(decoded.shape)}, got {tuple(image.shape)}"
        )
