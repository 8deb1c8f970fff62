"""Slot composition against the literal formula, and the properties it promises."""

from __future__ import annotations

import literal
import pytest
import torch
import torch.nn.functional as F
from conftest import SERVING, assert_refused, comparison, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iio_kernels import CompositionFunction, compose, composition_error
from iio_kernels.runtime import backends
from iio_kernels.testing.compose import BENCHMARKS, CASES, Case, allowed_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# torch.compile itself makes an instance of every Function that it traces.
compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
#: Instead of all backends: those that have kernels, and the namespaces of their operators.
NAMESPACES = {"cpu": "iio_kernels", "triton": "iio_kernels_triton"}
kernels_alone = pytest.mark.parametrize(
    "serving", [pair for pair in SERVING if pair[0] in NAMESPACES], indirect=True, ids="-".join
)
NAN = float("nan")
NAMES = ("error or reconstruction", "masks", "dimage", "ddecoded")


def random_like(*tensors: Tensor) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=random).to(x) for x in tensors]


def results(function, image, decoded, incoming=None, **options) -> tuple[Tensor, ...]:
    """What `function` returns, and the gradients to image and decoded (0 where there is none) from those that come in,
    `incoming` or else random (fixed seed)."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in (image, decoded)]
    outputs = function(*leaves, **options)
    incoming = random_like(*outputs) if incoming is None else incoming
    gradients = torch.autograd.grad(outputs, leaves, incoming, allow_unused=True, materialize_grads=True)
    return *(x.detach() for x in outputs), *gradients


def run(image, decoded, backend: str, incoming=None) -> tuple[Tensor, ...]:
    """Each image's error, the masks, and the gradients to image and decoded."""
    options = {"reduction": "none", "return_masks": True, "backend": backend}
    return results(composition_error, image, decoded, incoming, **options)


def composed(image, decoded, backend: str | None = None, incoming=None) -> tuple[Tensor, ...]:
    """The reconstruction, the masks, no gradient to the image, and that to decoded; literal without a backend."""
    options = {} if backend is None else {"backend": backend}
    function = literal.compose if backend is None else compose
    return results(lambda _, decoded: function(decoded, **options), image, decoded, incoming)


assert_all_close = comparison(NAMES, 1e-12)


# --- the formula --------------------------------------------------------------------------------------------


@each_case
def test_error_equals_the_literal_formula(case, backend, device):
    tensors = case.make(device=device)[0]
    assert_all_close(run(*tensors, backend), results(literal.composition_error, *tensors))


@each_case
def test_reconstruction_equals_the_literal_formula(case, backend, device):
    tensors = case.make(device=device)[0]
    assert_all_close(composed(*tensors, backend), composed(*tensors))


@each_case
@each_dtype
def test_rounding_is_within_budget(case, dtype, backend, device):
    image, decoded = case.make(dtype, device)[0]
    for ours, formula in ((run, lambda *x: results(literal.composition_error, *x)), (composed, composed)):
        got = ours(image, decoded, backend)
        eager, truth = (formula(image.to(kind), decoded.to(kind)) for kind in (torch.float32, torch.float64))
        kinds = torch.float32, torch.float32, dtype, dtype
        for name, x, plain, exact, kind in zip(NAMES, got, eager, truth, kinds, strict=True):
            assert x.dtype == kind
            assert x.shape == exact.shape
            if exact.numel():
                assert (x.double() - exact).abs().max() <= allowed_error(exact, plain.to(kind)), name


@pytest.mark.parametrize(("image_dtype", "decoded_dtype"), [(32, 16), (16, 32), (64, 32), (64, 0), (0, 64), (0, 16)])
def test_mixed_dtypes(image_dtype, decoded_dtype, backend, device):
    kinds = {0: torch.bfloat16, 16: torch.float16, 32: torch.float32, 64: torch.float64}
    image, decoded = Case("mixed").make(torch.float16, device)[0]
    image, decoded = image.to(kinds[image_dtype]), decoded.to(kinds[decoded_dtype])
    got = run(image, decoded, backend)
    wide = kinds[max(image_dtype, decoded_dtype, 32)]
    assert [x.dtype for x in got] == [wide, wide, image.dtype, decoded.dtype]
    exact = results(literal.composition_error, image.double(), decoded.double())
    for x, y in zip(got, exact, strict=True):
        assert (x.double() - y).abs().max() <= 4 * torch.finfo(x.dtype).eps * y.abs().max()


