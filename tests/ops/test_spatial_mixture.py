"""The spatial mixture against the literal formula, and the properties it promises."""

from __future__ import annotations

import literal
import pytest
import torch
from conftest import SERVING, assert_refused, comparison
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compose import _strided, random_like
from torch import Tensor
from torch.distributions import Normal

from iio_kernels import MixtureFunction, mixture_log_likelihood, spatial_mixture
from iio_kernels.runtime import backends
from iio_kernels.testing.spatial_mixture import BENCHMARKS, CASES, Case, allowed_error

# torch.compile itself makes an instance of every Function that it traces.
compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
#: Instead of all backends: those that have kernels, and the namespaces of their operators.
NAMESPACES = {"cpu": "iio_kernels", "triton": "iio_kernels_triton"}
kernels_alone = pytest.mark.parametrize(
    "serving", [pair for pair in SERVING if pair[0] in NAMESPACES], indirect=True, ids="-".join
)
NAN = float("nan")
NAMES = ("log_likelihood", "masks", "posterior", "leave_one_out", "d_decoded", "dimage", "ddecoded")


def results(function, image, decoded, incoming=None, copy=True, **options) -> tuple[Tensor, ...]:
    """What `function` returns but for views of it, and the gradients to image and decoded from those that come to the
    first three, `incoming` or else random (fixed seed)."""
    leaves = [x.detach() for x in (image, decoded)]
    leaves = [x.clone(memory_format=torch.preserve_format) if copy else x for x in leaves]
    outputs = function(*(x.requires_grad_() for x in leaves), **options)[:5]
    incoming = random_like(*outputs[:3]) if incoming is None else incoming
    return *(x.detach() for x in outputs), *torch.autograd.grad(outputs[:3], leaves, incoming)


def literally(image, decoded, incoming=None, **options) -> tuple[Tensor, ...]:
    return results(literal.spatial_mixture, image, decoded, incoming, **options)


assert_all_close = comparison(NAMES, 1e-12)


# --- the formula --------------------------------------------------------------------------------------------


@each_case
def test_equals_the_literal_formula(case, backend, device):
    tensors, options = case.make(device=device)
    assert_all_close(results(spatial_mixture, *tensors, backend=backend, **options), literally(*tensors, **options))


