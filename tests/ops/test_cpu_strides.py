"""The compiled CPU kernels take tensors of any strides."""

from __future__ import annotations

import pytest
import torch
from cpu_operators import (
    ATTENTION,
    BF16,
    BROADCAST,
    COMPOSITION,
    F32,
    F64,
    GOOD,
    INPAINTING,
    ITERATIONS,
    MIXTURE,
    _one_thread,  # noqa: F401
    assert_same,
    call,
    each_operator,
    without_nan,
)
from torch import Tensor

from iio_kernels import (
    conditional_entropies,
    iio_loss,
    inpaint,
    interaction_information,
    slot_attention,
)
from iio_kernels.testing import iio_loss as iio_spec
from iio_kernels.testing import slot_attention as attention_spec
from iio_kernels.testing.tensors import strided


def restrided(x: Tensor, how: str) -> Tensor:
    if how == "of one number":
        return x.flatten()[0].expand(x.shape)
    if x.dim() == 1:  # a vector has one stride only
        return x.repeat_interleave(2)[::2]
    if x.dim() == 2 and how == "heads":
        how = "transposed"
    return strided(x, how)


each_stride = pytest.mark.parametrize("how", ["transposed", "sliced", "expanded", "heads", "of one number"])
STRIDED = [
    *((operator, {"N": 1100, "Dk": 16, "Dv": 6, "dtype": d}) for operator in ATTENTION for d in (F32, BF16)),
    *((operator, {"N": 37, "Dv": None, "joint_heads": True}) for operator in ATTENTION),
    *((operator, {}) for operator in INPAINTING),
    *((operator, {"dtype": dtype}) for operator in COMPOSITION for dtype in (F32, BF16)),
    *((operator, {"dtype": dtype}) for operator in MIXTURE for dtype in (F32, BF16)),
    *((operator, {"dtype": dtype}) for operator in BROADCAST for dtype in (F32, BF16)),
    *((operator, {"dtype": dtype}) for operator in ITERATIONS for dtype in (F32, BF16)),
]


@each_stride
@pytest.mark.parametrize(("operator", "sizes"), STRIDED, ids=str)
def test_strides_change_no_bit(operator, sizes, how):
    """Of any tensor that a raw operator takes."""
    arguments = GOOD[operator](**sizes)
    views = {name: restrided(x, how) for name, x in arguments.items() if isinstance(x, Tensor)}
    assert not any(x.is_contiguous() for x in views.values())
    dense = {name: x.clone(memory_format=torch.contiguous_format) for name, x in views.items()}
    assert_same(call(operator, arguments | views), without_nan(call(operator, arguments | dense)))


@each_operator
def test_tensors_that_are_negated_when_read(operator):
    """As the imaginary part of a conjugate is."""
    arguments = GOOD[operator]()
    numbers = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()}
    lazy = {name: torch.complex(x, -x).conj().imag for name, x in numbers.items()}
    assert all(x.is_neg() for x in lazy.values())
    assert_same(call(operator, arguments | lazy), without_nan(call(operator, arguments)))


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded", "of one number"])
@pytest.mark.parametrize("function", [conditional_entropies, interaction_information, inpaint])
def test_strided_incoming_gradients(function, how):
    tensors, _ = iio_spec.Case("strided", K=5, H=19, W=21).make()
    leaves = [x.requires_grad_() for x in tensors]
    y = function(*leaves, backend="cpu")
    grad = restrided(torch.randn(y.shape, dtype=F64), how)
    assert not grad.is_contiguous()
    expected = torch.autograd.grad(y, leaves, grad.contiguous(), retain_graph=True)
    assert_same(torch.autograd.grad(y, leaves, grad), without_nan(expected))


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded", "heads"])
@pytest.mark.parametrize("function", [conditional_entropies, interaction_information, inpaint])
def test_strided_images_and_masks(function, how):
    tensors, _ = iio_spec.Case("strided", B=3, H=19, W=21).make()
    views = [restrided(x, how).detach() for x in tensors]
    results = []
    for inputs in (views, [x.contiguous() for x in views]):
        leaves = [x.requires_grad_() for x in inputs]
        y = function(*leaves, backend="cpu")
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    assert_same(*results)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_reduced_losses(reduction):
    """Their incoming gradient is one number, seen as many."""
    (image, masks), _ = iio_spec.Case("reduced", B=5, K=3).make()
    leaves = image.requires_grad_(), masks.requires_grad_()
    losses = iio_loss(*leaves, reduction="none", backend="cpu")
    expected = torch.autograd.grad(losses, leaves, torch.full((5,), 2 / 5 if reduction == "mean" else 2, dtype=F64))
    loss = iio_loss(*leaves, reduction=reduction, backend="cpu").expand(2)
    assert_same(torch.autograd.grad(loss.sum(), leaves), expected)


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded", "heads"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_strided_queries_keys_and_values(how, dtype):
    """Several chunks of inputs."""
    tensors, options = attention_spec.Case("strided", batch=(2, 2), N=1100, Dv=6, inputs="some").make(dtype)
    views = [restrided(x, how) for x in tensors]
    dense = [x.clone(memory_format=torch.contiguous_format) for x in views]
    results = []
    for inputs in (views, dense):
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = slot_attention(*leaves, return_attention=True, backend="cpu", **options)
        incoming = [restrided(torch.linspace(-1, 1, x.numel()).view(x.shape).to(x), "transposed") for x in outputs]
        results.append((*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, incoming)))
    assert_same(results[0], without_nan(results[1]))
