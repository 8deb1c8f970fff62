"""Inpainting, entropies and the IIO loss against the literal formula, and the properties they promise."""

from __future__ import annotations

import literal
import pytest
import torch
import torch.nn.functional as F
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data import TetrominoesGenerator
from iio_kernels import IIOLossFunction, conditional_entropies, iio_loss, inpaint, interaction_information
from iio_kernels.ops.iio_loss.common import Inpainter
from iio_kernels.testing.iio_loss import BENCHMARKS, CASES, Case, allowed_error

# The literal formula takes K 2^(K-1) pairs of blurs: up to six masks it is quick.
LITERAL = [case for case in CASES if case.K <= 6]
SMOOTH = [case for case in LITERAL if case.smooth]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
named = {"ids": lambda case: case.name}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# torch.compile itself makes an instance of every Function that it traces.
compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
DEFAULTS = Inpainter(sigma=5.0, kernel_size=11, repeats=2, eps=1e-8)
NAN = float("nan")


def results(function, image, masks, incoming=None, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Each image's loss and the gradients to image and masks; `incoming` is that to the losses."""
    leaves = [x.detach().clone().requires_grad_() for x in (image, masks)]
    losses = function(*leaves, **options)
    if incoming is None:
        incoming = torch.linspace(-1, 2, len(losses)).to(losses)
    return losses.detach(), *torch.autograd.grad(losses, leaves, incoming)


def run(image, masks, backend: str, incoming=None, **options) -> tuple[Tensor, Tensor, Tensor]:
    return results(iio_loss, image, masks, incoming, backend=backend, reduction="none", **options)


def assert_all_close(got, expected, relative: float = 1e-10) -> None:
    for name, x, y in zip(("loss", "dimage", "dmasks"), got, expected, strict=True):
        scale = y.abs().max().item() if y.numel() else 1
        torch.testing.assert_close(
            x, y, rtol=0, atol=relative * scale + 1e-14, msg=lambda text, name=name: f"{name}: {text}"
        )


def entropies_by_subset(image, masks, **inpainter) -> Tensor:
    """The literal (B, K, 2^(K-1) - 1), each subset found by writing its position in binary."""
    K = masks.shape[1]
    rows = []
    for m in range(K):
        others = [i for i in range(K) if i != m]
        for j in range(1, 2 ** (K - 1)):
            subset = [i for bit, i in enumerate(others) if j >> bit & 1]
            given = masks[:, subset].sum(1)
            rows.append(literal.conditional_entropy(image, masks[:, m], given, **inpainter))
    return torch.stack(rows, 1).unflatten(1, (K, -1))


# --- the formula --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LITERAL, **named)
def test_loss_equals_the_literal_formula(case, backend, device):
    (image, masks), options = case.make(device=device)
    got = iio_loss(image, masks, reduction="none", backend=backend, **options)
    torch.testing.assert_close(got, literal.iio_loss(image, masks, **options), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("case", SMOOTH, **named)
def test_gradients_equal_those_of_the_literal_formula(case, backend, device):
    tensors, options = case.make(device=device)
    assert_all_close(run(*tensors, backend, **options), results(literal.iio_loss, *tensors, **options))


@pytest.mark.parametrize("case", [case for case in SMOOTH if case.K < 6], **named)
@each_dtype
def test_error_is_within_budget(case, dtype, backend, device):
    (image, masks), options = case.make(dtype, device)
    got = run(image, masks, backend, **options)
    eager = results(literal.iio_loss, image.float(), masks.float(), **options)
    truth = results(literal.iio_loss, image.double(), masks.double(), **options)
    for name, x, plain, exact in zip(("loss", "dimage", "dmasks"), got, eager, truth, strict=True):
        assert x.dtype == (torch.float32 if name == "loss" else dtype)
        assert x.shape == exact.shape
        if exact.numel():
            assert (x.double() - exact).abs().max() <= allowed_error(exact, plain.to(x.dtype)), name


@pytest.mark.parametrize("K", [7, 11])
def test_many_masks(K, backend, device, interpreted):
    """Beyond the literal formula's reach: some of its terms, and that they sum up."""
    if interpreted and K > 7:
        pytest.skip("minutes in the interpreter: test_triton_iio_loss.py has a smaller image")
    (image, masks), _ = Case("many", B=1, C=2, K=K, H=11, W=11).make(device=device)
    H = conditional_entropies(image, masks, backend=backend)
    for m, members in ((0, (1,)), (3, (0, K - 1)), (K - 1, range(K - 1)), (1, (0, 3, 4))):
        others = [i for i in range(K) if i != m]
        position = sum(1 << others.index(i) for i in members) - 1
        given = masks[:, list(members)].sum(1)
        expected = literal.conditional_entropy(image, masks[:, m], given)
        torch.testing.assert_close(H[:, m, position], expected, rtol=1e-10, atol=0)
    expected = results(lambda x, y: -conditional_entropies(x, y).sum((1, 2)), image, masks)
    assert_all_close(run(image, masks, backend), expected)
    assert_all_close([x.double() for x in run(image.float(), masks.float(), backend)], expected, relative=1e-5)


@pytest.mark.parametrize(("image_dtype", "masks_dtype"), [(32, 16), (16, 32), (64, 32), (0, 16)])
def test_mixed_dtypes(image_dtype, masks_dtype, backend, device):
    kinds = {0: torch.bfloat16, 16: torch.float16, 32: torch.float32, 64: torch.float64}
    (image, masks), _ = Case("mixed").make(torch.float16, device)
    image, masks = image.to(kinds[image_dtype]), masks.to(kinds[masks_dtype])
    got = run(image, masks, backend)
    assert [x.dtype for x in got] == [kinds[max(image_dtype, 32)], image.dtype, masks.dtype]
    exact = results(literal.iio_loss, image.double(), masks.double())
    for x, y in zip(got, exact, strict=True):
        torch.testing.assert_close(
            x.double(), y, rtol=0, atol=max(4 * torch.finfo(x.dtype).eps, 1e-5) * y.abs().max().item()
        )


def test_two_masks_is_minus_inpainting_error_maximization(backend, device):
    """Each region predicted from the other one, normalised by its own size."""
    (image, masks), _ = Case("pair", K=2).make(device=device)
    first, second = masks.unbind(1)
    error = [(image - literal.inpaint(image, given)).abs().mean(1) for given in (second, first)]
    objective = sum(
        (centre * e).sum((1, 2)) / centre.sum((1, 2)) for centre, e in zip((first, second), error, strict=True)
    )
    torch.testing.assert_close(iio_loss(image, masks, backend=backend), -objective.mean(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("case", [case for case in LITERAL if case.K < 6], **named)
def test_conditional_entropies_in_their_order(case, backend, device):
    (image, masks), options = case.make(device=device)
    H = conditional_entropies(image, masks, backend=backend, **options)
    assert H.shape == (case.B, case.K, 2 ** (case.K - 1) - 1)
    torch.testing.assert_close(H, entropies_by_subset(image, masks, **options), rtol=1e-10, atol=1e-14)
    assert (H >= 0).all()
    assert (H <= 1 + 1e-12).all()


def test_conditional_entropies_of_the_documented_example(backend, device):
    (image, masks), _ = Case("example", K=4).make(device=device)
    H = conditional_entropies(image, masks, backend=backend)
    sets = [(0,), (2,), (0, 2), (3,), (0, 3), (2, 3), (0, 2, 3)]
    for j, members in enumerate(sets):
        expected = literal.conditional_entropy(image, masks[:, 1], sum(masks[:, i] for i in members))
        torch.testing.assert_close(H[:, 1, j], expected, rtol=1e-10, atol=0)


def test_loss_is_minus_the_sum_of_conditional_entropies(backend, device):
    (image, masks), _ = Case("sum", B=3).make(device=device)
    H = conditional_entropies(image, masks, backend=backend)
    torch.testing.assert_close(iio_loss(image, masks, backend=backend), -H.sum((1, 2)).mean())


@pytest.mark.parametrize("K", [2, 3, 5])
def test_terms_and_reductions(K, backend, device):
    (image, masks), _ = Case("reduced", B=3, K=K).make(device=device)
    losses = iio_loss(image, masks, reduction="none", backend=backend)
    assert losses.shape == (3,)
    for terms, divisor in (("sum", 1), ("mean", 2 ** (K - 1) - 1)):
        options = {"terms": terms, "backend": backend}
        torch.testing.assert_close(iio_loss(image, masks, reduction="none", **options), losses / divisor)
        torch.testing.assert_close(iio_loss(image, masks, reduction="sum", **options), losses.sum() / divisor)
        torch.testing.assert_close(iio_loss(image, masks, reduction="mean", **options), losses.mean() / divisor)
        torch.testing.assert_close(iio_loss(image, masks, **options), losses.mean() / divisor)


def test_no_images(backend, device):
    (image, masks), _ = Case("none", B=0).make(device=device)
    assert iio_loss(image, masks, backend=backend).isnan()
    assert iio_loss(image, masks, reduction="sum", backend=backend) == 0
    loss, dimage, dmasks = run(image, masks, backend)
    assert loss.shape == (0,)
    assert dimage.shape == image.shape
    assert dmasks.shape == masks.shape


@pytest.mark.parametrize("K", [2, 3, 4, 5])
def test_interaction_information_is_the_signed_sum(K, backend, device):
    (image, masks), _ = Case("signed", K=K).make(device=device)
    expected = torch.ones(2, K, dtype=image.dtype, device=device)
    for m in range(K):
        for subset in literal.others_subsets(K, m):
            given = masks[:, list(subset)].sum(1)
            entropy = literal.conditional_entropy(image, masks[:, m], given)
            expected[:, m] += (-1) ** len(subset) * entropy
    torch.testing.assert_close(interaction_information(image, masks, backend=backend), expected)


def test_interaction_information_of_two_masks_is_mutual_information(backend, device):
    (image, masks), _ = Case("mutual", K=2).make(device=device)
    H = conditional_entropies(image, masks, backend=backend)
    torch.testing.assert_close(interaction_information(image, masks, backend=backend), 1 - H[..., 0])


def test_maximal_entropies(backend, device):
    """A black and a white half predict each other all wrong: every entropy is 1, the information 0."""
    image = torch.zeros(1, 3, 12, 12, dtype=torch.float64, device=device)
    image[..., 6:] = 1
    masks = torch.cat([1 - image[:, :1], image[:, :1]], 1)
    torch.testing.assert_close(conditional_entropies(image, masks, backend=backend), masks.new_ones(1, 2, 1))
    torch.testing.assert_close(iio_loss(image, masks, backend=backend), masks.new_tensor(-2.0))
    torch.testing.assert_close(
        interaction_information(image, masks, backend=backend), masks.new_zeros(1, 2), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("K", [3, 4, 6])
def test_signs_cancel_where_all_entropies_are_maximal(K, backend, device):
    """The first mask takes all white pixels, the others share the black: given these, white is missed."""
    (_, masks), _ = Case("cancel", K=K).make(device=device)
    image = (torch.rand(2, 1, 13, 12, device=device) < 0.5).double()
    masks = torch.cat([image, (1 - image) * masks[:, 1:] / masks[:, 1:].sum(1, keepdim=True)], 1)
    assert torch.allclose(conditional_entropies(image, masks, backend=backend)[:, 0], masks.new_ones(()))
    information = interaction_information(image, masks, backend=backend)
    torch.testing.assert_close(information[:, 0], masks.new_zeros(2), rtol=0, atol=1e-12)


def test_interaction_information_of_an_empty_mask_is_zero(backend, device):
    (image, masks), _ = Case("empty", K=4, masks="empty").make(device=device)
    information = interaction_information(image, masks, backend=backend)
    assert (information[:, 2:] == 0).all()
    assert (information[:, :2] != 0).all()


@pytest.mark.parametrize("case", LITERAL, **named)
def test_inpaint_equals_the_literal_formula(case, backend, device):
    (image, masks), options = case.make(device=device)
    got = inpaint(image, masks, backend=backend, **options)
    assert got.shape == (case.B, case.K, case.C, case.H, case.W)
    for i in range(case.K):
        expected = literal.inpaint(image, masks[:, i], **options)
        torch.testing.assert_close(got[:, i], expected, rtol=1e-10, atol=1e-14)


def test_inpaint_gradients(backend, device, interpreted):
    (image, masks), _ = Case("inpaint", B=1, C=2, K=2, H=5, W=4).make(device=device)
    leaves = image.requires_grad_(), masks.requires_grad_()
    options = {"sigma": 1.0, "kernel_size": 3, "backend": backend}
    assert torch.autograd.gradcheck(lambda x, m: inpaint(x, m, **options), leaves, fast_mode=interpreted)


def test_inpaint_predicts_convex_combinations(backend, device):
    (image, masks), _ = Case("convex", masks="one-hot").make(device=device)
    inside = torch.where(masks.unsqueeze(2) == 1, image.unsqueeze(1), NAN).flatten(3)
    psi = inpaint(image, masks, backend=backend).flatten(3)
    low, high = inside.nan_to_num(2).amin(-1, keepdim=True), inside.nan_to_num(-1).amax(-1, keepdim=True)
    assert (psi >= low - 1e-12).all()
    assert (psi <= high + 1e-12).all()


def test_far_from_the_mask_inpaint_predicts_its_mean_colour(backend, device):
    image = torch.rand(1, 3, 11, 60, dtype=torch.float64, device=device)
    mask = torch.zeros(1, 1, 11, 60, dtype=torch.float64, device=device)
    mask[..., :4] = 1
    psi = inpaint(image, mask, backend=backend)
    mean = image[..., :4].mean((2, 3))
    torch.testing.assert_close(psi[0, 0, :, :, -1], mean[0, :, None].expand(3, 11))
    assert (inpaint(image, mask, eps=0, backend=backend)[..., -1] == 0).all()


@pytest.mark.parametrize("function", [iio_loss, conditional_entropies, interaction_information, inpaint])
def test_options_default_to_the_documented_ones(function, backend, device):
    (image, masks), _ = Case("defaults").make(device=device)
    explicit = function(image, masks, sigma=5.0, kernel_size=11, repeats=2, eps=1e-8, backend=backend)
    assert torch.equal(function(image, masks, backend=backend), explicit)
    for changed in ({"sigma": 3.0}, {"kernel_size": 7}, {"repeats": 1}, {"eps": 1e-2}):
        assert not torch.allclose(function(image, masks, backend=backend, **changed), explicit)


# --- symmetry -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [2, 4, 6])
def test_order_of_masks_and_channels_does_not_matter(K, backend, device):
    (image, masks), _ = Case("order", K=K).make(device=device)
    order = torch.randperm(K, device=device)
    loss, dimage, dmasks = run(image, masks, backend)
    assert_all_close(run(image, masks[:, order], backend), (loss, dimage, dmasks[:, order]))
    assert_all_close(run(image.flip(1), masks, backend), (loss, dimage.flip(1), dmasks))


@pytest.mark.parametrize(
    "turn", [lambda x: x.flip(2), lambda x: x.flip(3), lambda x: x.mT], ids=["down", "across", "T"]
)
def test_turning_the_picture_turns_the_gradients(turn, backend, device):
    (image, masks), _ = Case("turned").make(device=device)
    loss, dimage, dmasks = run(image, masks, backend)
    assert_all_close(run(turn(image), turn(masks), backend), (loss, turn(dimage), turn(dmasks)))


# --- derivatives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [2, 3, 4])
def test_gradcheck(K, backend, device, interpreted):
    case = Case("small", B=2, C=2, K=K, H=4, W=5, options={"sigma": 1.0, "kernel_size": 3, "eps": 1e-3})
    tensors, options = case.make(device=device)
    leaves = [x.requires_grad_() for x in tensors]

    def function(image, masks):
        return iio_loss(image, masks, reduction="none", backend=backend, **options)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=interpreted)
    if backend == "reference" and K < 4:
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("wanted", ["image", "masks"])
def test_gradient_of_one_input_alone(wanted, backend, device):
    (image, masks), _ = Case("one").make(device=device)
    _, dimage, dmasks = run(image, masks, backend, torch.ones(2, dtype=image.dtype, device=device))
    leaf = (image if wanted == "image" else masks).requires_grad_()
    iio_loss(image, masks, reduction="sum", backend=backend).backward()
    torch.testing.assert_close(leaf.grad, dimage if wanted == "image" else dmasks)
    assert (masks if wanted == "image" else image).grad is None


def test_a_loss_without_gradients(backend, device):
    (image, masks), _ = Case("inference").make(device=device)
    plain = iio_loss(image, masks, backend=backend)
    assert not plain.requires_grad
    with torch.no_grad():
        assert torch.equal(iio_loss(image, masks.requires_grad_(), backend=backend), plain)


@pytest.mark.parametrize("function", [iio_loss, conditional_entropies, inpaint])
def test_second_derivatives_are_the_references_alone(function, backend, device):
    """However they are asked for: nothing passes silently for 0."""
    (image, masks), _ = Case("twice").make(device=device)
    masks.requires_grad_()

    def loss(masks):
        return function(image, masks, backend=backend).square().mean()

    def penalty():
        return torch.autograd.grad(loss(masks), masks, create_graph=True)[0].square().sum()

    ways = (
        lambda: penalty().backward(),
        lambda: penalty().backward(inputs=[masks]),
        lambda: torch.autograd.grad(loss(masks) + penalty(), masks),
        lambda: torch.autograd.functional.hvp(loss, masks, torch.ones_like(masks)),
    )
    if backend == "reference":
        penalty().backward()
        assert masks.grad.abs().max() > 0
    else:
        for way in ways:
            with pytest.raises(RuntimeError, match=r"differentiates once.*reference"):
                way()


@pytest.mark.parametrize("function", [iio_loss, conditional_entropies, inpaint])
def test_functional_gradient(function, backend, device):
    if backend == "written_out" and function is not iio_loss:
        pytest.skip("its gradient is autograd's, inside a Function")
    (image, masks), _ = Case("functional").make(device=device)

    def loss(image, masks):
        return function(image, masks, backend=backend).square().mean()

    expected = torch.autograd.grad(loss(image.requires_grad_(), masks.requires_grad_()), (image, masks))
    got = torch.func.grad(loss, argnums=(0, 1))(image.detach(), masks.detach())
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)


def _strided(x: Tensor, how: str) -> Tensor:
    """The same values under other strides."""
    if how == "transposed":
        return x.mT.contiguous().mT
    if how == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if how == "sliced":
        wide = x.new_full((*x.shape[:-2], 2 * x.shape[-2], 3 * x.shape[-1] + 1), NAN)
        return wide[..., ::2, 1::3].copy_(x)
    if how == "expanded":
        return x[:1].expand_as(x)
    raise ValueError(how)


@pytest.mark.parametrize("how", ["transposed", "channels last", "sliced", "expanded"])
def test_strided_inputs(how, backend, device):
    (image, masks), _ = Case("strided", B=3).make(device=device)
    views = [_strided(x, how).detach() for x in (image, masks)]
    assert not any(x.is_contiguous() for x in views)
    expected = run(*(x.clone(memory_format=torch.contiguous_format) for x in views), backend)
    leaves = [x.requires_grad_() for x in views]
    losses = iio_loss(*leaves, reduction="none", backend=backend)
    gradients = torch.autograd.grad(losses, leaves, torch.linspace(-1, 2, 3).to(losses))
    assert_all_close((losses.detach(), *gradients), expected)


@pytest.mark.parametrize("how", ["sliced", "expanded", "stride 0 in one", "reversed"])
def test_strided_incoming_gradients(how, backend, device):
    (image, masks), _ = Case("strided", B=3).make(device=device)
    values = torch.tensor([0.5, NAN, -1.0, NAN, 2.0, NAN], dtype=image.dtype, device=device)
    incoming = {
        "sliced": values[::2],
        "expanded": values[0].expand(3),
        "stride 0 in one": values[:1].expand(3),
        "reversed": torch.stack([values, values], 1)[::2, 0].flip(0),
    }[how]
    assert_all_close(run(image, masks, backend, incoming), run(image, masks, backend, incoming.contiguous()))
    # And they are the gradients of one image each, scaled.
    loss, dimage, dmasks = run(image, masks, backend, torch.ones_like(incoming))
    scale = incoming.view(3, 1, 1, 1)
    assert_all_close(run(image, masks, backend, incoming), (loss, scale * dimage, scale * dmasks))


def test_function_by_itself(any_device):
    """`IIOLossFunction` with the reference's kernels: the gradient as written out, against plain autograd."""
    tensors, _ = Case("function", K=5).make(device=any_device)
    options = None, None, DEFAULTS, (True, True), "reference"
    got = results(lambda image, masks: IIOLossFunction.apply(image, masks, *options)[0], *tensors)
    assert_all_close(got, run(*tensors, "reference"))


# --- edges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_an_empty_mask_has_no_terms_and_no_gradient_through_them(eps, backend, device):
    """Adding one without a pixel: its own entropies and those given it alone are 0, others do not change."""
    (image, masks), _ = Case("three", K=3).make(device=device)
    padded = torch.cat([masks, torch.zeros_like(masks[:, :1])], 1)
    H = conditional_entropies(image, padded, eps=eps, backend=backend)
    assert (H[:, 3] == 0).all()
    assert (H[:, :3, 3] == 0).all()  # position 3 is the set {3}
    torch.testing.assert_close(H[:, :3, :3], conditional_entropies(image, masks, eps=eps, backend=backend))
    torch.testing.assert_close(H[:, :3, 4:], H[:, :3, :3])

    incoming = torch.ones(2, dtype=image.dtype, device=device)
    loss, dimage, dmasks = run(image, padded, backend, incoming, eps=eps)
    base = run(image, masks, backend, incoming, eps=eps)
    torch.testing.assert_close(loss, 2 * base[0])
    torch.testing.assert_close(dimage, 2 * base[1])
    torch.testing.assert_close(dmasks[:, :3], 2 * base[2])
    assert dmasks[:, 3].isfinite().all()


@pytest.mark.parametrize("offset", [-40.0, -60.0, -80.0, -100.0, -120.0])
def test_a_slot_that_a_softmax_all_but_closed(offset, backend, device):
    """Its mask's sum lies anywhere down to float32's smallest numbers, and gradients divide by it."""
    image, logits = torch.rand(2, 3, 12, 14, device=device), torch.randn(2, 4, 12, 14, device=device)
    logits[0, 1] += offset
    logits[1, 2] += offset
    logits[1, 3] += offset
    logits.requires_grad_()
    loss = iio_loss(image, logits.softmax(1), backend=backend)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_a_slot_of_one_pixel_that_a_softmax_all_but_closed(backend, device):
    """Far from it the filtered mask is eps times nearly nothing, and its square would be 0 in float32."""
    image, logits = torch.rand(1, 3, 35, 35, device=device), torch.randn(1, 4, 35, 35, device=device)
    logits[:, 0] = -60
    logits[:, 0, 3, 3] = -31
    logits.requires_grad_()
    loss = iio_loss(image, logits.softmax(1), backend=backend)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_an_infinite_mask_is_no_empty_one(backend, device):
    (image, masks), _ = Case("infinite", K=3).make(device=device)
    masks[0, 1, 2, 3] = float("inf")
    H = conditional_entropies(image, masks, backend=backend)
    assert H[0, 1].isnan().all()
    assert H[1].isfinite().all()


def test_pixels_outside_a_mask_have_a_gradient(backend, device):
    """In float64 it is that of the literal formula: what tells a binary mask which pixels should join it."""
    (image, masks), _ = Case("one-hot", K=3, masks="one-hot").make(device=device)
    _, _, dmasks = run(image, masks, backend, torch.ones_like(image[:, 0, 0, 0]))
    step, (b, m, y, x) = 1e-6, (masks == 0).nonzero()[7]
    losses = []
    for sign in (1, -1):
        moved = masks.clone()
        moved[b, m, y, x] += sign * step
        losses.append(literal.iio_loss(image, moved).sum())
    measured = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close(dmasks[b, m, y, x], measured, rtol=1e-4, atol=1e-8)


def test_no_mask_has_a_pixel(backend, device):
    image, masks = torch.rand(2, 3, 12, 12, device=device), torch.zeros(2, 4, 12, 12, device=device)
    for x in run(image, masks, backend):
        assert (x == 0).all()


@pytest.mark.parametrize("place", ["image", "masks"])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_nan_goes_into_loss_and_gradients_of_its_image_alone(place, eps, backend, device):
    (image, masks), _ = Case("nan", B=3).make(device=device)
    clean = run(image, masks, backend, eps=eps)
    poisoned = {"image": image.clone(), "masks": masks.clone()}
    poisoned[place][1, 1, 5, 6] = NAN
    got = run(poisoned["image"], poisoned["masks"], backend, eps=eps)
    assert got[0][1].isnan()
    assert got[1][1].isnan().any()
    assert got[2][1].isnan().any()
    if eps:  # through each plane's sum it reaches every pixel
        assert got[1][1, 1 if place == "image" else slice(None)].isnan().all()
        assert got[2][1].isnan().all()
    for x, y in zip(got, clean, strict=True):
        assert_all_close([x[::2]] * 3, [y[::2]] * 3)
    assert iio_loss(**poisoned, backend=backend).isnan()
    H = conditional_entropies(**poisoned, backend=backend)[1]
    for m in range(4):  # every term with the mask in it, or with the image
        others = [i for i in range(4) if i != m]
        touched = [place == "image" or m == 1 or (j >> others.index(1) & 1) == 1 for j in range(1, 8)]
        assert H[m].isnan().tolist() == touched
    assert interaction_information(**poisoned, backend=backend)[1].isnan().all()


def test_an_image_of_nan_gives_gradients_of_nan(backend, device):
    """Every sign is unknown: none may pass for 0."""
    (image, masks), _ = Case("nan").make(device=device)
    for x in run(torch.full_like(image, NAN), masks, backend):
        # The first image's incoming gradient is -1, the second's 2.
        assert x.isnan().all()


def test_bitwise_repeatable(backend, device):
    tensors, _ = Case("repeated", K=5).make(torch.float32, device)
    for x, y in zip(run(*tensors, backend), run(*tensors, backend), strict=True):
        assert torch.equal(x, y)


def test_inputs_are_never_written_to(backend, device):
    (image, masks), _ = Case("read only").make(device=device)
    before = image.clone(), masks.clone()
    incoming = torch.tensor([1.0, -2.0], dtype=image.dtype, device=device)
    leaves = image.requires_grad_(), masks.requires_grad_()
    iio_loss(*leaves, reduction="none", backend=backend).backward(incoming)
    for function in (conditional_entropies, interaction_information, inpaint):
        function(*leaves, backend=backend).sum().backward()
    for x, y in zip((*leaves, incoming), (*before, incoming.new_tensor([1.0, -2.0])), strict=True):
        assert torch.equal(x, y)


def test_backward_twice_over_one_graph(backend, device):
    """The gradient that the forward pass computed is still there, unscaled."""
    (image, masks), _ = Case("again").make(device=device)
    masks.requires_grad_()
    loss = iio_loss(image, masks, backend=backend)
    first, second = (torch.autograd.grad(3 * loss, masks, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_autocast_leaves_the_arithmetic_alone(backend, device):
    (image, masks), _ = Case("autocast").make(torch.float32, device)
    expected = run(image, masks, backend)

    def loss(image, masks):
        with torch.autocast(device, dtype=torch.bfloat16):
            return iio_loss(image, masks, reduction="none", backend=backend)

    for x, y in zip(results(loss, image, masks), expected, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y)
    for function in (conditional_entropies, interaction_information, inpaint):
        with torch.autocast(device, dtype=torch.bfloat16):
            got = function(image, masks, backend=backend)
        assert torch.equal(got, function(image, masks, backend=backend))


@pytest.mark.parametrize("function", [conditional_entropies, interaction_information, inpaint])
@each_dtype
def test_other_results_are_at_least_float32(function, dtype, backend, device):
    (image, masks), _ = Case("storage").make(dtype, device)
    got = function(image, masks, backend=backend)
    assert got.dtype == torch.float32
    exact = function(image.double(), masks.double(), backend=backend)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5)


# --- torch.compile ------------------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic, backend, device):
    def function(image, masks):
        return iio_loss(image, masks, reduction="none", backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for B, H, W in ((2, 13, 12), (3, 20, 17)) if dynamic else ((2, 13, 12),):
        tensors, _ = Case("compiled", B=B, K=2, H=H, W=W).make(device=device)
        assert_all_close(results(compiled, *tensors), results(function, *tensors))


@compiles
@pytest.mark.parametrize("function", [conditional_entropies, interaction_information, inpaint])
def test_others_compile_as_one_graph(function, backend, device):
    torch.compiler.reset()
    tensors, _ = Case("compiled", K=3).make(device=device)
    compiled = torch.compile(lambda *x: function(*x, backend=backend), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), function(*tensors, backend=backend))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
def test_compiles_to_code(any_device):
    """Once all the way through Inductor."""
    torch.compiler.reset()
    tensors, _ = Case("compiled", K=2).make(torch.float32, any_device)

    def function(image, masks):
        return iio_loss(image, masks, reduction="none", backend="reference")

    compiled = torch.compile(function, fullgraph=True)
    assert_all_close(results(compiled, *tensors), results(function, *tensors), relative=1e-5)


# --- any shape ----------------------------------------------------------------------------------------------


@settings(max_examples=examples(30), deadline=None, derandomize=True)
@given(
    B=st.integers(0, 3),
    C=st.integers(1, 4),
    K=st.integers(2, 4),
    H=st.integers(1, 16),
    W=st.integers(1, 16),
    sigma=st.sampled_from([0.5, 1.0, 5.0, 30.0]),
    half=st.integers(0, 7),
    repeats=st.integers(1, 3),
    eps=st.sampled_from([0.0, 1e-8, 1e-2]),
)
def check_any_shape(backend, device, B, C, K, H, W, sigma, half, repeats, eps):
    kernel_size = 2 * min(half, (min(H, W) - 1) // 2) + 1
    options = {"sigma": sigma, "kernel_size": kernel_size, "repeats": repeats, "eps": eps}
    tensors, options = Case("any", B, C, K, H, W, options).make(device=device)
    expected = results(literal.iio_loss, *tensors, **options)
    if kernel_size == 1:
        got = iio_loss(*tensors, reduction="none", backend=backend, **options)
        torch.testing.assert_close(got, expected[0], rtol=0, atol=1e-12)
    else:
        assert_all_close(run(*tensors, backend, **options), expected, relative=1e-9)


def test_any_shape(backend, device):
    check_any_shape(backend, device)


# --- what the loss prefers ----------------------------------------------------------------------------------


def _with_background(objects: Tensor) -> Tensor:
    return torch.cat([1 - objects.sum(1, keepdim=True), objects], 1)


def _merged(masks: Tensor, one: int, other: int) -> Tensor:
    masks = masks.clone()
    masks[:, one] += masks[:, other]
    masks[:, other] = 0
    return masks


def _dilated(objects: Tensor) -> Tensor:
    """By a pixel into the background; where two objects meet the first one wins."""
    grown = F.max_pool2d(objects, 3, 1, 1) * (1 - objects.sum(1, keepdim=True)) + objects
    return grown * (grown.cumsum(1) - grown == 0)


def test_true_masks_are_the_best_of_all(backend, device, interpreted):
    """Mean loss over 300 scenes of Tetrominoes, the true masks and what a model might settle for instead."""
    if interpreted:
        pytest.skip("minutes in the interpreter, and no matter of the backend")
    image, labels = TetrominoesGenerator(300).batch(torch.arange(300), device)
    image = image.float() / 255
    truth = F.one_hot(labels.long(), 4).movedim(-1, 1).float()
    objects = truth[:, 1:]
    spread = truth.clone()
    spread[:, 1:] += truth[:, :1] / 4
    spread[:, 0] /= 4
    candidates = {
        "truth": (truth, -9.07),
        "eroded": (_with_background(1 - F.max_pool2d(1 - objects, 3, 1, 1)), -7.85),
        "dilated": (_with_background(_dilated(objects)), -6.17),
        "two objects merged": (_merged(truth, 1, 2), -5.80),
        "background merged with an object": (_merged(truth, 0, 1), -5.83),
        "background spread": (spread, -2.98),
        "uniform": (torch.full_like(truth, 0.25), -2.50),
    }

    def mean_loss(masks, **options):
        pieces = zip(image.split(50), masks.split(50), strict=False)
        return sum(iio_loss(x, m, reduction="sum", backend=backend, **options).item() for x, m in pieces) / len(masks)

    losses = {name: mean_loss(masks) for name, (masks, _) in candidates.items()}
    assert losses == {name: pytest.approx(expected, abs=0.15) for name, (_, expected) in candidates.items()}
    for sigma in (2.0, 10.0):
        some = {name: mean_loss(masks[:50], sigma=sigma) for name, (masks, _) in candidates.items()}
        assert min(some, key=some.get) == "truth"


# --- what it is measured on ---------------------------------------------------------------------------------


def test_bytes_and_flops_of_tetrominoes():
    case = BENCHMARKS["cpu"][0]
    assert case.bytes_moved(torch.float32) == 64 * 4 * ((3 + 4) * 35 * 35 + 1)
    assert case.bytes_moved(torch.bfloat16, backward=True) == 64 * (2 * 2 * (3 + 4) * 35 * 35 + 4)
    # 16 planes by 2 axes, 2 passes and 11 taps; 14 subsets.
    blur, subsets = 16 * 2 * 2 * 11 * 2, 14
    assert case.flops() == 64 * 35 * 35 * (blur + subsets * (4 + 3 + 2 + 3))
    assert case.flops(backward=True) == 64 * 35 * 35 * (2 * blur + subsets * (12 + 4 + 4 + 2))
