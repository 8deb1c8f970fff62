"""The CUDA kernels without a GPU: compiled for the host (see cuda_on_host), against the reference in float64.

With IIO_KERNELS_CUDA_ON_HOST=1 in the environment all of test_iio_loss*.py is for them, too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import cuda_on_host
import pytest
import torch
from torch import Tensor

from iio_kernels import conditional_entropies, iio_loss, inpaint
from iio_kernels.runtime import build
from iio_kernels.runtime.backends import BACKENDS
from iio_kernels.testing.iio_loss import CASES, Case
from iio_kernels.testing.tensors import strided

try:
    build.find_compiler()
except build.BuildError as error:
    pytest.skip(str(error), allow_module_level=True)

F32, F64 = torch.float32, torch.float64

#: What the sizes in spec.CASES leave out: several tiles either way, filters that fill shared memory or do not fit into
#: it, any number of masks and channels.
MORE = (
    Case("two tiles across", B=1, K=2, C=1, H=11, W=70),
    Case("six tiles", B=1, K=2, H=67, W=130),
    Case("small tiles", B=1, K=2, C=1, H=40, W=39, options={"kernel_size": 15, "repeats": 3}),
    Case("small tiles, many of them", B=1, K=2, C=1, H=70, W=33, options={"kernel_size": 15, "repeats": 6}),
    Case("pass by pass", B=1, K=3, H=81, W=79, options={"kernel_size": 79, "repeats": 3, "sigma": 30.0}),
    Case("pass by pass, full tiles", B=1, K=2, C=1, H=64, W=64, options={"kernel_size": 63, "repeats": 1}),
    Case("pass by pass, two tiles", B=2, K=2, C=2, H=66, W=70, options={"kernel_size": 65, "repeats": 5}),
    Case("many channels", B=1, K=3, C=7, H=12, W=13),
    Case("two channels", B=1, K=4, C=2, H=12, W=13),
    Case("six channels", B=1, K=3, C=6, H=12, W=13),
    Case("eight masks", B=1, K=8, H=11, W=12),
    Case("nine masks", B=1, K=9, C=1, H=11, W=11),
    Case("eleven masks", B=1, K=11, C=3, H=3, W=4, options={"kernel_size": 3}),
)
TAPS = tuple(
    Case(f"{taps} taps, {repeats} times", B=1, K=2, C=1, H=17, W=19, options={"kernel_size": taps, "repeats": repeats})
    for taps in (3, 5, 7, 9, 13, 15)
    for repeats in (1, 2, 3)
)


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The library, whose backend is there for the tests of this file alone: others count the backends."""
    if "cuda_on_host" in BACKENDS:  # it was asked for, for all tests
        yield Path(next(name for name in torch.ops.loaded_libraries if "cuda_on_host" in name))
        return
    path = cuda_on_host.build(tmp_path_factory.mktemp("cuda"))
    cuda_on_host.load(path)
    yield path
    del BACKENDS["cuda_on_host"]


