"""The IIO loss estimated from some subsets: every backend sums alike."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_refused
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import DTYPES, compiles, each_dtype

from iio_kernels import iio_loss
from iio_kernels.ops.iio_loss import sampling
from iio_kernels.testing.iio_loss import Case, allowed_error, assert_all_close, results, run_drawn, seeded
from iio_kernels.testing.tensors import strided

OPERATION = "iio_loss"
NAMESPACES = {
    "cpu": "iio_kernels",
    "cuda": "iio_kernels",
    "triton": "iio_kernels_triton",
    "cuda_on_host": "iio_kernels_on_host",
}
#: Several blocks of channels, an odd number of pixels, more masks than all subsets could be visited of.
CASES = (
    Case("two masks", K=2, H=11, W=11),
    Case("nine masks, one channel", C=1, K=9, B=3, H=5, W=7, options={"kernel_size": 3}),
    Case("twenty masks", B=2, K=20, H=11, W=13),
    Case("twenty masks, five channels", B=1, C=5, K=20, H=4, W=5, options={"kernel_size": 3, "sigma": 1.0}),
    Case("thirty-two masks", B=2, C=3, K=32, H=9, W=7, options={"kernel_size": 5, "repeats": 1}),
    Case("no images", B=0, K=20),
)
named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
NAN = float("nan")


# --- the kernels ------------------------------------------------------------------------------------------


@named
def test_kernels_equal_the_formula(case, backend, device):
    tensors, options = case.make(device=device)
    assert_all_close(
        run_drawn(*tensors, backend, **options), run_drawn(*tensors, "reference", **options), relative=1e-9
    )


@named
@each_dtype
def test_error_is_within_budget(case, dtype, backend, device):
    (image, masks), options = case.make(dtype, device)
    options |= {"terms": "mean"}  # gradients of their sum are beyond float16
    got = run_drawn(image, masks, backend, **options)
    eager = run_drawn(image.float(), masks.float(), "reference", **options)
    truth = run_drawn(image.double(), masks.double(), "reference", **options)
    for name, x, plain, exact in zip(("loss", "dimage", "dmasks"), got, eager, truth, strict=True):
        assert x.dtype == (torch.float32 if name == "loss" else dtype)
        assert x.shape == exact.shape
        if exact.numel():
            assert (x.double() - exact).abs().max() <= allowed_error(exact, plain.to(x.dtype)), name


@pytest.mark.parametrize("wanted", ["image", "masks", "none"])
def test_gradients_that_are_not_wanted(wanted, backend, device):
    (image, masks), _ = Case("one", K=9).make(device=device)
    loss, dimage, dmasks = run_drawn(image, masks, backend, torch.ones(2, dtype=image.dtype, device=device))
    leaf = image.requires_grad_() if wanted == "image" else masks.requires_grad_(wanted == "masks")
    options = {"subsets": 14, "generator": seeded(0, device), "backend": backend}
    got = iio_loss(image, masks, reduction="sum", **options)
    torch.testing.assert_close(got.detach(), loss.sum())
    assert got.requires_grad == (wanted != "none")
    if wanted != "none":
        got.backward()
        torch.testing.assert_close(leaf.grad, dimage if wanted == "image" else dmasks)


@pytest.mark.long("reference", "triton")
def test_gradcheck(backend, device, interpreted):
    case = Case("small", B=1, C=2, K=5, H=4, W=5, options={"sigma": 1.0, "kernel_size": 3, "eps": 1e-3})
    tensors, options = case.make(device=device)
    leaves = [x.requires_grad_() for x in tensors]

    def function(image, masks):
        more = {"subsets": 12, "generator": seeded(0, device), "backend": backend}
        return iio_loss(image, masks, reduction="none", **more, **options)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=interpreted)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    else:
        (gradient,) = torch.autograd.grad(function(*leaves).sum(), leaves[1], create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiates once.*reference"):
            gradient.square().sum().backward()


@pytest.mark.long("triton")
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(wanted, dtype, backend, device):
    if backend not in NAMESPACES:
        pytest.skip("it has no operators")
    (image, masks), _ = Case("checked", K=9).make(dtype, device)
    draw = sampling.draw(2, 9, 14, image.device)
    operator = getattr(torch.ops, NAMESPACES[backend]).sampled_iio_loss.default
    arguments = image, masks, draw.pairs, draw.weights.to(dtype), 5.0, 11, 2, 1e-8, *wanted
    torch.library.opcheck(operator, arguments)


@pytest.mark.long("reference", "triton", "written_out")
@compiles
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic, backend, device):
    """With torch's own generator: the compiled draw is the eager one."""

    def function(image, masks):
        return iio_loss(image, masks, reduction="none", backend=backend, subsets=12)

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for B, H, W in ((2, 13, 12), (3, 20, 17)) if dynamic else ((2, 13, 12),):
        tensors, _ = Case("compiled", B=B, K=5, H=H, W=W).make(device=device)
        torch.manual_seed(B)
        got = results(compiled, *tensors)
        torch.manual_seed(B)
        assert_all_close(got, results(function, *tensors))