def test_error_is_that_of_the_reconstruction(backend, device):
    image, decoded = Case("both").make(device=device)[0]
    reconstruction, masks = compose(decoded, backend=backend)
    error, same_masks = composition_error(image, decoded, return_masks=True, backend=backend)
    assert torch.equal(masks, same_masks)
    torch.testing.assert_close(error, F.mse_loss(reconstruction, image))
    assert torch.equal(composition_error(image, decoded, backend=backend), error)


def test_reductions(backend, device):
    image, decoded = Case("reduced", B=3).make(device=device)[0]
    errors = composition_error(image, decoded, reduction="none", backend=backend)
    assert errors.shape == (3,)
    for reduction in ("mean", "sum"):
        got = composition_error(image, decoded, reduction=reduction, backend=backend)
        torch.testing.assert_close(got, getattr(errors, reduction)())
    assert torch.equal(composition_error(image, decoded, backend=backend), errors.mean())


def test_no_images(backend, device):
    image, decoded = Case("none", B=0).make(device=device)[0]
    assert composition_error(image, decoded, backend=backend).isnan()
    assert composition_error(image, decoded, reduction="sum", backend=backend) == 0
    error, masks, dimage, ddecoded = run(image, decoded, backend)
    assert [x.shape for x in (error, masks, dimage, ddecoded)] == [(0,), (0, 4, 13, 12), image.shape, decoded.shape]


