"""Spatial mixture (IODINE): an image as a mixture, at every pixel, of what a decoder drew for each slot."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from iio_kernels.ops.spatial_mixture import reference
from iio_kernels.ops.spatial_mixture.common import Incoming, Operands, Options
from iio_kernels.runtime import backends, checks
from iio_kernels.runtime.autograd import differentiable_once, signature_kept
from iio_kernels.runtime.docs import documented
from iio_kernels.runtime.options import Backend

# What the public functions say in the same words; `documented` puts it in place of {these names}.
_SHARED = {
    "image": """image: `(B, C, H, W)`, any strides.""",
    "decoded": """decoded: `(B, K, C + 1, H, W)`: for each of K slots the means mu of any C >= 1 channels and, last, the
            logit l of its mask. Read where it lies if plain or channels last (a pixel's C + 1 numbers adjacent), other
            strides after a copy.""",
    "sigma": """sigma: standard deviation of every channel around its mean, > 0; 0.1 as published.""",
    "backend": """backend: "auto" takes the fastest that serves the tensors' device; see `iio_kernels.backends()`.""",
    "edge": """Edge cases: B may be 0. Values are never inspected and no call waits for the device: a NaN travels into
    the results of its pixel, plus infinity into its likelihood. A slot whose logit is minus infinity takes no part: its
    mask is 0.""",
    "raises": """Raises:
        TypeError: a tensor is not a floating-point tensor, or an option has the wrong type.
        ValueError: shapes or devices do not fit, or an option has a value that does not exist.
        RuntimeError: the backend asked for by name cannot be used on this machine.""",
    "source": """Source: Greff et al. 2019, "Multi-Object Representation Learning with Iterative Variational Inference",
    eq. 1 and appendix C.""",
}


class SpatialMixture(NamedTuple):
    """What `spatial_mixture` returns, in at least float32; it says what each of them is.

    The last three are one tensor and two views of it.
    """

    log_likelihood: Tensor  # (B, H, W), differentiable
    masks: Tensor  # (B, K, H, W), differentiable
    posterior: Tensor  # (B, K, H, W), differentiable
    leave_one_out: Tensor  # (B, K, H, W), constant
    d_decoded: Tensor  # (B, K, C + 1, H, W), constant
    d_means: Tensor  # (B, K, C, H, W), constant
    d_logits: Tensor  # (B, K, H, W), constant


@documented(_SHARED)
def spatial_mixture(image: Tensor, decoded: Tensor, *, sigma: float = 0.1, backend: Backend = "auto") -> SpatialMixture:
    """The image's likelihood under a Gaussian mixture of the slots at every pixel, and all that IODINE refines from.

        masks[k]         m_k = softmax over the slots k of l_k
        log_likelihood   log p = log sum_k m_k p_k,    p_k = prod_c N(x_c; mu_kc, sigma^2)
        posterior[k]     p_k / sum_j p_j
        leave_one_out[k] log (sum_{j != k} m_j p_j / sum_{j != k} m_j)
        d_means[k, c]    d(-log p) / d mu_kc = r_k (mu_kc - x_c) / sigma^2,    r_k = m_k p_k / sum_j m_j p_j
        d_logits[k]      d(-log p) / d l_k = m_k - r_k

    The posterior is that of appendix C, p(m_k | x, mu), in which every slot is as likely beforehand: without the masks.
    (The published program is the same to 1e-6.) The leave-one-out likelihood is that of a mixture without slot k, the
    masks of the others summing to one.

    Gradients flow to image and decoded through log_likelihood, masks and posterior. leave_one_out and the gradients
    d_... are constants, as IODINE has it: it stops them before its refinement network. d_decoded holds d_means and
    d_logits as decoded holds means and logits, in decoded's layout: the gradient to whatever decoded was made of, by
    `torch.autograd.grad(decoded, z, d_decoded, retain_graph=True)`, needs no backward pass through the mixture. It is
    of the sum over pixels and images; for their mean divide.

    Args:
        {image}
        {decoded}
            K is at least 2, or nothing would be left without one; `mixture_log_likelihood` takes one slot too.
        {sigma}
        {backend}

    Returns:
        A `SpatialMixture` of log_likelihood `(B, H, W)` in nats, masks, posterior and leave_one_out `(B, K, H, W)`,
        d_decoded `(B, K, C + 1, H, W)`, d_means `(B, K, C, H, W)` and d_logits `(B, K, H, W)`. All are in at least
        float32 (the wider of the inputs' dtypes) whatever the storage type or autocast, and so is the arithmetic.
        Gradients have their inputs' dtypes. leave_one_out is NaN where no other slot takes part.

    {edge}

    {raises}

    Complexity: O(B K C H W). The least traffic is image and decoded read once and all results written once; the
    backward pass reads both once more and writes decoded's gradient, in decoded's layout. On a GPU it recomputes, and
    nothing but the inputs is kept for it; on a CPU masks, posterior and d_decoded are kept and read instead. The
    reference backend also stores some tensors of decoded's size and takes O(B K^2 H W).

    {source}

    Example:
        >>> image, decoded = torch.rand(8, 3, 35, 35), torch.rand(8, 4, 3 + 1, 35, 35, requires_grad=True)
        >>> mixture = spatial_mixture(image, decoded)
        >>> mixture.leave_one_out.shape, mixture.d_means.shape
        (torch.Size([8, 4, 35, 35]), torch.Size([8, 4, 3, 35, 35]))
        >>> (-mixture.log_likelihood.sum((1, 2)).mean()).backward()
    """
    _check(image, decoded, least_slots=2)
    sigma = checks.number("sigma", sigma, above=0)
    name = backends.choose("spatial_mixture", backend, checks.same_device(image=image, decoded=decoded))
    log_likelihood, masks, posterior, leave_one_out, d_decoded = _mix(image, decoded, sigma, True, name)
    d_means, d_logits = d_decoded[:, :, :-1], d_decoded[:, :, -1]
    return SpatialMixture(log_likelihood, masks, posterior, leave_one_out, d_decoded, d_means, d_logits)


