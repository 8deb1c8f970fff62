"""Every test of an operation runs for every backend, on every device it serves here."""

from __future__ import annotations

import os

# Before CUDA starts: deterministic algorithms, below, need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

# Before Triton starts: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import depth
from serving import DEVICES, SERVING

from iio_kernels.runtime.backends import BACKENDS

# pytest-xdist's processes share the cores.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


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
