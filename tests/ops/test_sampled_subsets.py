"""The IIO loss estimated from some subsets: the draw is unbiased and varies little, and every backend sums alike."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import assert_refused, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_iio_loss import DTYPES, NAN, _strided, assert_all_close, compiles, each_dtype, results
from torch import Tensor

from iio_kernels import iio_loss
from iio_kernels.ops.iio_loss import reference, sampling
from iio_kernels.ops.iio_loss.common import Inpainter
from iio_kernels.testing.iio_loss import Case, allowed_error

OPERATION = "iio_loss"
CPU = torch.device("cpu")
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


def seeded(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def run(image: Tensor, masks: Tensor, backend: str, incoming: Tensor | None = None, seed: int = 0, **options):
    """Each image's loss and the gradients to image and masks, for the draw of a seed."""
    options = {
        "subsets": max(14, sampling.least(masks.shape[1])),
        **options,
        "generator": seeded(seed, image.device),
        "backend": backend,
    }
    return results(iio_loss, image, masks, incoming, reduction="none", **options)


def scene(kind: str, K: int, B: int, size: int = 7) -> tuple[Tensor, Tensor, dict[str, object]]:
    """B times the same image and masks, each of which has a draw of its own."""
    case = Case("once", B=1, C=1, K=K, H=size, W=size, options={"kernel_size": 5, "sigma": 2.0})
    (image, masks), options = case.make()
    if kind == "nearly one-hot":
        masks = (8 * torch.nn.functional.one_hot(masks.argmax(1), K).movedim(-1, 1) + masks.log()).softmax(1)
    return image.expand(B, -1, -1, -1), masks.expand(B, -1, -1, -1), options