@pytest.mark.parametrize("case", CASES[:6], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_within_budget(case, dtype, backend, device):
    (image, decoded), options = case.make(dtype, device)
    got = results(spatial_mixture, image, decoded, backend=backend, **options)
    eager, truth = (literally(image.to(x), decoded.to(x), **options) for x in (torch.float32, torch.float64))
    kinds = (*[torch.float32] * 5, dtype, dtype)
    for name, x, plain, exact, kind in zip(NAMES, got, eager, truth, kinds, strict=True):
        assert (x.dtype, x.shape) == (kind, exact.shape)
        assert (x.double() - exact).abs().max() <= allowed_error(exact, plain.to(kind)), name


@pytest.mark.parametrize(("image_dtype", "decoded_dtype"), [(32, 16), (64, 32), (64, 0), (0, 64), (16, 0)])
def test_mixed_dtypes(image_dtype, decoded_dtype, backend, device):
    kinds = {0: torch.bfloat16, 16: torch.float16, 32: torch.float32, 64: torch.float64}
    image, decoded = Case("mixed", H=5, W=7).make(torch.float16, device)[0]
    image, decoded = image.to(kinds[image_dtype]), decoded.to(kinds[decoded_dtype])
    got = results(spatial_mixture, image, decoded, backend=backend)
    wide = kinds[max(image_dtype, decoded_dtype, 32)]
    assert [x.dtype for x in got] == [*[wide] * 5, image.dtype, decoded.dtype]
    for x, y in zip(got, literally(image.double(), decoded.double()), strict=True):
        assert (x.double() - y).abs().max() <= 100 * torch.finfo(x.dtype).eps * y.abs().max()


def test_log_likelihood_alone_is_that_of_the_mixture(backend, device):
    tensors = [x.requires_grad_() for x in Case("alone", H=5, W=7).make(torch.float32, device)[0]]
    alone, whole = (
        mixture_log_likelihood(*tensors, backend=backend),
        spatial_mixture(*tensors, backend=backend).log_likelihood,
    )
    assert torch.equal(alone, whole)
    for x, y in zip(*(torch.autograd.grad(z.sum(), tensors) for z in (alone, whole)), strict=True):
        torch.testing.assert_close(x, y)


def test_one_slot_is_a_gaussian(backend, device):
    image, decoded = Case("gaussian", K=1, H=5, W=7).make(device=device)[0]
    expected = Normal(decoded[:, 0, :-1], 0.3).log_prob(image).sum(1)
    torch.testing.assert_close(mixture_log_likelihood(image, decoded, sigma=0.3, backend=backend), expected)


def test_leave_one_out_is_the_mixture_of_the_others(backend, device):
    image, decoded = Case("others", H=5, W=7).make(device=device)[0]
    got = spatial_mixture(image, decoded, backend=backend).leave_one_out
    for k in range(4):
        others = decoded[:, [j for j in range(4) if j != k]]
        torch.testing.assert_close(got[:, k], mixture_log_likelihood(image, others, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_that_are_all_but_one_leave_accurate_likelihoods(dtype, backend, device):
    """1 - m_k is 0 in float32 then, and so are the probabilities of far means."""
    image, decoded = Case("certain", H=5, W=7).make(dtype, device)[0]
    decoded[:, :, -1] *= 100
    decoded[:, :, :-1] *= 4
    got = results(spatial_mixture, image, decoded, backend=backend)
    truth = results(spatial_mixture, image.double(), decoded.double(), backend="reference")
    assert (truth[1] > 1 - 1e-9).any()
    for name, x, y in zip(NAMES, got, truth, strict=True):
        error = (x.double() - y).abs().max()  # log p_k in the hundreds are off by some 1e-5
        assert error <= max(torch.finfo(x.dtype).eps, 3e-5) * max(y.abs().max(), 1), name


# --- derivatives --------------------------------------------------------------------------------------------


def test_d_decoded_is_the_gradient_of_the_negative_log_likelihood(backend, device):
    """And so serves the decoder's own backward pass; it and its views are constants, as leave_one_out is."""
    (image, _), _ = Case("gradient", H=5, W=7).make(device=device)
    for channels_last in (False, True):
        z = Case("gradient", H=5, W=7, channels_last=channels_last).make(device=device)[0][1].requires_grad_()
        decoded = z * 2
        mixture = spatial_mixture(image, decoded, backend=backend)
        (expected,) = torch.autograd.grad(-mixture.log_likelihood.sum(), z, retain_graph=True)
        (got,) = torch.autograd.grad(decoded, z, mixture.d_decoded, retain_graph=True)
        torch.testing.assert_close(got, expected)
        assert torch.equal(mixture.d_means, mixture.d_decoded[:, :, :3])
        assert torch.equal(mixture.d_logits, mixture.d_decoded[:, :, 3])
        differentiable = [name for name, x in mixture._asdict().items() if x.requires_grad]
        assert differentiable == ["log_likelihood", "masks", "posterior"]
        if backend in NAMESPACES:
            assert mixture.d_decoded.stride() == z.stride()


def test_backward_runs_again_and_of_each_output_alone(backend, device):
    tensors = [x.requires_grad_() for x in Case("again", H=5, W=7).make(device=device)[0]]
    outputs = spatial_mixture(*tensors, backend=backend)[:3]
    incoming = random_like(*outputs)
    first, again = (torch.autograd.grad(outputs, tensors, incoming, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again))
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    alone = [torch.autograd.grad(x, tensors, d, **options) for x, d in zip(outputs, incoming, strict=True)]
    for total, parts in zip(first, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(sum(parts), total)
    for i, x in enumerate(tensors):
        torch.testing.assert_close(torch.autograd.grad(outputs, x, incoming, retain_graph=True)[0], first[i])


def test_gradcheck(backend, device, interpreted):
    leaves = [x.requires_grad_() for x in Case("small", K=3, C=2, H=1, W=3).make(device=device)[0]]

    def function(image, decoded):
        return spatial_mixture(image, decoded, sigma=0.5, backend=backend)[:3]

    assert torch.autograd.gradcheck(function, leaves, fast_mode=interpreted)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, leaves)


def test_second_derivatives_are_the_references_alone(backend, device):
    image, decoded = (x.requires_grad_() for x in Case("twice", H=2, W=3).make(device=device)[0])
    mixture = spatial_mixture(image, decoded, backend=backend)
    for loss in (mixture.log_likelihood.sum(), mixture.masks.square().sum(), mixture.posterior.square().sum()):
        penalty = torch.autograd.grad(loss, decoded, create_graph=True)[0].square().sum()
        for x in (image, decoded):
            if backend == "reference":
                torch.autograd.grad(penalty, x, retain_graph=True, allow_unused=True)
            else:
                with pytest.raises(RuntimeError, match=r"differentiates once.*reference"):
                    torch.autograd.grad(penalty, x, retain_graph=True)


def test_functional_gradient(backend, device):
    tensors = Case("functional", H=5, W=7).make(device=device)[0]

    def loss(image, decoded):
        log_likelihood, masks, posterior, *_ = spatial_mixture(image, decoded, backend=backend)
        return log_likelihood.sum() + masks.square().sum() + posterior.square().sum()

    leaves = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for x, y in zip(torch.func.grad(loss, argnums=(0, 1))(*tensors), expected, strict=True):
        torch.testing.assert_close(x, y)


# --- layout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["transposed", "channels last, sliced", "slots last", "planes sliced", "expanded"])
def test_strided_inputs_and_incoming_gradients(how, backend, device):
    image, decoded = (_strided(x, how) for x in Case("strided", B=3, H=5, W=7).make(device=device)[0])
    plain = [x.clone(memory_format=torch.contiguous_format) for x in (image, decoded)]
    expected = results(spatial_mixture, *plain, backend=backend)
    assert_all_close(results(spatial_mixture, image, decoded, copy=False, backend=backend), expected)
    # (B, H, W) has no channels to be strided by: it is expanded over images or not.
    incoming = [x[:1].expand_as(x) if x.dim() == 3 else _strided(x, how) for x in random_like(*expected[:3])]
    assert not any(x.is_contiguous() for x in incoming)
    contiguous = results(spatial_mixture, *plain, [x.contiguous() for x in incoming], backend=backend)
    assert_all_close(results(spatial_mixture, *plain, incoming, backend=backend), contiguous)


def test_sum_sends_gradients_of_stride_zero(backend, device):
    image, decoded = Case("stride 0", H=5, W=7).make(device=device)[0]
    ones = [torch.ones_like(x) for x in literally(image, decoded)[:3]]
    expected = literally(image, decoded, ones)
    leaf = decoded.requires_grad_()
    sum(x.sum() for x in spatial_mixture(image, leaf, backend=backend)[:3]).backward()
    torch.testing.assert_close(leaf.grad, expected[-1])


@kernels_alone
def test_repeats_and_layouts_change_no_bit(backend, device):
    plain, last = (Case("bits", K=5, H=9, W=35, channels_last=x).make(torch.float32, device)[0] for x in (False, True))
    first = results(spatial_mixture, *plain, backend=backend)
    for tensors in (plain, last):
        assert all(map(torch.equal, results(spatial_mixture, *tensors, backend=backend), first))


# --- edges --------------------------------------------------------------------------------------------------


def test_a_slot_with_a_logit_of_minus_infinity_takes_no_part(backend, device):
    image, decoded = Case("closed", H=5, W=7).make(device=device)[0]
    decoded[:, 1, -1] = float("-inf")
    others = [0, 2, 3]
    got = spatial_mixture(image, decoded, backend=backend)
    expected = spatial_mixture(image, decoded[:, others], backend=backend)
    assert not got.masks[:, 1].any()
    assert not got.d_decoded[:, 1].any()
    torch.testing.assert_close(got.log_likelihood, expected.log_likelihood)
    torch.testing.assert_close(got.leave_one_out[:, 1], expected.log_likelihood)
    for name in ("masks", "leave_one_out", "d_decoded"):
        torch.testing.assert_close(getattr(got, name)[:, others], getattr(expected, name))
    leaf = decoded.requires_grad_()
    mixture_log_likelihood(image, leaf, backend=backend).sum().backward()
    torch.testing.assert_close(leaf.grad, -got.d_decoded)
    decoded = decoded.detach().clone()
    decoded[:, :3, -1] = float("-inf")  # no other slot than the last
    got = spatial_mixture(image, decoded, backend=backend)
    assert got.leave_one_out[:, 3].isnan().all()
    torch.testing.assert_close(got.leave_one_out[:, 0], got.log_likelihood)
    assert all(x.isfinite().all() for x in (got.log_likelihood, got.masks, got.posterior, got.d_decoded))


@pytest.mark.parametrize("place", ["image", "mean", "logit"])
def test_nan_goes_to_everything_that_depends_on_it(place, backend, device):
    image, decoded = Case("nan", B=3, H=5, W=7).make(device=device)[0]
    clean = results(spatial_mixture, image, decoded, backend=backend)
    x, at = {"image": (image, (1, 1)), "mean": (decoded, (1, 2, 1)), "logit": (decoded, (1, 2, 3))}[place]
    x[(*at, 3, 4)] = NAN
    got = dict(zip(NAMES, results(spatial_mixture, image, decoded, backend=backend), strict=True))
    pixel = {name: x[1, ..., 3, 4].clone() for name, x in got.items()}
    assert pixel["log_likelihood"].isnan()
    assert pixel["masks"].isnan().all() == (place == "logit")
    assert pixel["posterior"].isnan().all() == (place != "logit")
    assert pixel["leave_one_out"][[0, 1, 3]].isnan().all()
    assert pixel["d_decoded"][:, -1].isnan().all()
    assert pixel["ddecoded"][:, -1].isnan().all()
    assert pixel["dimage"].isnan().all() if place != "image" else pixel["dimage"][1].isnan()
    # Other pixels know nothing of it.
    for x, y in zip(got.values(), clean, strict=True):
        x[1, ..., 3, 4] = y[1, ..., 3, 4] = 0
        torch.testing.assert_close(x, y)


def test_inputs_are_kept_and_never_written_to(backend, device):
    tensors = [x.requires_grad_() for x in Case("kept", H=5, W=7, channels_last=True).make(device=device)[0]]
    before, kept = [x.detach().clone() for x in tensors], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        mixture = spatial_mixture(*tensors, backend=backend)
    outputs, d_decoded = mixture[:3], mixture.d_decoded.clone()
    incoming = random_like(*outputs)
    torch.autograd.backward(outputs, incoming)
    for x, y in zip((*tensors, *incoming), (*before, *random_like(*outputs)), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(mixture.d_decoded, d_decoded)
    if backend in NAMESPACES:
        results = [mixture.masks, mixture.posterior, mixture.d_decoded] if backend == "cpu" else []
        assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in (*tensors, *results)}


def test_autocast_leaves_the_arithmetic_alone(backend, device):
    tensors = Case("autocast", H=5, W=7).make(torch.float32, device)[0]
    expected = results(spatial_mixture, *tensors, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = results(spatial_mixture, *tensors, backend=backend)
    assert [x.dtype for x in got] == [torch.float32] * 7
    assert all(map(torch.equal, got, expected))


def test_function_by_itself(any_device):
    """`MixtureFunction` with the reference's kernels: the gradient as written out, against plain autograd."""
    tensors = Case("function", H=5, W=7).make(device=any_device)[0]
    got = results(lambda *x: MixtureFunction.apply(*x, 0.1, True, "reference"), *tensors)
    assert_all_close(got, results(spatial_mixture, *tensors, backend="reference"))


# --- the operators, torch.compile ---------------------------------------------------------------------------


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


# --- any shape ----------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    B=st.integers(0, 3),
    K=st.integers(2, 12),
    C=st.integers(1, 5),
    H=st.integers(1, 20),
    W=st.integers(1, 20),
    channels_last=st.booleans(),
)
def check_any_shape(backend, device, B, K, C, H, W, channels_last):
    tensors = Case("any", B, K, C, H, W, channels_last).make(device=device)[0]
    assert_all_close(results(spatial_mixture, *tensors, backend=backend), literally(*tensors))


def test_any_shape(backend, device):
    check_any_shape(backend, device)


# --- what is refused ----------------------------------------------------------------------------------------


def pair(B=2, K=4, C=3, H=5, W=6, **changes) -> dict[str, object]:
    return {"image": torch.rand(B, C, H, W), "decoded": torch.rand(B, K, C + 1, H, W), **changes}


# A row: the arguments, the type of the error, and what its message must hold in this order.
REFUSED = [
    (pair(decoded=None), TypeError, ["decoded", "torch.Tensor (B, K, C + 1, H, W)", "NoneType"]),
    (pair(decoded=torch.ones(2, 4, 4, 5, 6).int()), TypeError, ["decoded", "float32", "torch.int32"]),
    (pair(decoded=torch.rand(8, 4, 5, 6)), ValueError, ["decoded", "(B, K, C + 1, H, W)", "(8, 4, 5, 6)"]),
    (pair(K=0), ValueError, ["decoded", "slots", "(2, 0, 4, 5, 6)"]),
    (pair(C=0), ValueError, ["decoded", "one channel", "(2, 4, 1, 5, 6)"]),
    (pair(H=0), ValueError, ["decoded", "one pixel", "(2, 4, 4, 0, 6)"]),
    (pair(image=[[0.0]]), TypeError, ["image", "torch.Tensor (B, C, H, W)", "list"]),
    (pair(image=torch.zeros(2, 3, 5, 6).byte()), TypeError, ["image", "float32", "torch.uint8"]),
    (pair(image=torch.rand(2, 3, 6, 5)), ValueError, ["image", "(2, 3, 5, 6)", "decoded", "(2, 3, 6, 5)"]),
    (pair(decoded=torch.empty(2, 4, 4, 5, 6, device="meta")), ValueError, ["decoded", "device of image, cpu", "meta"]),
    (pair(sigma=0), ValueError, ["sigma", "> 0", "0"]),
    (pair(sigma=NAN), ValueError, ["sigma", "finite", "nan"]),
    (pair(sigma=torch.tensor(0.1)), TypeError, ["sigma", "number", "Tensor"]),
    (pair(backend="fastest"), ValueError, ["backend", "'auto'", "'reference'", "'fastest'"]),
]


def _name(value: object) -> str | None:
    return ", ".join(value) if isinstance(value, list) else None


@pytest.mark.parametrize("function", [spatial_mixture, mixture_log_likelihood])
@pytest.mark.parametrize(("arguments", "error", "words"), REFUSED, ids=_name)
def test_bad_arguments_are_named(function, arguments, error, words):
    assert_refused(function, arguments, error, words)


def test_one_slot_leaves_none():
    assert_refused(spatial_mixture, pair(K=1), ValueError, ["decoded", "K >= 2 slots", "(2, 1, 4, 5, 6)"])
    with pytest.raises(TypeError, match="positional"):
        spatial_mixture(*pair().values(), 0.1)


@pytest.mark.parametrize("backend", ["reference", "written_out"])
def test_no_value_is_looked_at(backend):
    """A meta tensor has none: to look at one, or to wait for the device, raises."""
    tensors = [x.to("meta").requires_grad_() for x in pair().values()]
    mixture = spatial_mixture(*tensors, backend=backend)
    assert [x.shape for x in mixture[:3]] == [(2, 5, 6), (2, 4, 5, 6), (2, 4, 5, 6)]
    sum(x.sum() for x in mixture[:3]).backward()
    assert [x.grad.shape for x in tensors] == [(2, 3, 5, 6), (2, 4, 4, 5, 6)]


# --- what it is measured on ---------------------------------------------------------------------------------


def test_bytes_and_flops_of_tetrominoes():
    case = BENCHMARKS["cpu"][0]
    # 4 slots of 4 channels and an image of 3, 35 x 35 pixels of 32 images; forward 1 + 3 x 4 + 16 results.
    assert case.bytes_moved(torch.float32) == 32 * 35 * 35 * 4 * (16 + 3 + 29)
    assert case.bytes_moved(torch.bfloat16, backward=True) == 32 * 35 * 35 * (2 * 2 * 16 + 4 * 3 + 4 * 9)
    assert case.flops() == 32 * 35 * 35 * (48 + 48 + 20 + 1 + 32)
    assert case.flops(backward=True) == 32 * 35 * 35 * (48 + 48 + 32 + 24)
