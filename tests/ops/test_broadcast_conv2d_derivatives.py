"""The gradients of the broadcast convolution: to some inputs, once and twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from marks import kernels_alone
from torch import Tensor

from iio_kernels import BroadcastFunction, broadcast_conv2d
from iio_kernels.ops.broadcast_conv2d import reference
from iio_kernels.ops.broadcast_conv2d.common import Classes, Operands, Options
from iio_kernels.testing.broadcast_conv2d import (
    NAMES,
    STRIDED_CONV,
    Case,
    random_like,
    results,
    run,
)

OPERATION = "broadcast_conv2d"
each_kind = pytest.mark.parametrize("kind", [Case("conv"), STRIDED_CONV], ids=lambda case: case.name)
each_relu = pytest.mark.parametrize("relu", [True, False], ids=["ReLU", "no ReLU"])


@pytest.mark.long("reference", "triton")
@each_relu
@each_kind
def test_gradcheck(relu, kind, backend, device, interpreted):
    case = replace(kind, D=2, O=3, size=(3, 4), kernel=(3, 2), padding=(1, 1), batch=(2,), relu=relu)
    tensors, options = case.make(device=device)
    leaves = [x.requires_grad_() for x in tensors]

    def function(*leaves):
        return broadcast_conv2d(*leaves, backend=backend, **options)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=interpreted)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("wanted", range(3), ids=NAMES[1:])
def test_gradient_of_one_input_alone(wanted, backend, device):
    tensors, options = Case("one input").make(device=device)
    expected = run(tensors, backend, **options)[1 + wanted]
    leaf = tensors[wanted].requires_grad_()
    out = broadcast_conv2d(*tensors, backend=backend, **options)
    torch.testing.assert_close(torch.autograd.grad(out, leaf, random_like(out))[0], expected)


@each_relu
def test_second_derivatives_are_the_references_alone(relu, backend, device):
    """Also where the incoming gradient is a constant, as that of a sum: nothing passes silently for 0."""
    tensors, options = Case("twice", relu=relu).make(device=device)
    z, weight, position_map = (x.requires_grad_() for x in tensors)
    out = broadcast_conv2d(z, weight, position_map, backend=backend, **options)
    for loss in (out.sum(), out.square().sum()):
        penalty = torch.autograd.grad(loss, z, create_graph=True)[0].square().sum()
        if backend == "reference":
            assert torch.autograd.grad(penalty, weight, retain_graph=True)[0].abs().max() > 0
        else:
            with pytest.raises(RuntimeError, match=r"differentiates once.*reference"):
                torch.autograd.grad(penalty, weight, retain_graph=True)


@pytest.mark.long("triton")
def test_functional_gradient(backend, device):
    tensors, options = Case("functional").make(device=device)

    def loss(*tensors):
        return broadcast_conv2d(*tensors, backend=backend, **options).square().sum()

    leaves = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for x, y in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*tensors), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_function_by_itself(any_device):
    """`BroadcastFunction` with the reference's kernels: the gradient as written out, against plain autograd."""
    for relu in (True, False):
        kinds = Classes(1, 2, 1), Classes(0, 3, 2)
        tensors = [torch.randn(shape).double().to(any_device) for shape in ((3, 4, 5, 2), (6, 9, 2))]
        options = Options(*kinds, relu, torch.float64)
        got = results(lambda *x, o=options: BroadcastFunction.apply(*x, *o, "reference"), tensors)
        expected = results(lambda *x, o=options: reference.forward(Operands(*x), o), tensors)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y)


def test_results_without_gradients(backend, device):
    tensors, options = Case("inference").make(device=device)
    plain = broadcast_conv2d(*tensors, backend=backend, **options)
    assert not plain.requires_grad
    tensors[0].requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(broadcast_conv2d(*tensors, backend=backend, **options), plain)
    broadcast_conv2d(*tensors, backend=backend, **options).sum().backward()


@pytest.mark.long("triton")
@kernels_alone
def test_nothing_of_the_results_size_is_kept_for_backward(backend, device):
    tensors, options = Case("kept", (2, 50)).make(device=device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = broadcast_conv2d(*(x.requires_grad_() for x in tensors), backend=backend, **options)
    assert max(x.numel() for x in kept) <= 100 * 5 * 5 * 8 < out.numel() / 2