# --- the draw -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("K", "subsets"), [(2, 2), (3, 2), (5, 12), (6, 6), (8, 240), (8, 254), (12, 2000), (24, 256), (32, 32)]
)
def test_a_design_is_of_distinct_pairs_with_the_weights_of_their_sizes(K, subsets):
    words, weights = sampling.design(K, subsets // 2)
    full = 2**K - 1
    assert len(words) == subsets // 2
    assert len({min(word, full - word) for word in words}) == len(words)
    for size in range(1, K // 2 + 1):
        own = [weight for word, weight in zip(words, weights, strict=True) if word.bit_count() == size]
        assert sum(own) == pytest.approx(math.comb(K, size) / (1 + (2 * size == K)))
        assert len(set(own)) == 1


@pytest.mark.parametrize(("K", "subsets"), [(3, 2), (4, 4), (4, 8), (5, 8), (6, 6), (6, 20)])
def test_every_subset_has_the_expected_weight_1(K, subsets):
    """Exactly: over all K! orders, each of which is equally likely."""
    words, weights = sampling.design(K, subsets // 2)
    orders = torch.tensor(list(itertools.permutations(range(K))))
    pairs = sampling.renamed(torch.tensor(words), orders)
    sets = torch.cat([pairs, 2**K - 1 - pairs], 1)
    expected = torch.zeros(2**K, dtype=torch.float64)
    expected.index_put_((sets,), torch.tensor(weights, dtype=torch.float64).repeat(2) / len(orders), accumulate=True)
    torch.testing.assert_close(expected[1:-1], torch.ones(2**K - 2, dtype=torch.float64))
    assert expected[0] == expected[-1] == 0


def test_every_order_of_the_masks_is_equally_likely():
    """The word with mask 0 in one set, 1 and 2 in another, and so on tells the order; chi-square, 23 degrees."""
    words, B = torch.tensor([1, 2, 4]), 24_000
    names = torch.empty(B, 4, dtype=torch.float64).uniform_(generator=seeded()).argsort(1)
    _, counts = sampling.renamed(words, names).unique(dim=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - B / 24) ** 2 / (B / 24)).sum() < 60
    draw = sampling.draw(B, 4, 4, CPU, seeded())
    _, counts = draw.pairs.unique(dim=0, return_counts=True)
    assert counts.max() < 1.2 * counts.min()


def test_images_have_draws_of_their_own_that_a_generator_repeats(any_device):
    device = torch.device(any_device)
    first, again = (sampling.draw(9, 20, 64, device, seeded(3, any_device)) for _ in range(2))
    assert torch.equal(first.pairs, again.pairs)
    assert first.pairs.shape == (9, 32)
    assert len(first.pairs.unique(dim=0)) == 9
    generator = seeded(3, any_device)
    assert torch.equal(sampling.draw(9, 20, 64, device, generator).pairs, first.pairs)
    assert not torch.equal(sampling.draw(9, 20, 64, device, generator).pairs, first.pairs)
    torch.manual_seed(5)
    default = sampling.draw(9, 20, 64, device)
    torch.manual_seed(5)
    assert torch.equal(sampling.draw(9, 20, 64, device).pairs, default.pairs)


# --- the estimate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["soft", "nearly one-hot"])
def test_the_mean_over_draws_is_the_loss_and_its_gradient(kind):
    """Within the standard error, each of the gradients' elements, too."""
    image, masks, options = scene(kind, K=8, B=3000)
    exact = results(iio_loss, image[:1], masks[:1], torch.ones(1, dtype=image.dtype), reduction="none", **options)
    ones = torch.ones(3000, dtype=image.dtype)
    for estimate, expected in zip(run(image, masks, "reference", ones, subsets=24, **options), exact, strict=True):
        error = estimate.std(0, keepdim=True) / len(ones) ** 0.5
        assert (error > 0).any()
        z = (estimate.mean(0, keepdim=True) - expected) / (error + 1e-12 * expected.abs().max())
        assert z.abs().max() < 5
        assert z.square().mean() < 2.5


@pytest.mark.parametrize("kind", ["soft", "nearly one-hot"])
@pytest.mark.parametrize("subsets", [16, 32, 48])
def test_variance_is_below_half_of_that_of_plain_sampling(kind, subsets):
    """Against as many of the 62 sets, drawn uniformly and independently, whose variance can be told exactly."""
    K, B = 6, 1000
    image, masks, options = scene(kind, K, B)
    inpainter = Inpainter(repeats=2, eps=1e-8, **options)
    leaf = masks[:1].clone().requires_grad_()
    g = leaf / leaf.sum((-2, -1), keepdim=True)
    every = reference._Every(K)
    e = reference._errors(image[:1], leaf, inpainter, every)
    losses = -(every.sums_outside(g) * e).sum((2, 3))[0, 1:-1]
    gradients = torch.stack([torch.autograd.grad(loss, leaf, retain_graph=True)[0].flatten() for loss in losses])
    loss, _, dmasks = run(image, masks, "reference", torch.ones(B, dtype=image.dtype), subsets=subsets, **options)
    for one, estimates in ((losses.detach()[:, None], loss[:, None]), (gradients, dmasks.flatten(1))):
        plain = len(one) ** 2 / subsets * one.var(0, correction=0).sum()
        assert estimates.var(0).sum() < 0.5 * plain


@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("more", [0, 1, 1000])
def test_all_subsets_are_the_exact_loss(K, more, backend, device):
    (image, masks), _ = Case("all", K=K).make(device=device)
    expected = results(iio_loss, image, masks, reduction="none", backend=backend)
    assert_all_close(run(image, masks, backend, subsets=2**K - 2 + more), expected)


def test_terms_and_reductions(backend, device):
    (image, masks), _ = Case("reduced", B=3, K=20).make(device=device)

    def loss(**options):
        return iio_loss(image, masks, subsets=24, generator=seeded(0, device), backend=backend, **options)

    losses = loss(reduction="none")
    assert losses.shape == (3,)
    torch.testing.assert_close(loss(), losses.mean())
    torch.testing.assert_close(loss(reduction="sum"), losses.sum())
    torch.testing.assert_close(loss(terms="mean"), losses.mean() / (2**19 - 1))
    assert -20 <= loss(terms="mean") <= 0


# --- the kernels ----------------------------------------------------------------------------------------------------


@named
def test_kernels_equal_the_formula(case, backend, device):
    tensors, options = case.make(device=device)
    assert_all_close(run(*tensors, backend, **options), run(*tensors, "reference", **options), relative=1e-9)


@named
@each_dtype
def test_error_is_within_budget(case, dtype, backend, device):
    (image, masks), options = case.make(dtype, device)
    options |= {"terms": "mean"}  # gradients of their sum are beyond float16
    got = run(image, masks, backend, **options)
    eager = run(image.float(), masks.float(), "reference", **options)
    truth = run(image.double(), masks.double(), "reference", **options)
    for name, x, plain, exact in zip(("loss", "dimage", "dmasks"), got, eager, truth, strict=True):
        assert x.dtype == (torch.float32 if name == "loss" else dtype)
        assert x.shape == exact.shape
        if exact.numel():
            assert (x.double() - exact).abs().max() <= allowed_error(exact, plain.to(x.dtype)), name


@pytest.mark.parametrize("wanted", ["image", "masks", "none"])
def test_gradients_that_are_not_wanted(wanted, backend, device):
    (image, masks), _ = Case("one", K=9).make(device=device)
    loss, dimage, dmasks = run(image, masks, backend, torch.ones(2, dtype=image.dtype, device=device))
    leaf = image.requires_grad_() if wanted == "image" else masks.requires_grad_(wanted == "masks")
    options = {"subsets": 14, "generator": seeded(0, device), "backend": backend}
    got = iio_loss(image, masks, reduction="sum", **options)
    torch.testing.assert_close(got.detach(), loss.sum())
    assert got.requires_grad == (wanted != "none")
    if wanted != "none":
        got.backward()
        torch.testing.assert_close(leaf.grad, dimage if wanted == "image" else dmasks)


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


@pytest.mark.parametrize("how", ["transposed", "channels last", "sliced", "expanded"])
def test_strided_inputs(how, backend, device):
    (image, masks), _ = Case("strided", B=3, K=9).make(device=device)
    views = [_strided(x, how).detach() for x in (image, masks)]
    assert not any(x.is_contiguous() for x in views)
    expected = run(*(x.clone(memory_format=torch.contiguous_format) for x in views), backend)
    leaves = [x.requires_grad_() for x in views]
    options = {"subsets": 14, "generator": seeded(0, device), "reduction": "none", "backend": backend}
    losses = iio_loss(*leaves, **options)
    gradients = torch.autograd.grad(losses, leaves, torch.linspace(-1, 2, 3).to(losses))
    assert_all_close((losses.detach(), *gradients), expected)


def test_strided_incoming_gradients(backend, device):
    (image, masks), _ = Case("strided", B=3, K=6).make(device=device)
    values = torch.tensor([0.5, NAN, -1.0, NAN, 2.0, NAN], dtype=image.dtype, device=device)
    for incoming in (values[::2], values[0].expand(3)):
        assert_all_close(run(image, masks, backend, incoming), run(image, masks, backend, incoming.contiguous()))


def test_bitwise_repeatable_and_inputs_left_alone(backend, device):
    tensors, _ = Case("repeated", K=20).make(torch.float32, device)
    before = [x.clone() for x in tensors]
    assert all(map(torch.equal, run(*tensors, backend), run(*tensors, backend)))
    assert all(map(torch.equal, tensors, before))
    assert not torch.equal(run(*tensors, backend)[0], run(*tensors, backend, seed=1)[0])


@pytest.mark.parametrize("place", ["image", "masks"])
def test_nan_goes_into_loss_and_gradients_of_its_image_alone(place, backend, device):
    (image, masks), _ = Case("nan", B=3, K=9).make(device=device)
    clean = run(image, masks, backend)
    poisoned = {"image": image.clone(), "masks": masks.clone()}
    poisoned[place][1, 1, 5, 6] = NAN
    got = run(poisoned["image"], poisoned["masks"], backend)
    assert got[0][1].isnan()
    assert got[1][1, 1].isnan().all()
    assert got[2][1].isnan().all()
    for x, y in zip(got, clean, strict=True):
        assert_all_close([x[::2]] * 3, [y[::2]] * 3)


@pytest.mark.parametrize("mask", [0, 1])
def test_nan_in_either_set_of_a_pair(mask, backend, device):
    (image, masks), _ = Case("nan", K=2).make(device=device)
    masks[:, mask, 5, 6] = NAN
    for x in run(image, masks, backend):
        assert x.isnan().all()


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_empty_masks(eps, backend, device):
    """Terms of an empty mask, and of a set of such, are 0 with zero gradient."""
    (image, masks), _ = Case("empty", K=9).make(device=device)
    masks[:, 3:] = 0
    masks[:, 0] += 1 - masks.sum(1)
    options = {"eps": eps, "kernel_size": 5}
    got, expected = run(image, masks, backend, **options), run(image, masks, "reference", **options)
    assert all(x.isfinite().all() for x in got)
    assert_all_close(got, expected, relative=1e-9)
    for x in run(image, torch.zeros_like(masks), backend, **options):
        assert (x == 0).all()


def test_autocast_leaves_the_arithmetic_alone(backend, device):
    tensors, _ = Case("autocast", K=9).make(torch.float32, device)
    options = {"subsets": 14, "reduction": "none", "backend": backend}

    def loss(image, masks):
        with torch.autocast(device, dtype=torch.bfloat16):
            return iio_loss(image, masks, generator=seeded(0, device), **options)

    assert all(map(torch.equal, results(loss, *tensors), run(*tensors, backend)))


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
    got = run(*tensors, backend, **options)
    exact = run(*(x.double() for x in tensors), "reference", **options)
    assert [x.shape for x in got] == [x.shape for x in exact]
    assert [x.dtype for x in got[1:]] == [dtype, dtype]
    if dtype == torch.float64:
        assert_all_close(got, exact, relative=1e-9)
    elif B > 0:
        torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-5, atol=0)


def test_any_shape(backend, device, interpreted):
    check_any_shape(backend, device, interpreted)


# --- what is refused ------------------------------------------------------------------------------------------------


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
