"""Slot composition as torch sees it: the operators, and torch.compile."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison
from marks import NAMESPACES, compiles, kernels_alone

from iio_kernels import compose, composition_error
from iio_kernels.runtime import backends
from iio_kernels.testing.compose import NAMES, Case, results
from iio_kernels.testing.tensors import random_like

OPERATION = "compose"
assert_all_close = comparison(NAMES, 1e-12)


# --- the operators ----------------------------------------------------------------------------------------


@pytest.mark.long("triton")
@kernels_alone
@pytest.mark.parametrize("wanted", [(True, True), (False, False), (True, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(wanted, dtype, channels_last, backend, device):
    """What torch asks of operators, with and without an image and each of the incoming gradients."""
    backends.implementation("compose", backend)  # which defines them
    operators = getattr(torch.ops, NAMESPACES[backend])
    image, decoded = Case("operator", H=3, W=5, channels_last=channels_last).make(dtype, device)[0]
    wide = torch.promote_types(dtype, torch.float32)
    image = image.to(wide)
    for x in (image, None):
        arguments = (decoded, x, *wanted)
        torch.library.opcheck(operators.composition_forward.default, arguments)
        x_hat, a, _ = operators.composition_forward(decoded, image, True, True)
        d_x_hat, d_a, g = random_like(x_hat, a, torch.ones(2, dtype=wide, device=device))
        incoming = d_x_hat if wanted[0] else None, d_a if wanted[1] else None, None if x is None else g
        arguments = (*incoming, decoded, x, x is not None)
        torch.library.opcheck(operators.composition_backward.default, arguments)


# --- torch.compile ----------------------------------------------------------------------------------------


@pytest.mark.long("reference", "triton", "written_out")
@compiles
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_compiles_as_one_graph(dynamic, channels_last, backend, device):
    def function(image, decoded):
        error, masks = composition_error(image, decoded, reduction="none", return_masks=True, backend=backend)
        return error + compose(decoded, backend=backend)[0].mean((1, 2, 3)), masks

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for B, H, W in ((2, 13, 12), (3, 20, 17)) if dynamic else ((2, 13, 12),):
        tensors = Case("compiled", B=B, H=H, W=W, channels_last=channels_last).make(device=device)[0]
        assert_all_close(results(compiled, *tensors), results(function, *tensors))


@pytest.mark.long("cpu", "triton")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
@kernels_alone
def test_compiles_to_code(backend, device):
    """Once all the way through Inductor."""
    torch.compiler.reset()
    tensors = Case("compiled", K=2, channels_last=True).make(torch.float32, device)[0]

    def function(image, decoded):
        return composition_error(image, decoded, return_masks=True, backend=backend)

    compiled = torch.compile(function, fullgraph=True)
    assert_all_close(results(compiled, *tensors), results(function, *tensors), relative=1e-5)
