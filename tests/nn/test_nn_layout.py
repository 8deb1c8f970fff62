"""`nn.SlotAttention` of any layout, strides and dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from conventions import DX, NAN, OPTIONS, D, K, N, assert_all_close, each_backend, example, formula, make, ours, results
from torch import Tensor


@each_backend
@pytest.mark.parametrize("name", ["defaults", "joint heads"])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 2)], ids=str)
def test_any_leading_dimensions(name, batch, backend, device):
    module = make(device=device, **OPTIONS[name], attention="softmax", backend=backend)
    inputs, slots = example(torch.float64, device, *(batch or (1,)))
    flat = module(inputs.flatten(0, -3), slots.flatten(0, -3))
    got = module(inputs.view(*batch, N, DX), slots.view(*batch, K, D))
    for x, y in zip(got, flat, strict=True):
        torch.testing.assert_close(x, y.view(*batch, *y.shape[1:]))


def test_slots_masks_and_noise_broadcast():
    module = make(attention="softmax")
    inputs, slots = example(torch.float64, "cpu", 2, 3)
    one = {"slot_mask": torch.tensor([True, False, True]), "input_mask": torch.arange(N) < 9}
    every = {name: mask.expand(2, 3, -1) for name, mask in one.items()}
    got, expected = module(inputs, slots[0, 0], **one), module(inputs, slots[:1, :1].expand(2, 3, -1, -1), **every)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        module(inputs, noise=slots[0, 0]), module(inputs, noise=slots[0, 0].expand(2, 3, -1, -1))
    )


@pytest.mark.long("triton")
@each_backend
@pytest.mark.parametrize("name", ["defaults", "inputs as they are", "heads", "inputs as they are, heads"])
@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded", "frames"])
def test_strides(name, how, backend, device, interpreted):
    if interpreted and name != "defaults":
        pytest.skip("Triton's interpreter is slow, and the operations' own tests have strides")
    module = make(device=device, **OPTIONS[name], attention="softmax", backend=backend)

    def strided(x: Tensor) -> Tensor:
        if how == "transposed":
            return x.mT.contiguous().mT
        if how == "sliced":
            wide = torch.full((*x.shape[:-2], 2 * x.shape[-2], 3 * x.shape[-1]), NAN).to(x)
            return wide[..., ::2, ::3].copy_(x)
        return x[:1].expand_as(x) if how == "expanded" else x.transpose(0, 1).contiguous().transpose(0, 1)

    views = [strided(x) for x in example(torch.float64, device, 2, 3)]
    assert not any(x.is_contiguous() for x in views)
    assert_all_close(results(ours, module, *views), results(ours, module, *(x.contiguous() for x in views)))
    out, attention = module(*views)
    incoming = [x.new_ones(()).expand_as(x) for x in (out, attention)]
    got = torch.autograd.grad((out, attention), list(module.parameters()), incoming, allow_unused=True)
    dense = torch.autograd.grad(
        module(*views), list(module.parameters()), [x.contiguous() for x in incoming], allow_unused=True
    )
    for x, y in zip(got, dense, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", ["defaults", "joint heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding(name, dtype):
    """A module wholly in a narrow dtype: results and gradients in it, the arithmetic in float32 between."""
    module = make(dtype, **OPTIONS[name], attention="softmax")
    tensors = example(dtype)
    got = results(ours, module, *tensors)
    exact = results(formula, copy.deepcopy(module).double(), *(x.double() for x in tensors))
    assert got["attention"].dtype == torch.float32
    for key, x in got.items():
        assert x.dtype == (torch.float32 if key == "attention" else dtype), key
        allowed = 128 * torch.finfo(torch.float32).eps + 16 * torch.finfo(dtype).eps
        assert (x.double() - exact[key]).abs().max() <= allowed * max(1, exact[key].abs().max()), key


@pytest.mark.parametrize("name", ["defaults", "joint heads"])
def test_autocast_changes_nothing(name):
    module, (inputs, slots) = make(torch.float32, **OPTIONS[name], attention="weights"), example(torch.float32)
    expected = module(inputs, slots)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(inputs, slots)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["defaults", "joint heads", "residual"])
def test_nan_stays_in_its_image(name):
    module, (inputs, slots) = make(torch.float32, **OPTIONS[name]), example(torch.float32)
    expected = module(inputs, slots)
    inputs[0, 3, 2] = NAN
    got = module(inputs, slots)
    assert got[0].isnan().all()
    torch.testing.assert_close(got[1], expected[1])


@pytest.mark.parametrize("name", ["defaults", "joint heads", "bias", "residual", "softmax over inputs"])
@pytest.mark.parametrize("empty", ["no images", "no inputs"])
def test_nothing(name, empty):
    module = make(**OPTIONS[name], attention="softmax")
    inputs, slots = example(n=0) if empty == "no inputs" else (x[:0] for x in example())
    out, attention = module(inputs, slots)
    assert (out.shape, attention.shape) == (slots.shape, (len(slots), K, inputs.shape[1]))
    assert out.isfinite().all()
    out.sum().backward()


@pytest.mark.long("triton")
@each_backend
@pytest.mark.parametrize("name", ["defaults", "joint heads", "bilevel"])
def test_bitwise_repeatable(name, backend, device, interpreted):
    module = make(torch.float32, device, **OPTIONS[name], backend=backend)
    tensors = example(torch.float32, device, n=N if interpreted else 300)
    first, second = (results(ours, module, *tensors) for _ in range(2))
    assert all(torch.equal(x, second[key]) for key, x in first.items())