@pytest.mark.long("triton")
@pytest.mark.parametrize("how", ["transposed", "channels last", "sliced", "expanded"])
def test_strided_inputs(how, backend, device):
    (image, masks), _ = Case("strided", B=3, K=9).make(device=device)
    views = [strided(x, how).detach() for x in (image, masks)]
    assert not any(x.is_contiguous() for x in views)
    expected = run_drawn(*(x.clone(memory_format=torch.contiguous_format) for x in views), backend)
    leaves = [x.requires_grad_() for x in views]
    options = {"subsets": 14, "generator": seeded(0, device), "reduction": "none", "backend": backend}
    losses = iio_loss(*leaves, **options)
    gradients = torch.autograd.grad(losses, leaves, torch.linspace(-1, 2, 3).to(losses))
    assert_all_close((losses.detach(), *gradients), expected)


@pytest.mark.long("triton")
def test_strided_incoming_gradients(backend, device):
    (image, masks), _ = Case("strided", B=3, K=6).make(device=device)
    values = torch.tensor([0.5, NAN, -1.0, NAN, 2.0, NAN], dtype=image.dtype, device=device)
    for incoming in (values[::2], values[0].expand(3)):
        assert_all_close(
            run_drawn(image, masks, backend, incoming), run_drawn(image, masks, backend, incoming.contiguous())
        )


@pytest.mark.long("triton")
def test_bitwise_repeatable_and_inputs_left_alone(backend, device):
    tensors, _ = Case("repeated", K=20).make(torch.float32, device)
    before = [x.clone() for x in tensors]
    assert all(map(torch.equal, run_drawn(*tensors, backend), run_drawn(*tensors, backend)))
    assert all(map(torch.equal, tensors, before))
    assert not torch.equal(run_drawn(*tensors, backend)[0], run_drawn(*tensors, backend, seed=1)[0])


@pytest.mark.parametrize("place", ["image", "masks"])
def test_nan_goes_into_loss_and_gradients_of_its_image_alone(place, backend, device):
    (image, masks), _ = Case("nan", B=3, K=9).make(device=device)
    clean = run_drawn(image, masks, backend)
    poisoned = {"image": image.clone(), "masks": masks.clone()}
    poisoned[place][1, 1, 5, 6] = NAN
    got = run_drawn(poisoned["image"], poisoned["masks"], backend)
    assert got[0][1].isnan()
    assert got[1][1, 1].isnan().all()
    assert got[2][1].isnan().all()
    for x, y in zip(got, clean, strict=True):
        assert_all_close([x[::2]] * 3, [y[::2]] * 3)


@pytest.mark.parametrize("mask", [0, 1])
def test_nan_in_either_set_of_a_pair(mask, backend, device):
    (image, masks), _ = Case("nan", K=2).make(device=device)
    masks[:, mask, 5, 6] = NAN
    for x in run_drawn(image, masks, backend):
        assert x.isnan().all()


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_empty_masks(eps, backend, device):
    """Terms of an empty mask, and of a set of such, are 0 with zero gradient."""
    (image, masks), _ = Case("empty", K=9).make(device=device)
    masks[:, 3:] = 0
    masks[:, 0] += 1 - masks.sum(1)
    options = {"eps": eps, "kernel_size": 5}
    got, expected = run_drawn(image, masks, backend, **options), run_drawn(image, masks, "reference", **options)
    assert all(x.isfinite().all() for x in got)
    assert_all_close(got, expected, relative=1e-9)
    for x in run_drawn(image, torch.zeros_like(masks), backend, **options):
        assert (x == 0).all()


