"""The broadcast convolution where numbers are NaN, infinite or 0, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from iio_kernels import broadcast_conv2d
from iio_kernels.testing.broadcast_conv2d import (
    STRIDED_CONV,
    Case,
    random_like,
    run,
)

OPERATION = "broadcast_conv2d"
each_relu = pytest.mark.parametrize("relu", [True, False], ids=["ReLU", "no ReLU"])
NAN = float("nan")


@pytest.mark.parametrize("place", [0, 1, 2], ids=["z", "weight", "position_map"])
@each_relu
def test_nan_goes_to_everything_that_depends_on_it(place, relu, backend, device):
    tensors, options = Case("nan", relu=relu).make(device=device)
    clean = run(tensors, backend, **options)
    tensors[place][tuple(n // 2 for n in tensors[place].shape)] = NAN
    out, dz, dweight, d_map = run(tensors, backend, **options)
    if place == 0:  # all of slot 1, 1, and nothing of the others
        assert out[1, 1].isnan().all()
        assert dweight.isnan().any()
        for x, y in ((out, clean[0]), (dz, clean[1])):
            others = [x.flatten(0, 1)[[0, 1, 2, 3, 5]], y.flatten(0, 1)[[0, 1, 2, 3, 5]]]
            torch.testing.assert_close(*others)
    elif place == 1:
        assert out[:, :, 4].isnan().all()
        assert dz.isnan().any()
        torch.testing.assert_close(out[:, :, [0, 1, 2, 3, 5, 6, 7]], clean[0][:, :, [0, 1, 2, 3, 5, 6, 7]])
    else:
        assert out[:, :, 4, 4, 3].isnan().all()
        assert out.isnan().sum() == 6
        # What comes in passes where the sum is a NaN, as it does through torch's ReLU.
        torch.testing.assert_close(d_map[4, 4, 3], random_like(out)[:, :, 4, 4, 3].sum())


def test_an_incoming_nan_goes_to_the_gradients_it_belongs_to(backend, device):
    tensors, options = Case("nan", relu=False).make(device=device)
    incoming = random_like(run(tensors, backend, **options)[0])
    clean = run(tensors, backend, incoming, **options)
    incoming[1, 2, 5, 4, 3] = NAN
    _, dz, dweight, d_map = run(tensors, backend, incoming, **options)
    assert dz[1, 2].isnan().all()
    assert dweight[5].isnan().any()
    assert d_map.isnan().nonzero().tolist() == [[5, 4, 3]]
    torch.testing.assert_close(dz[0], clean[1][0])


def test_relu_cuts_at_0(backend, device):
    """A sum of exactly 0 has no gradient, as in torch; and infinities stay."""
    z, weight = (torch.ones(shape, dtype=torch.float64, device=device) for shape in ((1, 1), (1, 1, 1, 1)))
    position_map = torch.tensor([-2.0, -1.0, 0.0, float("inf"), -float("inf")], dtype=torch.float64, device=device)
    out, dz, _, d_map = run((z, weight, position_map.view(1, 1, 5)), backend, torch.ones(1, 1, 1, 5).to(z),
                            size=(1, 5), relu=True)  # fmt: skip
    assert out.flatten().tolist() == [0, 0, 1, float("inf"), 0]
    assert d_map.flatten().tolist() == [0, 0, 1, 1, 0]
    assert dz.item() == 2


@pytest.mark.long("triton")
def test_bitwise_repeatable(backend, device):
    for kind in (Case("repeated", (19,), size=(35, 35)), STRIDED_CONV):
        tensors, options = kind.make(torch.float32, device)
        assert all(map(torch.equal, run(tensors, backend, **options), run(tensors, backend, **options)))


@pytest.mark.long("triton")
def test_inputs_are_never_written_to(backend, device):
    tensors, options = Case("read only").make(device=device)
    before = [x.clone() for x in tensors]
    leaves = [x.requires_grad_() for x in tensors]
    out = broadcast_conv2d(*leaves, backend=backend, **options)
    incoming = random_like(out)
    out.backward(incoming)
    for x, y in zip((*leaves, incoming), (*before, random_like(out)), strict=True):
        assert torch.equal(x, y)
