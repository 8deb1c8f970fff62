"""Marks that tests of several files share."""

from __future__ import annotations

import pytest
import torch
from conftest import SERVING

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# torch.compile itself makes an instance of every Function that it traces.
compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
#: Instead of all backends: those that have kernels for every operation, and the namespaces of their operators.
NAMESPACES = {"cpu": "iio_kernels", "triton": "iio_kernels_triton"}
kernels_alone = pytest.mark.parametrize(
    "serving", [pair for pair in SERVING if pair[0] in NAMESPACES], indirect=True, ids="-".join
)