@pytest.mark.long("triton")
def test_autocast_leaves_the_arithmetic_alone(backend, device):
    tensors, _ = Case("autocast", K=9).make(torch.float32, device)
    options = {"subsets": 14, "reduction": "none", "backend": backend}

    def loss(image, masks):
        with torch.autocast(device, dtype=torch.bfloat16):
            return iio_loss(image, masks, generator=seeded(0, device), **options)

    assert all(map(torch.equal, results(loss, *tensors), run_drawn(*tensors, backend)))


def test_a_draw_in_inference_mode_leaves_training_alone(backend, device):
    """What is kept of it between calls could not be kept for a gradient."""
    (image, masks), _ = Case("inference", K=7).make(device=device)
    with torch.inference_mode():
        iio_loss(image, masks, subsets=34, backend=backend)
    masks.requires_grad_()
    iio_loss(image, masks, subsets=34, backend=backend).backward()
    assert masks.grad.abs().max() > 0


@settings(max_examples=examples(25), deadline=None, derandomize=True)
@given(
    B=st.integers(0, 3),
    C=st.integers(1, 4),
    K=st.integers(2, 32),
    H=st.integers(3, 12),
    W=st.integers(3, 12),
    more=st.integers(0, 40),
    dtype=st.sampled_from([torch.float64, *DTYPES]),
)
def check_any_shape(backend, device, interpreted, B, C, K, H, W, more, dtype):
    if interpreted:
        K, more = min(K, 7), more % 8
    tensors, _ = Case("any", B, C, K, H, W).make(dtype, device)
    options = {"subsets": sampling.least(K) + more, "kernel_size": 3, "sigma": 1.0}
    got = run_drawn(*tensors, backend, **options)
    exact = run_drawn(*(x.double() for x in tensors), "reference", **options)
    assert [x.shape for x in got] == [x.shape for x in exact]
    assert [x.dtype for x in got[1:]] == [dtype, dtype]
    if dtype == torch.float64:
        assert_all_close(got, exact, relative=1e-9)
    elif B > 0:
        torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-5, atol=0)


@pytest.mark.long("triton")
def test_any_shape(backend, device, interpreted):
    check_any_shape(backend, device, interpreted)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("K", "options", "error", "words"),
    [
        (8, {"subsets": 16.0}, TypeError, ["subsets", "an int or None", "float"]),
        (8, {"subsets": True}, TypeError, ["subsets", "an int or None", "bool"]),
        (8, {"subsets": 7}, ValueError, ["subsets", "at least 8 for 8 masks", "got 7"]),
        (9, {"subsets": 7}, ValueError, ["subsets", "at least 8 for 9 masks", "got 7"]),
        (2, {"subsets": 0}, ValueError, ["subsets", "at least 2", "got 0"]),
        (33, {"subsets": 64}, ValueError, ["masks", "at most 32 masks with subsets=", "got 33"]),
        (1, {"subsets": 64}, ValueError, ["masks", "at least 2"]),
        (4, {"generator": torch.Generator()}, ValueError, ["generator", "None where subsets is None"]),
        (4, {"generator": 0, "subsets": 8}, TypeError, ["generator", "a torch.Generator or None", "int"]),
        (13, {"backend": "reference"}, ValueError, ["masks", "at most 12", "got 13", "subsets="]),
        (17, {}, ValueError, ["masks", "at most", "got 17", "subsets="]),
    ],
)
def test_refused(K, options, error, words):
    arguments = {"image": torch.rand(1, 3, 12, 12), "masks": torch.rand(1, K, 12, 12), **options}
    assert_refused(iio_loss, arguments, error, words)


def test_a_generator_of_another_device_is_refused():
    tensors = {"image": torch.rand(1, 3, 12, 12, device="meta"), "masks": torch.rand(1, 8, 12, 12, device="meta")}
    words = ["generator", "images' device, meta", "cpu"]
    assert_refused(iio_loss, {**tensors, "subsets": 16, "generator": torch.Generator()}, ValueError, words)
