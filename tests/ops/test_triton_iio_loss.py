"""What the Triton kernels of inpainting promise beyond the results that every backend's tests compare."""

from __future__ import annotations

import pytest
import torch
from test_triton import DEVICE, here
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from iio_kernels import conditional_entropies, iio_loss, inpaint
from iio_kernels.runtime.backends import BACKENDS
from iio_kernels.testing.iio_loss import Case, launch


def results(function, tensors: tuple[Tensor, ...], backend: str = "triton", **options) -> tuple[Tensor, ...]:
    """What it returns, and the gradients to image and masks of a weighted sum of that."""
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    result = function(*leaves, backend=backend, **options)
    random = torch.Generator().manual_seed(1)
    incoming = torch.randn(result.shape, generator=random, dtype=torch.float64).to(result)
    return result.detach(), *torch.autograd.grad(result, leaves, incoming)


def loss(image: Tensor, masks: Tensor, **options) -> Tensor:
    return iio_loss(image, masks, reduction="none", **options)


def sampled_loss(image: Tensor, masks: Tensor, **options) -> Tensor:
    generator = torch.Generator(image.device).manual_seed(0)
    return loss(image, masks, subsets=14, generator=generator, **options)


def assert_all_close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], relative: float) -> None:
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=0, atol=relative * y.abs().max().item())


# --- sizes ----------------------------------------------------------------------------------------------------------


@here
@pytest.mark.long
@pytest.mark.parametrize("K", [11, 16 if DEVICE == "cuda" else 13])
def test_many_masks(K):
    """Against a sum over subsets in another order."""
    (image, masks), options = Case("many", B=1, C=1, K=K, H=3, W=2, options={"kernel_size": 1}).make(torch.float32)
    tensors = image.to(DEVICE), masks.to(DEVICE)
    backend = "cpu" if K > 12 else "reference"
    options |= {"eps": 1e-2}  # or a single tap would predict every pixel by itself
    if BACKENDS[backend].missing() is not None:
        pytest.skip("no other backend takes so many masks")
    expected = results(loss, (image.double(), masks.double()), backend, **options)
    assert_all_close([x.cpu() for x in results(loss, tensors, **options)], expected, 1e-5)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The interpreter takes the blocks that a GPU would."""
    from iio_kernels.ops.iio_loss import triton as kernels

    monkeypatch.setattr(kernels, "INTERPRETED", False)


@here
@pytest.mark.long
@pytest.mark.parametrize("function", [loss, inpaint, sampled_loss, conditional_entropies])
def test_images_larger_than_a_block(function, as_on_a_gpu):
    tensors, _ = Case("large", B=1, C=4, K=2, H=70, W=150).make(torch.float64, DEVICE)
    assert_all_close(results(function, tensors), results(function, tensors, "reference"), 1e-10)


@here
@pytest.mark.parametrize("function", [loss, sampled_loss])
@pytest.mark.parametrize("size", [(1, 2), (3, 5)])
def test_images_smaller_than_a_block(size, function, as_on_a_gpu):
    tensors, options = Case("small", B=3, H=size[0], W=size[1], options={"kernel_size": 1, "eps": 1e-2}).make(
        torch.float64, DEVICE
    )
    assert_all_close(results(function, tensors, **options), results(function, tensors, "reference", **options), 1e-10)


@pytest.mark.long
@here
@pytest.mark.parametrize(("kernel_size", "repeats"), [(3, 24), (25, 3), (33, 1)])
def test_filters_that_take_several_launches(kernel_size, repeats):
    """And those whose windows fill the registers."""
    tensors, _ = Case("wide", B=1, K=2, H=33, W=34).make(torch.float64, DEVICE)
    options = {"kernel_size": kernel_size, "repeats": repeats, "sigma": 8.0}
    assert_all_close(results(inpaint, tensors, **options), results(inpaint, tensors, "reference", **options), 1e-10)


# --- offsets --------------------------------------------------------------------------------------------------------


@here
@pytest.mark.parametrize("function", [loss, sampled_loss, conditional_entropies, inpaint])
def test_offsets_of_64_bits_change_nothing(function, monkeypatch):
    from iio_kernels.ops.iio_loss import triton as kernels

    tensors, options = Case("offsets", K=5, C=4).make(torch.float32, DEVICE)
    expected = results(function, tensors, **options)
    monkeypatch.setattr(kernels, "index_type", lambda *tensors: kernels.tl.int64)
    assert all(map(torch.equal, results(function, tensors, **options), expected))


# --- launches and memory --------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Counts the bytes that are asked for within it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not function.is_view:
            self.bytes += result.nbytes
        return result


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The names of the kernels that are launched, which are not."""
    from iio_kernels.ops.iio_loss import triton as kernels

    names = []
    monkeypatch.setattr(kernels, "_launch", lambda kernel, *arguments, **constants: names.append(kernel.__name__))
    return names


@here
def test_a_training_step_takes_four_launches(launches):
    launch("iio_loss", 64, 4, 3, 35, 35, torch.float32, False, True)
    assert launches == ["filter_planes", "subsets", "filter_planes", "masks_gradient"]


@here
def test_a_step_with_a_list_and_both_gradients_takes_five(launches):
    launch("sampled_iio_loss", 16, 24, 3, 64, 64, torch.float32, True, True)
    assert launches == ["filter_planes", "listed_subsets", "filter_planes", "masks_gradient", "image_gradient"]


@here
def test_memory_is_that_of_the_planes(launches):
    B, K, C, H, W = 64, 7, 3, 128, 128
    with Allocations() as allocated:
        launch("iio_loss", B, K, C, H, W, torch.float32, False, True)
    inputs, result = (4 * planes * B * H * W for planes in (K + C, K))
    assert allocated.bytes - inputs - result < 3 * inputs
