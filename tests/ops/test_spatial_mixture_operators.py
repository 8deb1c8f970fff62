"""The spatial mixture as torch sees it: the operators, and torch.compile."""

from __future__ import annotations

import pytest
import torch
from comparing import comparison
from marks import NAMESPACES, compiles, kernels_alone

from iio_kernels import mixture_log_likelihood, spatial_mixture
from iio_kernels.runtime import backends
from iio_kernels.testing.spatial_mixture import NAMES, Case, results
from iio_kernels.testing.tensors import random_like

OPERATION = "spatial_mixture"
assert_all_close = comparison(NAMES, 1e-12)


@pytest.mark.long("triton")
@kernels_alone
@pytest.mark.parametrize("everything", [True, False])
def test_opcheck(everything, backend, device):
    """What torch asks of operators, with and without each of the incoming gradients."""
    backends.implementation("spatial_mixture", backend)  # which defines them
    operators = getattr(torch.ops, NAMESPACES[backend])
    image, decoded = Case("operator", H=3, W=5, channels_last=everything).make(torch.float32, device)[0]
    torch.library.opcheck(operators.mixture_forward.default, (image, decoded, 0.1, everything))
    log_likelihood, m, q, _, d_nll = operators.mixture_forward(image, decoded, 0.1, True)
    g, dm, dq = random_like(log_likelihood, m, q)
    incoming, kept = ((g, dm, dq), (m, q, d_nll)) if everything else ((g, None, None), ())
    torch.library.opcheck(operators.mixture_backward.default, (*incoming, image, decoded, 0.1, everything, *kept))


@pytest.mark.long("reference", "triton", "written_out")
@compiles
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic, backend, device):
    def function(image, decoded):
        log_likelihood, *others = spatial_mixture(image, decoded, backend=backend)[:5]
        if not dynamic:  # a graph with two of them, and sigma a symbol, torch cannot trace through the reference's math
            log_likelihood = log_likelihood + mixture_log_likelihood(image, decoded, backend=backend)
        return log_likelihood, *others

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for B, H, W in ((2, 5, 7), (3, 6, 4)) if dynamic else ((2, 5, 7),):
        tensors = Case("compiled", B=B, H=H, W=W, channels_last=True).make(device=device)[0]
        assert_all_close(results(compiled, *tensors), results(function, *tensors))
