"""The backends that tests of an operation run on: those of the package, and two more that are for tests alone."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import cuda_on_host
import numpy as np
import torch

from iio_kernels.runtime import triton_support
from iio_kernels.runtime.backends import BACKENDS, OPERATIONS, Backend


def _round_as_hardware_does() -> None:
    """Let Triton's interpreter round float32 to the nearest bfloat16: Triton 3.7 to 3.9 cut off what has no room, and
    the error of a unit in the last place would hide one of a kernel's."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounding_cast(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    InterpreterBuilder.cast_impl = rounding_cast


if triton_support.INTERPRETED and triton_support.missing() is None:
    _round_as_hardware_does()

# The reference's written-out gradients stand behind the autograd Functions like any other backend's, though
# no user needs them there. Registered as one, they meet every test, and so does the way all are called.
BACKENDS["written_out"] = Backend(device_types=None, missing=lambda: None)
for operation in OPERATIONS:
    reference = import_module(f"iio_kernels.ops.{operation}.reference")
    written_out = ModuleType(f"iio_kernels.ops.{operation}.written_out")
    written_out.__dict__.update({name: x for name, x in vars(reference).items() if not name.startswith("__")})
    sys.modules[written_out.__name__] = written_out


def gradients(function: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The gradients of one of the reference's functions to image and masks, in a backend's calling convention."""

    def backward(grad, image, masks, inpainter, *needs):
        with torch.enable_grad():
            leaves = [x.detach().to(grad.dtype).requires_grad_() for x in (image, masks)]
            return torch.autograd.grad(function(*leaves, inpainter), leaves, grad)

    return backward


inpainting = sys.modules["iio_kernels.ops.iio_loss.written_out"]
for name in ("conditional_entropies", "inpaint"):
    setattr(inpainting, f"{name}_backward", gradients(getattr(inpainting, name)))

# The CUDA backend's kernels without a GPU: slow, so only where asked for.
# tests/ops/test_cuda_on_host.py takes some cases.
if os.environ.get("IIO_KERNELS_CUDA_ON_HOST"):
    cuda_on_host.load(cuda_on_host.build(Path(tempfile.mkdtemp())))

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
SERVING = [
    (backend, device)
    for device in DEVICES
    for backend in BACKENDS
    if BACKENDS[backend].refuses(torch.device(device)) is None
]
