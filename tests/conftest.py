"""Every test of an operation runs for every backend, on every device it serves here."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

# Before CUDA starts: deterministic algorithms, below, need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import pytest
import torch

# Before Triton starts: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import cuda_on_host
import depth

from iio_kernels.runtime import triton_support
from iio_kernels.runtime.backends import BACKENDS, OPERATIONS, Backend

# pytest-xdist's processes share the cores.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


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

# The CUDA backend's kernels without a GPU: slow, so only where asked for. tests/test_cuda_on_host.py takes some cases.
if os.environ.get("IIO_KERNELS_CUDA_ON_HOST"):
    cuda_on_host.load(cuda_on_host.build(Path(tempfile.mkdtemp())))

#: Whether the run takes the whole suite, which has time for more examples of each kind.
if "--deep" in sys.argv:
    os.environ["IIO_KERNELS_TESTS"] = "deep"  # pytest-xdist's processes do not see the command line
DEEP = os.environ.get("IIO_KERNELS_TESTS") == "deep"


def examples(number: int) -> int:
    """How many examples hypothesis draws of one test: a fifth where the run does not take the whole suite."""
    return number if DEEP else max(5, number // 5)


DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
SERVING = [
    (backend, device)
    for device in DEVICES
    for backend in BACKENDS
    if BACKENDS[backend].refuses(torch.device(device)) is None
]


def comparison(names: tuple[str, ...], relative: float) -> Callable[..., None]:
    """assert_all_close(got, expected, relative) of results that are called so, each relative to its largest value or
    1."""

    def assert_all_close(got, expected, relative: float = relative) -> None:
        for name, x, y in zip(names, got, expected, strict=True):
            scale = max(y.abs().max().item(), 1) if y.numel() else 1
            torch.testing.assert_close(
                x, y, rtol=0, atol=relative * scale, msg=lambda text, name=name: f"{name}: {text}"
            )

    return assert_all_close


def assert_refused(
    function: Callable[..., object], arguments: dict[str, object], error: type[Exception], words: list[str]
) -> None:
    """The call raises this very error, whose message begins with the first word, an argument, and has all in order."""
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) is error
    message = str(caught.value)
    assert message.startswith(f"{words[0]}: expected")
    at = 0
    for word in words:
        assert word in message[at:], f"{word!r} is not in {message[at:]!r}"
        at = message.index(word, at) + len(word)


def pytest_addoption(parser: pytest.Parser) -> None:
    depth.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist keep the order of the files, which is that of what matters first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take what the run's depth has, the longest file first: nobody is to work on it while others are through."""
    items.sort(key=lambda item: item.path.name != "test_gpu_script.py")
    depth.select(config, items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    depth.stop_in_time(item)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The tests in test_<operation>.py, or in a file that names its OPERATION, are for the backends that have it."""
    marked = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    own = {name for names in marked for name in ([names] if isinstance(names, str) else names)}
    if "serving" in metafunc.fixturenames and "serving" not in own:
        operation = getattr(metafunc.module, "OPERATION", metafunc.module.__name__.removeprefix("test_"))
        pairs = [pair for pair in SERVING if operation in BACKENDS[pair[0]].operations]
        metafunc.parametrize("serving", pairs, ids="-".join, indirect=True)


@pytest.fixture
def serving(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def backend(serving: tuple[str, str]) -> str:
    return serving[0]


@pytest.fixture
def device(serving: tuple[str, str]) -> str:
    return serving[1]


@pytest.fixture
def interpreted(serving: tuple[str, str]) -> bool:
    """Whether Triton's interpreter runs the kernels, a tenth of a second for each launch: not for many of them."""
    return serving == ("triton", "cpu")


@pytest.fixture(params=DEVICES)
def any_device(request: pytest.FixtureRequest) -> str:
    """For tests of one backend alone."""
    return request.param


@pytest.fixture(autouse=True)
def _repeatable():
    """The same random numbers each time; unwritten memory reads NaN; full float32 products on a GPU."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)
