"""What the spatial mixture refuses before any work."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_refused

from iio_kernels import mixture_log_likelihood, spatial_mixture

OPERATION = "spatial_mixture"
NAN = float("nan")


def pair(B=2, K=4, C=3, H=5, W=6, **changes) -> dict[str, object]:
    return {"image": torch.rand(B, C, H, W), "decoded": torch.rand(B, K, C + 1, H, W), **changes}


# A row: the arguments, the type of the error, and what its message must hold in this order.
REFUSED = [
    (pair(decoded=None), TypeError, ["decoded", "torch.Tensor (B, K, C + 1, H, W)", "NoneType"]),
    (pair(decoded=torch.ones(2, 4, 4, 5, 6).int()), TypeError, ["decoded", "float32", "torch.int32"]),
    (pair(decoded=torch.rand(8, 4, 5, 6)), ValueError, ["decoded", "(B, K, C + 1, H, W)", "(8, 4, 5, 6)"]),
    (pair(K=0), ValueError, ["decoded", "slots", "(2, 0, 4, 5, 6)"]),
    (pair(C=0), ValueError, ["decoded", "one channel", "(2, 4, 1, 5, 6)"]),
    (pair(H=0), ValueError, ["decoded", "one pixel", "(2, 4, 4, 0, 6)"]),
    (pair(image=[[0.0]]), TypeError, ["image", "torch.Tensor (B, C, H, W)", "list"]),
    (pair(image=torch.zeros(2, 3, 5, 6).byte()), TypeError, ["image", "float32", "torch.uint8"]),
    (pair(image=torch.rand(2, 3, 6, 5)), ValueError, ["image", "(2, 3, 5, 6)", "decoded", "(2, 3, 6, 5)"]),
    (pair(decoded=torch.empty(2, 4, 4, 5, 6, device="meta")), ValueError, ["decoded", "device of image, cpu", "meta"]),
    (pair(sigma=0), ValueError, ["sigma", "> 0", "0"]),
    (pair(sigma=NAN), ValueError, ["sigma", "finite", "nan"]),
    (pair(sigma=torch.tensor(0.1)), TypeError, ["sigma", "number", "Tensor"]),
    (pair(backend="fastest"), ValueError, ["backend", "'auto'", "'reference'", "'fastest'"]),
]


def _name(value: object) -> str | None:
    return ", ".join(value) if isinstance(value, list) else None


@pytest.mark.parametrize("function", [spatial_mixture, mixture_log_likelihood])
@pytest.mark.parametrize(("arguments", "error", "words"), REFUSED, ids=_name)
def test_bad_arguments_are_named(function, arguments, error, words):
    assert_refused(function, arguments, error, words)


def test_one_slot_leaves_none():
    assert_refused(spatial_mixture, pair(K=1), ValueError, ["decoded", "K >= 2 slots", "(2, 1, 4, 5, 6)"])
    with pytest.raises(TypeError, match="positional"):
        spatial_mixture(*pair().values(), 0.1)


@pytest.mark.parametrize("backend", ["reference", "written_out"])
def test_no_value_is_looked_at(backend):
    """A meta tensor has none: to look at one, or to wait for the device, raises."""
    tensors = [x.to("meta").requires_grad_() for x in pair().values()]
    mixture = spatial_mixture(*tensors, backend=backend)
    assert [x.shape for x in mixture[:3]] == [(2, 5, 6), (2, 4, 5, 6), (2, 4, 5, 6)]
    sum(x.sum() for x in mixture[:3]).backward()
    assert [x.grad.shape for x in tensors] == [(2, 3, 5, 6), (2, 4, 4, 5, 6)]