@pytest.mark.parametrize("used", ["error", "masks", "reconstruction", "masks beside it"])
def test_gradient_of_one_output_alone(used, backend, device):
    """The other's incoming gradient is absent, not zero."""
    image, decoded = Case("one output").make(device=device)[0]
    at = {"error": 0, "masks": 1, "reconstruction": 0, "masks beside it": 1}[used]
    options = {"backend": backend}
    gradients = []
    for ours in (True, False):
        leaf = decoded.clone().requires_grad_()
        if used in ("error", "masks"):
            function = composition_error if ours else literal.composition_error
            outputs = function(image, leaf, **(options | {"return_masks": True} if ours else {}))
        else:
            outputs = compose(leaf, **options) if ours else literal.compose(leaf)
        output = outputs[at].mean() if used == "error" else outputs[at].square().sum()
        gradients.append(torch.autograd.grad(output, leaf)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("wanted", ["image", "decoded"])
def test_gradient_of_one_input_alone(wanted, backend, device):
    tensors = dict(zip(("image", "decoded"), Case("one input").make(device=device)[0], strict=True))
    incoming = [torch.ones(2).to(tensors["image"]), torch.zeros(2, 4, 13, 12).to(tensors["image"])]
    everything = dict(zip(NAMES, run(*tensors.values(), backend, incoming), strict=True))
    leaf = tensors[wanted].requires_grad_()
    composition_error(**tensors, reduction="sum", backend=backend).backward()
    torch.testing.assert_close(leaf.grad, everything[f"d{wanted}"])
    assert all(x.grad is None for name, x in tensors.items() if name != wanted)


def test_results_without_gradients(backend, device):
    image, decoded = Case("inference").make(device=device)[0]
    plain = composition_error(image, decoded, backend=backend)
    assert not plain.requires_grad
    with torch.no_grad():
        assert torch.equal(composition_error(image, decoded.requires_grad_(), backend=backend), plain)


# --- symmetry -----------------------------------------------------------------------------------------------


def test_order_of_slots_and_channels_does_not_matter(backend, device):
    image, decoded = Case("order", K=7).make(device=device)[0]
    order = torch.randperm(7, device=device)
    error, masks, dimage, ddecoded = run(image, decoded, backend)
    d_error, d_masks = random_like(error, masks)
    got = run(image, decoded[:, order], backend, (d_error, d_masks[:, order]))
    assert_all_close(got, (error, masks[:, order], dimage, ddecoded[:, order]))
    channels = torch.tensor([1, 2, 0, 3], device=device)
    got = run(image[:, channels[:3]], decoded[:, :, channels], backend)
    assert_all_close(got, (error, masks, dimage[:, channels[:3]], ddecoded[:, :, channels]))


def test_only_differences_between_alphas_matter(backend, device):
    image, decoded = Case("shifted").make(device=device)[0]
    shifted = decoded.clone()
    shifted[:, :, -1] += torch.randn(2, 1, 13, 12).to(decoded)
    assert_all_close(run(image, shifted, backend), run(image, decoded, backend))


def test_one_slot_is_the_picture_itself(backend, device):
    image, decoded = Case("alone", K=1).make(device=device)[0]
    reconstruction, masks = compose(decoded.requires_grad_(), backend=backend)
    assert torch.equal(reconstruction, decoded[:, 0, :-1])
    assert (masks == 1).all()
    (gradient,) = torch.autograd.grad(F.mse_loss(reconstruction, image), decoded)
    assert (gradient[:, :, -1] == 0).all()


# --- derivatives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 4])
def test_gradcheck(K, backend, device, interpreted):
    leaves = [x.requires_grad_() for x in Case("small", K=K, C=2, H=2, W=3).make(device=device)[0]]

    def error(image, decoded):
        return composition_error(image, decoded, reduction="none", return_masks=True, backend=backend)

    assert torch.autograd.gradcheck(error, leaves, fast_mode=interpreted)
    assert torch.autograd.gradcheck(lambda x: compose(x, backend=backend), leaves[1:], fast_mode=interpreted)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(error, leaves)


@pytest.mark.parametrize("output", ["error", "masks", "reconstruction", "sum"])
def test_second_derivatives_are_the_references_alone(output, backend, device):
    """Also where the incoming gradient is a constant, as that of a sum: nothing passes silently for 0."""
    image, decoded = (x.requires_grad_() for x in Case("twice").make(device=device)[0])
    error, masks = composition_error(image, decoded, return_masks=True, backend=backend)
    reconstruction, _ = compose(decoded, backend=backend)
    loss = {
        "error": error,
        "masks": masks.square().sum(),
        "reconstruction": reconstruction.square().sum(),
        "sum": reconstruction.sum(),
    }[output]
    penalty = torch.autograd.grad(loss, decoded, create_graph=True)[0].square().sum()
    pairs = [(penalty, decoded), (loss + penalty, decoded)]
    if output == "error":  # of an input that the gradient in question is not to
        pairs.append((penalty, image))
    for y, x in pairs:
        if backend == "reference":
            assert torch.autograd.grad(y, x, retain_graph=True)[0].abs().max() > 0
        else:
            with pytest.raises(RuntimeError, match=r"differentiates once.*reference"):
                torch.autograd.grad(y, x, retain_graph=True)


def test_functional_gradient(backend, device):
    image, decoded = Case("functional").make(device=device)[0]

    def loss(image, decoded):
        error, masks = composition_error(image, decoded, return_masks=True, backend=backend)
        return error + masks.square().sum() + compose(decoded, backend=backend)[0].square().sum()

    leaves = [x.clone().requires_grad_() for x in (image, decoded)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for x, y in zip(torch.func.grad(loss, argnums=(0, 1))(image, decoded), expected, strict=True):
        torch.testing.assert_close(x, y)


# --- layout -------------------------------------------------------------------------------------------------


def _strided(x: Tensor, how: str) -> Tensor:
    """The same values under other strides."""
    if how == "transposed":
        return x.mT.contiguous().mT
    if how == "channels last":
        return x.movedim(-3, -1).contiguous().movedim(-1, -3)
    if how == "channels last, sliced":
        wide = torch.full((*x.shape[:-3], *x.shape[-2:], 3 * x.shape[-3] + 1), NAN).to(x)
        return wide[..., 1::3].copy_(x.movedim(-3, -1)).movedim(-1, -3)
    if how == "slots last":  # (B, H, W, C + 1, K)
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == "sliced":
        wide = torch.full((*x.shape[:-2], 2 * x.shape[-2], 3 * x.shape[-1] + 1), NAN).to(x)
        return wide[..., ::2, 1::3].copy_(x)
    if how == "planes sliced":
        wide = torch.full((x.shape[0], 2 * x.shape[1] + 1, *x.shape[2:]), NAN).to(x)
        return wide[:, 1::2].copy_(x)
    if how == "expanded":
        return x[:1].expand_as(x)
    if how == "expanded over pixels":
        return x[..., :1, :1].expand_as(x)
    if how == "of one number":
        return x.flatten()[0].expand_as(x)
    raise ValueError(how)


STRIDES = ["transposed", "channels last", "channels last, sliced", "slots last", "sliced", "planes sliced"]
STRIDES += ["expanded", "expanded over pixels", "of one number"]
each_stride = pytest.mark.parametrize("how", STRIDES)


@each_stride
@pytest.mark.parametrize("C", [3, 2])
def test_strided_inputs(how, C, backend, device):
    tensors = Case("strided", B=3, C=C).make(device=device)[0]
    views = [_strided(x, how) for x in tensors]
    assert not any(x.is_contiguous() for x in views)
    expected = run(*(x.clone(memory_format=torch.contiguous_format) for x in views), backend)
    leaves = [x.detach().requires_grad_() for x in views]
    outputs = composition_error(*leaves, reduction="none", return_masks=True, backend=backend)
    assert_all_close((*outputs, *torch.autograd.grad(outputs, leaves, random_like(*outputs))), expected)


@each_stride
@pytest.mark.parametrize("channels_last", [False, True])
def test_strided_incoming_gradients(how, channels_last, backend, device):
    image, decoded = Case("strided", B=3, channels_last=channels_last).make(device=device)[0]
    for ours in (run, composed):
        outputs = ours(image, decoded, backend)[:2]
        incoming = [_strided(x, how) if x.dim() == 4 else x[:1].expand(3) for x in random_like(*outputs)]
        assert not any(x.is_contiguous() for x in incoming)
        got = ours(image, decoded, backend, incoming)
        assert_all_close(got, ours(image, decoded, backend, [x.contiguous() for x in incoming]))


def test_sum_sends_gradients_of_stride_zero(backend, device):
    image, decoded = Case("stride 0").make(device=device)[0]
    expected = composed(image, decoded, backend, [torch.ones_like(x) for x in compose(decoded)])
    leaf = decoded.clone().requires_grad_()
    reconstruction, masks = compose(leaf, backend=backend)
    (reconstruction.sum() + masks.sum()).backward()
    torch.testing.assert_close(leaf.grad, expected[3])


@kernels_alone
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_gradient_has_decodeds_layout(dtype, C, channels_last, backend, device):
    image, decoded = Case("layout", C=C, channels_last=channels_last).make(dtype, device)[0]
    gradient = run(image, decoded, backend)[3]
    assert gradient.dtype == dtype
    assert gradient.stride() == decoded.stride()


def test_channels_last_images_of_all_slots(backend, device):
    """As a decoder makes them: (B * K, C + 1, H, W) in channels-last memory, then seen as (B, K, C + 1, H, W)."""
    image, decoded = Case("decoder").make(torch.float32, device)[0]
    flat = decoded.flatten(0, 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    error = composition_error(image, flat.unflatten(0, (2, 4)), backend=backend)
    (gradient,) = torch.autograd.grad(error, flat)
    leaf = decoded.requires_grad_()
    (expected,) = torch.autograd.grad(composition_error(image, leaf, backend=backend), leaf)
    torch.testing.assert_close(gradient, expected.flatten(0, 1))
    if backend in NAMESPACES:
        assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("far", ["slots", "channels"])
def test_offsets_beyond_32_bits(far, backend, device):
    """In memory that is never touched, so that it costs nothing."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    image, decoded = Case("far", B=1, K=2, C=2, H=3, W=5).make(torch.bfloat16, device)[0]
    x = decoded if far == "slots" else image
    try:
        memory = torch.empty(2**31 + x[0, 0].numel(), dtype=x.dtype, device=device)
    except RuntimeError:
        pytest.skip("no 4 GiB of addresses")
    view = memory.as_strided(x.shape, (0, 2**31, *x.stride()[2:])).copy_(x)
    inputs = (image, view) if far == "slots" else (view, decoded)
    assert_all_close(run_in_place(*inputs, backend), run(image, decoded, backend))


def run_in_place(image, decoded, backend: str) -> tuple[Tensor, ...]:
    """`run` without a copy of its inputs."""
    leaves = [x.detach().requires_grad_() for x in (image, decoded)]
    outputs = composition_error(*leaves, reduction="none", return_masks=True, backend=backend)
    return *outputs, *torch.autograd.grad(outputs, leaves, random_like(*outputs))


# --- edges --------------------------------------------------------------------------------------------------


@each_dtype
def test_large_alphas_do_not_overflow(dtype, backend, device):
    image, decoded = Case("large").make(dtype, device)[0]
    decoded[:, :, -1] *= 300
    error, masks, *gradients = run(image, decoded, backend)
    torch.testing.assert_close(masks, decoded[:, :, -1].float().softmax(1))
    assert all(x.isfinite().all() for x in (error, *gradients))


def test_a_slot_with_an_alpha_of_minus_infinity_takes_no_part(backend, device):
    image, decoded = Case("closed").make(device=device)[0]
    decoded[:, 1, -1] = float("-inf")
    others = [0, 2, 3]
    error, masks, dimage, ddecoded = run(image, decoded, backend)
    d_error, d_masks = random_like(error, masks)
    assert (masks[:, 1] == 0).all()
    assert (ddecoded[:, 1] == 0).all()
    expected = run(image, decoded[:, others], backend, (d_error, d_masks[:, others]))
    assert_all_close((error, masks[:, others], dimage, ddecoded[:, others]), expected)


@pytest.mark.parametrize("place", ["image", "rgb", "alpha"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_nan_goes_to_everything_that_depends_on_it(place, channels_last, backend, device):
    image, decoded = Case("nan", B=3, channels_last=channels_last).make(device=device)[0]
    clean_error, clean_reconstruction = run(image, decoded, backend), composed(image, decoded, backend)
    image, decoded = image.clone(), decoded.clone()
    if place == "image":
        image[1, 1, 5, 6] = NAN
    else:
        decoded[1, 2, 1 if place == "rgb" else -1, 5, 6] = NAN
    error, masks, dimage, ddecoded = run(image, decoded, backend)
    assert error.isnan().tolist() == [False, True, False]
    assert dimage[1, 1, 5, 6].isnan()
    assert masks[1, :, 5, 6].isnan().all() == (place == "alpha")
    assert ddecoded[1, :, -1, 5, 6].isnan().all()
    reconstruction = composed(image, decoded, backend)[0]
    if place != "image":
        assert reconstruction[1, 1, 5, 6].isnan()
    # Other pixels know nothing of it.
    for x, y in zip(
        (masks, dimage, ddecoded, reconstruction), (*clean_error[1:], clean_reconstruction[0]), strict=True
    ):
        x, y = x.clone(), y.clone()
        x[1, ..., 5, 6] = y[1, ..., 5, 6] = 0
        torch.testing.assert_close(x, y)


def test_bitwise_repeatable(backend, device):
    for case in (Case("repeated", K=5, H=35, W=35), Case("repeated", K=5, H=35, W=35, channels_last=True)):
        tensors = case.make(torch.float32, device)[0]
        for ours in (run, composed):
            assert all(map(torch.equal, ours(*tensors, backend), ours(*tensors, backend)))


@kernels_alone
def test_layout_changes_no_bit(backend, device):
    plain, last = (
        Case("layout", H=35, W=35, channels_last=how).make(torch.float32, device)[0] for how in (False, True)
    )
    for x, y in zip(run(*plain, backend), run(*last, backend), strict=True):
        assert torch.equal(x, y)


def test_inputs_are_never_written_to(backend, device):
    for channels_last in (False, True):
        image, decoded = Case("read only", channels_last=channels_last).make(device=device)[0]
        before = image.clone(), decoded.clone()
        leaves = image.requires_grad_(), decoded.requires_grad_()
        outputs = composition_error(*leaves, reduction="none", return_masks=True, backend=backend)
        outputs += compose(decoded, backend=backend)
        incoming = random_like(*outputs)
        torch.autograd.backward(outputs, incoming)
        for x, y in zip((*leaves, *incoming), (*before, *random_like(*outputs)), strict=True):
            assert torch.equal(x, y)


@kernels_alone
def test_nothing_but_inputs_is_kept_for_backward(backend, device):
    image, decoded = (x.requires_grad_() for x in Case("kept").make(device=device)[0])
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        composition_error(image, decoded, reduction="none", return_masks=True, backend=backend)
        compose(decoded, backend=backend)
    assert {x.data_ptr() for x in kept} == {image.data_ptr(), decoded.data_ptr()}


def test_autocast_leaves_the_arithmetic_alone(backend, device):
    tensors = Case("autocast").make(torch.float32, device)[0]
    expected = run(*tensors, backend)

    def error(image, decoded):
        with torch.autocast(device, dtype=torch.bfloat16):
            return composition_error(image, decoded, reduction="none", return_masks=True, backend=backend)

    for x, y in zip(results(error, *tensors), expected, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y)
    with torch.autocast(device, dtype=torch.bfloat16):
        reconstruction, _ = compose(tensors[1], backend=backend)
    assert torch.equal(reconstruction, compose(tensors[1], backend=backend)[0])


def test_function_by_itself(any_device):
    """`CompositionFunction` with the reference's kernels: the gradient as written out, against plain autograd."""
    tensors = Case("function").make(device=any_device)[0]

    def error(image, decoded):
        _, masks, errors = CompositionFunction.apply(decoded, image, False, True, "reference")
        return errors, masks

    assert_all_close(results(error, *tensors), run(*tensors, "reference"))


# --- the operators ------------------------------------------------------------------------------------------


@kernels_alone
@pytest.mark.parametrize("wanted", [(True, True), (False, False), (True, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(wanted, dtype, channels_last, backend, device):
    """What torch asks of operators, with and without an image and each of the incoming gradients."""
    backends.implementation("compose", backend)  # which defines them
    operators = getattr(torch.ops, NAMESPACES[backend])
    image, decoded = Case("operator", H=3, W=5, channels_last=channels_last).make(dtype, device)[0]
    wide = torch.promote_types(dtype, torch.float32)
    image = image.to(wide)
    for x in (image, None):
        arguments = (decoded, x, *wanted)
        torch.library.opcheck(operators.composition_forward.default, arguments)
        x_hat, a, _ = operators.composition_forward(decoded, image, True, True)
        d_x_hat, d_a, g = random_like(x_hat, a, torch.ones(2, dtype=wide, device=device))
        incoming = d_x_hat if wanted[0] else None, d_a if wanted[1] else None, None if x is None else g
        arguments = (*incoming, decoded, x, x is not None)
        torch.library.opcheck(operators.composition_backward.default, arguments)


# --- torch.compile ------------------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_compiles_as_one_graph(dynamic, channels_last, backend, device):
    def function(image, decoded):
        error, masks = composition_error(image, decoded, reduction="none", return_masks=True, backend=backend)
        return error + compose(decoded, backend=backend)[0].mean((1, 2, 3)), masks

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for B, H, W in ((2, 13, 12), (3, 20, 17)) if dynamic else ((2, 13, 12),):
        tensors = Case("compiled", B=B, H=H, W=W, channels_last=channels_last).make(device=device)[0]
        assert_all_close(results(compiled, *tensors), results(function, *tensors))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
@kernels_alone
def test_compiles_to_code(backend, device):
    """Once all the way through Inductor."""
    torch.compiler.reset()
    tensors = Case("compiled", K=2, channels_last=True).make(torch.float32, device)[0]

    def function(image, decoded):
        return composition_error(image, decoded, return_masks=True, backend=backend)

    compiled = torch.compile(function, fullgraph=True)
    assert_all_close(results(compiled, *tensors), results(function, *tensors), relative=1e-5)


# --- any shape ----------------------------------------------------------------------------------------------


@settings(max_examples=examples(40), deadline=None, derandomize=True)
@given(
    B=st.integers(0, 3),
    K=st.integers(1, 12),
    C=st.integers(1, 5),
    H=st.integers(1, 40),
    W=st.integers(1, 40),
    channels_last=st.booleans(),
)
def check_any_shape(backend, device, B, K, C, H, W, channels_last):
    tensors = Case("any", B, K, C, H, W, channels_last).make(device=device)[0]
    assert_all_close(run(*tensors, backend), results(literal.composition_error, *tensors))
    assert_all_close(composed(*tensors, backend), composed(*tensors))


def test_any_shape(backend, device):
    check_any_shape(backend, device)


# --- what is refused ----------------------------------------------------------------------------------------


def pair(B=2, K=4, C=3, H=5, W=6, **changes) -> dict[str, object]:
    return {"image": torch.rand(B, C, H, W), "decoded": torch.rand(B, K, C + 1, H, W), **changes}


def on_meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


# A row: the arguments, the type of the error, and what its message must hold in this order.
DECODED = [
    (pair(decoded=None), TypeError, ["decoded", "torch.Tensor (B, K, C + 1, H, W)", "NoneType"]),
    (pair(decoded=torch.rand(2, 4, 4, 5, 6).numpy()), TypeError, ["decoded", "torch.Tensor", "ndarray"]),
    (pair(decoded=torch.ones(2, 4, 4, 5, 6, dtype=torch.int32)), TypeError, ["decoded", "float32", "torch.int32"]),
    (pair(decoded=torch.rand(2, 4, 4, 5, 6) + 0j), TypeError, ["decoded", "float32", "torch.complex64"]),
    (pair(decoded=torch.rand(8, 4, 5, 6)), ValueError, ["decoded", "(B, K, C + 1, H, W)", "(8, 4, 5, 6)"]),
    (pair(K=0), ValueError, ["decoded", "at least one slot", "(2, 0, 4, 5, 6)"]),
    (pair(C=0), ValueError, ["decoded", "one channel", "(2, 4, 1, 5, 6)"]),
    (pair(H=0), ValueError, ["decoded", "one pixel", "(2, 4, 4, 0, 6)"]),
    (pair(backend="fastest"), ValueError, ["backend", "'auto'", "'reference'", "'fastest'"]),
]
ERROR = [
    (pair(image=[[0.0]]), TypeError, ["image", "torch.Tensor (B, C, H, W)", "list"]),
    (pair(image=torch.zeros(2, 3, 5, 6, dtype=torch.uint8)), TypeError, ["image", "float32", "torch.uint8"]),
    (pair(image=torch.rand(3, 5, 6)), ValueError, ["image", "(B, C, H, W)", "(3, 5, 6)"]),
    (pair(image=torch.rand(2, 4, 5, 6)), ValueError, ["image", "(2, 3, 5, 6)", "(2, 4, 4, 5, 6)", "(2, 4, 5, 6)"]),
    (pair(image=torch.rand(1, 3, 5, 6)), ValueError, ["image", "(2, 3, 5, 6)", "decoded", "(1, 3, 5, 6)"]),
    (pair(image=torch.rand(2, 3, 6, 5)), ValueError, ["image", "(2, 3, 5, 6)", "decoded", "(2, 3, 6, 5)"]),
    (pair(decoded=on_meta(2, 4, 4, 5, 6)), ValueError, ["decoded", "device of image, cpu", "meta"]),
    (pair(reduction="max"), ValueError, ["reduction", "'mean', 'sum', 'none'", "'max'"]),
    (pair(reduction=None), ValueError, ["reduction", "'mean', 'sum', 'none'", "None"]),
    (pair(return_masks=1), TypeError, ["return_masks", "bool", "1"]),
]
TABLE = [
    *((composition_error, *row) for row in DECODED + ERROR),
    *((compose, {name: x for name, x in row[0].items() if name != "image"}, *row[1:]) for row in DECODED),
]


def _name(value: object) -> str | None:
    if callable(value) and not isinstance(value, type):
        return value.__name__
    return ", ".join(value) if isinstance(value, list) else None


@pytest.mark.parametrize(("function", "arguments", "error", "words"), TABLE, ids=_name)
def test_bad_arguments_are_named(function, arguments, error, words):
    assert_refused(function, arguments, error, words)


def test_options_are_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        composition_error(*pair().values(), "mean")
    with pytest.raises(TypeError, match="positional"):
        compose(pair()["decoded"], "auto")


@pytest.mark.parametrize("backend", ["reference", "written_out"])
def test_no_value_is_looked_at(backend):
    """A meta tensor has none: to look at one, or to wait for the device, raises."""
    image, decoded = (x.to("meta").requires_grad_() for x in pair().values())
    error, masks = composition_error(image, decoded, return_masks=True, backend=backend)
    reconstruction, _ = compose(decoded, backend=backend)
    assert (error.shape, masks.shape, reconstruction.shape) == ((), (2, 4, 5, 6), (2, 3, 5, 6))
    (error + masks.sum() + reconstruction.sum()).backward()
    assert image.grad.shape == (2, 3, 5, 6)
    assert decoded.grad.shape == (2, 4, 4, 5, 6)


# --- what it is measured on ---------------------------------------------------------------------------------


def test_bytes_and_flops_of_tetrominoes():
    case = BENCHMARKS["cpu"][0]
    # 4 slots of 4 channels and an image of 3, 35 x 35 pixels of 64 images; backward a gradient besides.
    assert case.bytes_moved(torch.float32) == 64 * 35 * 35 * 4 * (16 + 3)
    assert case.bytes_moved(torch.bfloat16, backward=True) == 64 * 35 * 35 * (2 * 2 * 16 + 4 * 3)
    assert case.flops() == 64 * 35 * 35 * (4 * 3 + 2 * 12 + 3 * 3)
    assert case.flops(backward=True) == case.flops() + 64 * 35 * 35 * (3 * 12 + 4 * 4)
