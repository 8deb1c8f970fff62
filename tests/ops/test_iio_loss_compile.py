"""The inpainting functions under torch.compile."""

from __future__ import annotations

import pytest
import torch
from marks import compiles

from iio_kernels import conditional_entropies, iio_loss, inpaint, interaction_information
from iio_kernels.testing.iio_loss import (
    Case,
    assert_all_close,
    results,
)

OPERATION = "iio_loss"


@pytest.mark.long("reference", "triton", "written_out")
@compiles
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic, backend, device):
    def function(image, masks):
        return iio_loss(image, masks, reduction="none", backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for B, H, W in ((2, 13, 12), (3, 20, 17)) if dynamic else ((2, 13, 12),):
        tensors, _ = Case("compiled", B=B, K=2, H=H, W=W).make(device=device)
        assert_all_close(results(compiled, *tensors), results(function, *tensors))


@compiles
@pytest.mark.parametrize("function", [conditional_entropies, interaction_information, inpaint])
def test_others_compile_as_one_graph(function, backend, device):
    torch.compiler.reset()
    tensors, _ = Case("compiled", K=3).make(device=device)
    compiled = torch.compile(lambda *x: function(*x, backend=backend), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), function(*tensors, backend=backend))


@pytest.mark.long("cpu", "triton")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
def test_compiles_to_code(any_device):
    """Once all the way through Inductor."""
    torch.compiler.reset()
    tensors, _ = Case("compiled", K=2).make(torch.float32, any_device)

    def function(image, masks):
        return iio_loss(image, masks, reduction="none", backend="reference")

    compiled = torch.compile(function, fullgraph=True)
    assert_all_close(results(compiled, *tensors), results(function, *tensors), relative=1e-5)
