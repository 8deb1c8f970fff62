"""What slot composition refuses before any work."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_refused
from torch import Tensor

from iio_kernels import compose, composition_error

OPERATION = "compose"


def pair(B=2, K=4, C=3, H=5, W=6, **changes) -> dict[str, object]:
    return {"image": torch.rand(B, C, H, W), "decoded": torch.rand(B, K, C + 1, H, W), **changes}


def on_meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


# A row: the arguments, the type of the error, and what its message must hold in this order.
DECODED = [
    (pair(decoded=None), TypeError, ["decoded", "torch.Tensor (B, K, C + 1, H, W)", "NoneType"]),
    (pair(decoded=torch.rand(2, 4, 4, 5, 6).numpy()), TypeError, ["decoded", "torch.Tensor", "ndarray"]),
    (pair(decoded=torch.ones(2, 4, 4, 5, 6, dtype=torch.int32)), TypeError, ["decoded", "float32", "torch.int32"]),
    (pair(decoded=torch.rand(2, 4, 4, 5, 6) + 0j), TypeError, ["decoded", "float32", "torch.complex64"]),
    (pair(decoded=torch.rand(8, 4, 5, 6)), ValueError, ["decoded", "(B, K, C + 1, H, W)", "(8, 4, 5, 6)"]),
    (pair(K=0), ValueError, ["decoded", "at least one slot", "(2, 0, 4, 5, 6)"]),
    (pair(C=0), ValueError, ["decoded", "one channel", "(2, 4, 1, 5, 6)"]),
    (pair(H=0), ValueError, ["decoded", "one pixel", "(2, 4, 4, 0, 6)"]),
    (pair(backend="fastest"), ValueError, ["backend", "'auto'", "'reference'", "'fastest'"]),
]
ERROR = [
    (pair(image=[[0.0]]), TypeError, ["image", "torch.Tensor (B, C, H, W)", "list"]),
    (pair(image=torch.zeros(2, 3, 5, 6, dtype=torch.uint8)), TypeError, ["image", "float32", "torch.uint8"]),
    (pair(image=torch.rand(3, 5, 6)), ValueError, ["image", "(B, C, H, W)", "(3, 5, 6)"]),
    (pair(image=torch.rand(2, 4, 5, 6)), ValueError, ["image", "(2, 3, 5, 6)", "(2, 4, 4, 5, 6)", "(2, 4, 5, 6)"]),
    (pair(image=torch.rand(1, 3, 5, 6)), ValueError, ["image", "(2, 3, 5, 6)", "decoded", "(1, 3, 5, 6)"]),
    (pair(image=torch.rand(2, 3, 6, 5)), ValueError, ["image", "(2, 3, 5, 6)", "decoded", "(2, 3, 6, 5)"]),
    (pair(decoded=on_meta(2, 4, 4, 5, 6)), ValueError, ["decoded", "device of image, cpu", "meta"]),
    (pair(reduction="max"), ValueError, ["reduction", "'mean', 'sum', 'none'", "'max'"]),
    (pair(reduction=None), ValueError, ["reduction", "'mean', 'sum', 'none'", "None"]),
    (pair(return_masks=1), TypeError, ["return_masks", "bool", "1"]),
]
TABLE = [
    *((composition_error, *row) for row in DECODED + ERROR),
    *((compose, {name: x for name, x in row[0].items() if name != "image"}, *row[1:]) for row in DECODED),
]


def _name(value: object) -> str | None:
    if callable(value) and not isinstance(value, type):
        return value.__name__
    return ", ".join(value) if isinstance(value, list) else None


@pytest.mark.parametrize(("function", "arguments", "error", "words"), TABLE, ids=_name)
def test_bad_arguments_are_named(function, arguments, error, words):
    assert_refused(function, arguments, error, words)


def test_options_are_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        composition_error(*pair().values(), "mean")
    with pytest.raises(TypeError, match="positional"):
        compose(pair()["decoded"], "auto")


@pytest.mark.parametrize("backend", ["reference", "written_out"])
def test_no_value_is_looked_at(backend):
    """A meta tensor has none: to look at one, or to wait for the device, raises."""
    image, decoded = (x.to("meta").requires_grad_() for x in pair().values())
    error, masks = composition_error(image, decoded, return_masks=True, backend=backend)
    reconstruction, _ = compose(decoded, backend=backend)
    assert (error.shape, masks.shape, reconstruction.shape) == ((), (2, 4, 5, 6), (2, 3, 5, 6))
    (error + masks.sum() + reconstruction.sum()).backward()
    assert image.grad.shape == (2, 3, 5, 6)
    assert decoded.grad.shape == (2, 4, 4, 5, 6)