def function_of(case: Case, name: str, backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name == "sampled":
        generator = torch.Generator()
        options = {"reduction": "none", "subsets": 2 * case.K + 2, "generator": generator}
        return lambda *x: generator.manual_seed(0) and iio_loss(*x, backend=backend, **case.options, **options)
    function = {"loss": iio_loss, "entropies": conditional_entropies, "psi": inpaint}[name]
    options = {"reduction": "none"} if name == "loss" else {}
    return lambda image, masks: function(image, masks, backend=backend, **case.options, **options)


def results(case: Case, dtype: torch.dtype, backend: str, arithmetic: torch.dtype | None = None) -> dict[str, Tensor]:
    """All that the kernels compute: the losses, entropies, psi and the gradients of all of these."""
    tensors = [x.to(arithmetic or dtype) for x in case.make(dtype)[0]]
    got = {}
    for name in ("loss", "sampled", "entropies", "psi"):
        function = function_of(case, name, backend)
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = function(*leaves)
        incoming = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
        got[name] = out.detach()
        if case.smooth or name == "psi":
            got[f"{name}: dimage"], got[f"{name}: dmasks"] = torch.autograd.grad(out, leaves, incoming)
    with torch.no_grad():
        got["loss alone"] = function_of(case, "loss", backend)(*tensors)
    return got


# A single tap predicts every pixel by itself: what is left is rounding, and no digit of it is right.
EXACT = [case for case in CASES if case.image == "noise" and case.options.get("kernel_size") != 1]


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", [*EXACT, *MORE, *TAPS], ids=lambda case: case.name)
def test_kernels_against_the_reference(case, dtype):
    got, expected = results(case, dtype, "cuda_on_host"), results(case, dtype, "reference", F64)
    for name, x in got.items():
        tolerance = 1e-11 if dtype == F64 else 2e-6 if case.K <= 7 else 1e-5
        largest = expected[name].abs().max().item() if x.numel() else 0
        torch.testing.assert_close(
            x.double(), expected[name], rtol=0, atol=tolerance * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", [case for case in CASES if case not in EXACT], ids=lambda case: case.name)
def test_where_all_residuals_are_0(case):
    for name, x in results(case, F32, "cuda_on_host").items():
        assert x.isfinite().all()
        if name in ("loss", "sampled", "entropies"):
            torch.testing.assert_close(x.double(), results(case, F32, "reference", F64)[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("K", range(2, 17))
@pytest.mark.parametrize(("C", "dtype"), [(1, F32), (3, F32), (2, F64)], ids=["gray", "color", "float64"])
def test_every_number_of_masks_has_its_kernels(K, C, dtype):
    """On images of a few pixels: against all terms, or where these take long against the other compiled kernels."""
    if K > 12 and BACKENDS["cpu"].missing() is not None:
        pytest.skip("no other kernels for so many masks")
    case = Case("few pixels", B=1, C=C, K=K, H=2, W=3, options={"kernel_size": 1, "eps": 0.3})
    (image, masks), _ = case.make(dtype)
    loss, leaves = function_of(case, "loss", "cuda_on_host"), [x.requires_grad_() for x in (image, masks)]
    tolerance = 1e-12 if dtype == F64 else 1e-4

    def assert_like(x, y):
        torch.testing.assert_close(x.double(), y.double(), rtol=tolerance, atol=tolerance * y.abs().max().item())

    got = loss(*leaves).sum()
    gradients = torch.autograd.grad(got, leaves)
    others = [x.detach().double().requires_grad_() for x in leaves] if K > 12 else leaves
    if K > 12:
        expected = function_of(case, "loss", "cpu")(*others).sum()
    else:
        expected = -function_of(case, "entropies", "cuda_on_host")(*leaves).sum()
    assert_like(got, expected)
    for x, y in zip(gradients, torch.autograd.grad(expected, others), strict=True):
        assert_like(x, y)
    if K <= 10:
        exact = [x.detach().double().requires_grad_() for x in leaves]
        expected = function_of(case, "loss", "reference")(*exact)
        assert_like(loss(*leaves).double(), expected)
        for x, y in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
            assert_like(x.double(), y)


@pytest.mark.parametrize("how", ["transposed", "channels last", "sliced", "expanded"])
def test_strided_planes(how):
    case = Case("strided", B=3)
    image, masks = case.make()[0]
    views = [strided(x, how) for x in (image, masks)]
    for name in ("loss", "sampled", "entropies", "psi"):
        function = function_of(case, name, "cuda_on_host")
        torch.testing.assert_close(function(*views), function(*(x.contiguous() for x in views)), rtol=0, atol=0)


@pytest.mark.long
def test_threads_may_run_in_any_order(monkeypatch):
    """Not a bit changes where a block's threads run in the reverse order between barriers: they do not race."""
    for case in (CASES[0], *MORE[:6], *MORE[9:]):
        got = results(case, F32, "cuda_on_host")
        with monkeypatch.context() as patch:
            patch.setenv("IIO_HOST_ORDER", "descending")
            reverse = results(case, F32, "cuda_on_host")
        for name, x in got.items():
            assert torch.equal(x, reverse[name]), (case.name, name)


def test_launches(library):
    """What a call costs a GPU at least, however small its images."""
    launched = ctypes.CDLL(str(library)).cuda_on_host_launches
    leaves = [x.requires_grad_() for x in CASES[0].make()[0]]

    def count(function, *arguments) -> int:
        before = launched()
        function(*arguments)
        return launched() - before

    for name, forward, backward in (("loss", 3, 0), ("sampled", 3, 0), ("entropies", 2, 3), ("psi", 2, 3)):
        function = function_of(CASES[0], name, "cuda_on_host")
        out = function(*leaves)
        assert count(function, *leaves) == forward
        assert count(out.sum().backward) == backward
    with torch.no_grad():
        assert count(function_of(CASES[0], "loss", "cuda_on_host"), *leaves) == 3
    wide = Case("wide", B=1, K=2, C=1, H=81, W=79, options={"kernel_size": 79, "repeats": 2})
    assert count(function_of(wide, "loss", "cuda_on_host"), *(x.requires_grad_() for x in wide.make()[0])) == 3 + 2 * 4


def test_what_the_operators_refuse():
    (image, masks), _ = CASES[0].make(F32)
    operator, options = torch.ops.iio_kernels_on_host.iio_loss, (5.0, 11, 2, 1e-8, True, True)
    with pytest.raises(RuntimeError, match="expected 2 to 16 masks, got 17"):
        operator(image, torch.rand(2, 17, 13, 12), *options)
    with pytest.raises(RuntimeError, match="must have one dtype"):
        operator(image, masks.double(), *options)
    with pytest.raises(RuntimeError, match="could not be launched: so many channels and masks do not fit"):
        operator(torch.rand(2, 30000, 1, 1), masks[:, :, :1, :1], 5.0, 1, *options[2:])  # their sums are too many