@documented(_SHARED)
def mixture_log_likelihood(image: Tensor, decoded: Tensor, *, sigma: float = 0.1, backend: Backend = "auto") -> Tensor:
    """`spatial_mixture`'s log_likelihood alone: for a loss or a score after which nothing is refined.

    Args:
        {image}
        {decoded}
        {sigma}
        {backend}

    Returns:
        log p `(B, H, W)` in nats, differentiable to image and decoded, in at least float32 (the wider of the inputs'
        dtypes) whatever the storage type or autocast. Gradients have their inputs' dtypes.

    {edge}

    {raises}

    Complexity: O(B K C H W). The least traffic is image and decoded read once; the backward pass is that of
    `spatial_mixture`.

    {source}

    Example:
        >>> mixture_log_likelihood(torch.rand(8, 3, 35, 35), torch.rand(8, 4, 3 + 1, 35, 35)).shape
        torch.Size([8, 35, 35])
    """
    _check(image, decoded, least_slots=1)
    sigma = checks.number("sigma", sigma, above=0)
    name = backends.choose("spatial_mixture", backend, checks.same_device(image=image, decoded=decoded))
    return _mix(image, decoded, sigma, False, name)[0]


@signature_kept
class MixtureFunction(torch.autograd.Function):
    """The autograd Function under the mixture functions: one backend's `forward` and `backward`.

    `MixtureFunction.apply(image, decoded, sigma, everything, backend)` returns log_likelihood, masks, posterior,
    leave_one_out and d_decoded, the last four None where everything is not asked for. It checks nothing: call
    `spatial_mixture` or `mixture_log_likelihood`. It differentiates once; for second derivatives call these with
    `backend="reference"`, which plain autograd differentiates any number of times.
    """

    @staticmethod
    def forward(
        image: Tensor, decoded: Tensor, sigma: float, everything: bool, backend: str
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        kernels = backends.implementation("spatial_mixture", backend)
        return kernels.forward(Operands(image, decoded), Options(sigma, everything))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        image, decoded, ctx.sigma, everything, ctx.backend = inputs
        saved = backends.implementation("spatial_mixture", ctx.backend).SAVED if everything else ()
        if everything:
            ctx.mark_non_differentiable(*output[3:])
        ctx.save_for_backward(image, decoded, *(output[i] for i in saved))
        ctx.set_materialize_grads(False)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        kernels = backends.implementation("spatial_mixture", ctx.backend)
        image, decoded, *saved = ctx.saved_tensors
        operands, needs_image_gradient = Operands(image, decoded), ctx.needs_input_grad[0]
        d_image, d_decoded = kernels.backward(
            Incoming(*incoming[:3]), operands, ctx.sigma, needs_image_gradient, *saved
        )
        return d_image, d_decoded, None, None, None


def _mix(
    image: Tensor, decoded: Tensor, sigma: float, everything: bool, backend: str
) -> tuple[Any, Any, Any, Any, Any]:
    """`MixtureFunction.apply`, but the reference is differentiated by autograd itself, any number of times."""
    if backend == "reference":
        log_likelihood, masks, posterior, *constant = reference.forward(
            Operands(image, decoded), Options(sigma, everything)
        )
        leave_one_out, d_decoded = (None if x is None else x.detach() for x in constant)
        return log_likelihood, masks, posterior, leave_one_out, d_decoded
    return MixtureFunction.apply(image, decoded, sigma, everything, backend)


def _check(image: Tensor, decoded: Tensor, least_slots: int) -> None:
    checks.tensor("decoded", decoded, "(B, K, C + 1, H, W)")
    B, K, channels, H, W = decoded.shape
    if min(K - least_slots, channels - 2, H * W - 1) < 0:
        raise ValueError(
            f"decoded: expected K >= {least_slots} slots, at least one channel beside that of the masks, and one "
            f"pixel, got shape {tuple(decoded.shape)}"
        )
    checks.tensor("image", image, "(B, C, H, W)")
    expected = (B, channels - 1, H, W)
    if tuple(image.shape) != expected:
        raise ValueError(
            f"image: expected shape {expected} to match decoded {tuple(decoded.shape)}, got {tuple(image.shape)}"
        )
