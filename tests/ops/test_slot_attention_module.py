"""The Slot Attention module against the literal algorithm, and the properties it promises."""

from __future__ import annotations

import literal
import pytest
import torch
from comparing import assert_refused, comparison
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import SERVING
from torch import Tensor

import iio_kernels.ops.slot_attention_module.api as operation
from iio_kernels import IterationsFunction, SlotAttentionWeights, slot_attention_module
from iio_kernels.ops.slot_attention_module.common import Operands, Options, made_by_maps, on_tape
from iio_kernels.runtime import backends
from iio_kernels.testing.slot_attention_module import BENCHMARKS, CASES, Case, allowed_error

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
INPUTS = ("x", "slots", *SlotAttentionWeights._fields)
NAMES = ("slots out", "attention", *(f"d{name}" for name in INPUTS))


def random_like(*tensors: Tensor) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x) for x in tensors]


def results(function, x, slots, weights, T, incoming=None, **options) -> tuple[Tensor, ...]:
    """The slots, the attention, and the gradients to x, slots and each of the weights from those that come in,
    `incoming` or else random (fixed seed)."""
    leaves = [y.detach().requires_grad_() for y in (x, slots, *weights)]
    outputs = function(*leaves[:2], SlotAttentionWeights(*leaves[2:]), T, **options)
    incoming = random_like(*outputs) if incoming is None else incoming
    gradients = torch.autograd.grad(outputs, leaves, incoming, allow_unused=True, materialize_grads=True)
    return *(y.detach() for y in outputs), *gradients


def run(arguments, backend: str, incoming=None, **options) -> tuple[Tensor, ...]:
    return results(
        slot_attention_module, *arguments, incoming=incoming, return_attention=True, backend=backend, **options
    )


def plain(arguments, **options) -> tuple[Tensor, ...]:
    return results(literal.slot_attention_module, *arguments, **options)


def cast(arguments, dtype: torch.dtype) -> tuple:
    x, slots, weights, T = arguments
    return x.to(dtype), slots.to(dtype), SlotAttentionWeights(*(w.to(dtype) for w in weights)), T


assert_all_close = comparison(NAMES, 1e-11)


# --- the formula --------------------------------------------------------------------------------------------


@each_case
def test_module_equals_the_literal_algorithm(case, backend, device):
    arguments, options = case.make(device=device)
    if case.N == 0:  # where the literal algorithm divides by nothing, there are no updates
        x, slots, weights, T = arguments
        nothing = x.new_zeros(case.B, 1, case.Dx), slots, weights._replace(wv=0 * weights.wv), T
        expected = list(plain(nothing, **options, incoming=random_like(slots, x.new_zeros(case.B, case.K, 1))))
        got = run(arguments, backend, incoming=random_like(slots, x.new_zeros(case.B, case.K, 0)), **options)
        kept = [name not in ("attention", "dx", "dwq", "dwk", "dwv", "dnorm_slots_weight", "dnorm_slots_bias",
                             "dweight_ih", "dslots") for name in NAMES]  # fmt: skip
        for name, x, y, compared in zip(NAMES, got, expected, kept, strict=True):
            assert x.isfinite().all(), name
            if compared:
                torch.testing.assert_close(x, y)
        return
    assert_all_close(run(arguments, backend, **options), plain(arguments, **options))


@each_case
@each_dtype
def test_rounding_is_within_budget(case, dtype, backend, device):
    if case.N == 0:
        pytest.skip("there is no literal result")
    arguments, options = case.make(dtype, device)
    got = run(arguments, backend, **options)
    eager, truth = (plain(cast(arguments, kind), **options) for kind in (torch.float32, torch.float64))
    for name, x, rounded, exact in zip(NAMES, got, eager, truth, strict=True):
        kind = dtype if name == "dx" else torch.float32
        assert x.dtype == kind
        assert x.shape == exact.shape
        if exact.numel():
            assert (x.double() - exact).abs().max() <= allowed_error(exact, rounded.to(kind)), name


@pytest.mark.parametrize(
    ("x_dtype", "slots_dtype", "weights_dtype"), [(0, 32, 32), (32, 0, 16), (16, 32, 64), (64, 0, 32), (0, 64, 0)]
)
def test_mixed_dtypes(x_dtype, slots_dtype, weights_dtype, backend, device):
    kinds = {0: torch.bfloat16, 16: torch.float16, 32: torch.float32, 64: torch.float64}
    (x, slots, weights, T), _ = Case("mixed").make(torch.float16, device)
    x, slots = x.bfloat16().to(kinds[x_dtype]), slots.bfloat16().to(kinds[slots_dtype])
    weights = SlotAttentionWeights(*(w.bfloat16().half().to(kinds[weights_dtype]) for w in weights))
    got = run((x, slots, weights, T), backend)
    wide = kinds[max(x_dtype, slots_dtype, weights_dtype, 32)]
    assert [y.dtype for y in got] == [slots.dtype, wide, x.dtype, slots.dtype, *(w.dtype for w in weights)]
    exact = plain(cast((x, slots, weights, T), torch.float64), incoming=[y.double() for y in random_like(*got[:2])])
    for name, y, truth in zip(NAMES, got, exact, strict=True):
        relative = 64 * torch.finfo(wide).eps + 2 * torch.finfo(y.dtype).eps
        # A bias that all slots share changes no softmax over them: its gradient is the rounding of terms near 1.
        scale = 1 if name == "dnorm_slots_bias" else max(truth.abs().max(), 0.1)
        assert (y.double() - truth).abs().max() <= relative * scale, name


def test_iterations_go_on_where_others_ended(backend, device):
    (x, slots, weights, _), _ = Case("on").make(device=device)
    once = slot_attention_module(x, slots, weights, 2, backend=backend)
    again, attention = slot_attention_module(x, once, weights, 1, return_attention=True, backend=backend)
    expected = slot_attention_module(x, slots, weights, 3, return_attention=True, backend=backend)
    torch.testing.assert_close((again, attention), expected)


def test_order_of_slots_and_inputs_does_not_matter(backend, device):
    (x, slots, weights, T), _ = Case("order", K=7).make(device=device)
    s, n = torch.randperm(7, device=device), torch.randperm(37, device=device)
    out, attention, dx, dslots, *dweights = run((x, slots, weights, T), backend)
    d_out, d_attention = random_like(out, attention)
    got = run((x[:, n], slots[:, s], weights, T), backend, [d_out[:, s], d_attention[:, s][:, :, n]])
    assert_all_close(got, (out[:, s], attention[:, s][:, :, n], dx[:, n], dslots[:, s], *dweights))


def test_attention_is_a_softmax_over_slots(backend, device):
    arguments, _ = Case("softmax").make(device=device)
    _, attention = slot_attention_module(*arguments, return_attention=True, backend=backend)
    torch.testing.assert_close(attention.sum(1), torch.ones_like(attention[:, 0]))


def test_a_slot_without_attention_has_no_updates(backend, device):
    """Its normaliser is 0: the attention to it underflows, and eps is 0."""
    (x, slots, weights, _), _ = Case("none").make(device=device)
    options = {"eps": 0.0, "scale": 1e6}
    out, attention, *gradients = run((x[:, :1], slots, weights, 1), backend, **options)
    assert (attention.sum(2) == 0).any()
    assert all(y.isfinite().all() for y in (out, *gradients))
    expected = run((x[:, :1], slots, weights, 1), "reference", **options)
    assert_all_close((out, attention, *gradients), expected, relative=1e-9)


# --- derivatives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", ["slots", "attention"])
def test_gradient_of_one_output_alone(used, backend, device):
    """The other's incoming gradient is absent, not zero."""
    arguments, _ = Case("one output").make(device=device)
    at = ("slots", "attention").index(used)

    def ours(*arguments):
        return slot_attention_module(*arguments, return_attention=True, backend=backend)[at : at + 1]

    def formula(*arguments):
        return literal.slot_attention_module(*arguments)[at : at + 1]

    for x, y in zip(results(ours, *arguments), results(formula, *arguments), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wanted", ["x", "slots", "wk", "weight_ih", "b2"])
def test_gradient_of_one_input_alone(wanted, backend, device):
    (x, slots, weights, T), _ = Case("one input").make(device=device)
    expected = dict(zip(NAMES, plain((x, slots, weights, T)), strict=True))[f"d{wanted}"]
    tensors = {"x": x, "slots": slots, **weights._asdict()}
    leaf = tensors[wanted].requires_grad_()
    out, attention = slot_attention_module(x, slots, weights, T, return_attention=True, backend=backend)
    torch.autograd.backward((out, attention), random_like(out, attention))
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-10, atol=1e-10)
    assert all(y.grad is None for name, y in tensors.items() if name != wanted)


def test_results_without_gradients(backend, device):
    arguments, _ = Case("inference").make(device=device)
    out = slot_attention_module(*arguments, backend=backend)
    assert not out.requires_grad
    with torch.no_grad():
        arguments[0].requires_grad_()
        assert torch.equal(slot_attention_module(*arguments, backend=backend), out)


SMALL = Case("small", B=1, N=5, K=2, Dx=2, D=3, H=2, Dk=2, T=2)


def test_gradcheck(backend, device, interpreted):
    (x, slots, weights, T), _ = SMALL.make(device=device)
    leaves = [y.requires_grad_() for y in (x, slots, *weights)]

    def function(x, slots, *weights):
        weights = SlotAttentionWeights(*weights)
        return slot_attention_module(x, slots, weights, T, return_attention=True, backend=backend)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=interpreted)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("output", ["slots", "attention", "sum"])
@pytest.mark.parametrize("to", ["x", "slots", "wq", "bias_ih", "b2"])
def test_second_derivatives_are_the_references_alone(output, to, backend, device):
    """Also where the incoming gradient is a constant, as that of a sum: nothing passes silently for 0."""
    (x, slots, weights, T), _ = SMALL.make(device=device)
    leaves = dict(zip(INPUTS, (y.requires_grad_() for y in (x, slots, *weights)), strict=True))
    out, attention = slot_attention_module(x, slots, weights, T, return_attention=True, backend=backend)
    loss = {"slots": out.square().sum(), "attention": attention.square().sum(), "sum": out.sum()}[output]
    penalty = torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()
    if backend == "reference":
        (second,) = torch.autograd.grad(penalty, leaves[to], allow_unused=True, materialize_grads=True)
        assert (second.abs().max() > 0) == (to != "b2" or T > 1)
    else:
        with pytest.raises(RuntimeError, match=r"differentiates once.*reference"):
            torch.autograd.grad(penalty, leaves[to])


def test_functional_gradient(backend, device):
    (x, slots, weights, T), _ = Case("functional").make(device=device)

    def loss(x, slots, wv):
        weights_ = weights._replace(wv=wv)
        out, attention = slot_attention_module(x, slots, weights_, T, return_attention=True, backend=backend)
        return out.square().sum() + attention.square().sum()

    leaves = [y.clone().requires_grad_() for y in (x, slots, weights.wv)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.func.grad(loss, argnums=(0, 1, 2))(x, slots, weights.wv)
    torch.testing.assert_close(got, expected)


def test_function_by_itself(any_device):
    """`IterationsFunction` with the reference's kernels: the gradient as written out, against plain autograd."""
    (x, slots, weights, T), _ = Case("function").make(device=any_device)

    def function(x, slots, weights, T):
        maps = operation._maps(weights, len(weights.wq) ** -0.5)
        return IterationsFunction.apply(x, slots, T, 1e-8, 1e-5, True, "reference", *maps)[:2]

    assert_all_close(results(function, x, slots, weights, T), run((x, slots, weights, T), "reference"))


# --- layout -------------------------------------------------------------------------------------------------


def _strided(x: Tensor, how: str) -> Tensor:
    """The same values under other strides."""
    if how == "transposed":
        return x.mT.contiguous().mT if x.dim() > 1 else x.repeat_interleave(2)[::2]
    if how == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), NAN).to(x)
        return wide[..., 1::2].copy_(x)
    if how == "rows sliced":
        wide = torch.full((*x.shape[:-2], 3 * x.shape[-2], x.shape[-1]), NAN).to(x) if x.dim() > 1 else None
        return x.repeat_interleave(3)[::3] if wide is None else wide[..., ::3, :].copy_(x)
    if how == "expanded":
        return x[:1].expand_as(x)
    if how == "of one number":
        return x.flatten()[0].expand_as(x)
    raise ValueError(how)


each_stride = pytest.mark.parametrize("how", ["transposed", "sliced", "rows sliced", "expanded", "of one number"])


@each_stride
@pytest.mark.parametrize("Dx", [8, 5])
def test_strided_inputs(how, Dx, backend, device):
    (x, slots, weights, T), _ = Case("strided", B=3, Dx=Dx).make(device=device)
    views = [_strided(y, how) for y in (x, slots, *weights)]
    assert not any(y.is_contiguous() for y in views)
    dense = [y.clone(memory_format=torch.contiguous_format) for y in views]
    got, expected = (run((y[0], y[1], SlotAttentionWeights(*y[2:]), T), backend) for y in (views, dense))
    assert_all_close(got, expected)


@each_stride
def test_strided_incoming_gradients(how, backend, device):
    arguments, _ = Case("strided", B=3).make(device=device)
    incoming = [_strided(y, how) for y in random_like(*run(arguments, backend)[:2])]
    assert not any(y.is_contiguous() for y in incoming)
    assert_all_close(run(arguments, backend, incoming), run(arguments, backend, [y.contiguous() for y in incoming]))


def test_sum_sends_gradients_of_stride_zero(backend, device):
    arguments, _ = Case("stride 0").make(device=device)
    out, attention = run(arguments, backend)[:2]
    incoming = [y.new_ones(()).expand_as(y) for y in (out, attention)]
    assert_all_close(run(arguments, backend, incoming), run(arguments, backend, [y.contiguous() for y in incoming]))


def test_offsets_beyond_32_bits(backend, device):
    """In memory that is never touched, so that it costs nothing."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    (x, slots, weights, T), _ = Case("far", B=1, N=2, Dx=3).make(torch.bfloat16, device)
    try:
        memory = torch.empty(2**31 + 3, dtype=x.dtype, device=device)
    except RuntimeError:
        pytest.skip("no 4 GiB of addresses")
    view = memory.as_strided(x.shape, (0, 2**31, 1)).copy_(x)
    assert_all_close(run((view, slots, weights, T), backend), run((x, slots, weights, T), backend))


# --- edges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["x", "slots"])
def test_nan_goes_to_its_image_alone(place, backend, device):
    """Through every number of the image, and to none of the others, whichever comes first."""
    (x, slots, weights, T), _ = Case("nan", B=3, N=37, Dx=5, D=7, H=6).make(torch.float32, device)
    clean = run((x, slots, weights, T), backend)
    x, slots = x.clone(), slots.clone()
    (x if place == "x" else slots)[1, 2, 3] = NAN
    got = run((x, slots, weights, T), backend)
    for name, y, before in zip(NAMES[:4], got, clean, strict=False):
        assert y[1].isnan().all(), name
        if backend in NAMESPACES:
            assert torch.equal(y[::2], before[::2]), name
        else:  # whose products batch images
            torch.testing.assert_close(y[::2], before[::2])
    assert all(y.isnan().any() for y in got)


def test_bitwise_repeatable(backend, device):
    arguments, _ = Case("repeated", N=300, K=5).make(torch.float32, device)
    assert all(map(torch.equal, run(arguments, backend), run(arguments, backend)))


def test_inputs_are_never_written_to(backend, device):
    (x, slots, weights, T), _ = Case("read only").make(device=device)
    before = [y.clone() for y in (x, slots, *weights)]
    run((x, slots, weights, T), backend)
    assert all(map(torch.equal, (x, slots, *weights), before))


@kernels_alone
def test_nothing_of_the_inputs_size_is_kept_for_backward(backend, device):
    (x, slots, weights, T), _ = Case("kept", N=5000, T=1).make(device=device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        slot_attention_module(x.requires_grad_(), slots, weights, T, return_attention=True, backend=backend)
    assert [y.data_ptr() for y in kept if y.numel() >= 5000] == [x.data_ptr()]


def test_autocast_leaves_the_arithmetic_alone(backend, device):
    arguments, _ = Case("autocast").make(torch.float32, device)
    expected = run(arguments, backend)

    def function(*arguments, **options):
        with torch.autocast(device, dtype=torch.bfloat16):
            return slot_attention_module(*arguments, **options)

    got = results(function, *arguments, return_attention=True, backend=backend)
    assert all(map(torch.equal, got, expected))


# --- one by one ---------------------------------------------------------------------------------------------


@each_case
def test_steps_one_by_one_equal_the_literal_algorithm(case):
    """What "auto" does on a GPU at sizes that do not suit one launch."""
    if case.N == 0:
        pytest.skip("there is no literal result")
    arguments, options = case.make()
    options = {"eps": 1e-8, "norm_eps": 1e-5, "scale": case.Dk**-0.5} | options

    def function(x, slots, weights, T):
        own = Options(T, options["eps"], options["norm_eps"])
        return operation._one_by_one(x, slots, weights, options["scale"], own)

    assert_all_close(results(function, *arguments), plain(arguments, **options))


def test_auto_takes_steps_one_by_one_where_one_launch_does_not_suit(monkeypatch):
    arguments, _ = Case("chosen").make()
    monkeypatch.setattr(
        backends, "choose", lambda op, backend, device: "triton" if op == "slot_attention_module" else "cpu"
    )
    monkeypatch.setattr(operation, "suits_one_launch", lambda *sizes: False)
    monkeypatch.setattr(operation, "_iterate", None)
    got = slot_attention_module(*arguments, return_attention=True)
    torch.testing.assert_close(got, literal.slot_attention_module(*arguments))


@pytest.mark.parametrize(
    ("case", "fits", "suits"),
    [
        (Case("", N=35**2, Dx=32, D=64, H=128), True, True),
        (Case("", N=35**2, K=16, Dx=32, D=64, H=128), True, True),
        (Case("", N=2048, K=7, Dx=32), True, True),
        (Case("", N=2049, K=7, Dx=32), True, False),
        (Case("", N=9, K=16, Dx=64, D=256, H=256), True, True),
        (Case("", N=9, Dx=65), False, False),
        (Case("", N=9, D=257), False, False),
        (Case("", N=9, K=17), False, False),
        (Case("", N=9, K=1, H=257), False, False),
    ],
    ids=lambda x: str(x) if isinstance(x, bool) else f"N{x.N} K{x.K} Dx{x.Dx} D{x.D} H{x.H}",
)
def test_sizes_of_one_launch(case, fits, suits):
    x, slots, weights, _ = case.make(torch.float32)[0]
    assert operation.fits_triton(x, slots, weights) == fits
    assert operation.suits_one_launch(x, slots, weights) == suits


@pytest.mark.skipif("triton" not in {backend for backend, _ in SERVING}, reason="Triton can run no kernels here")
def test_triton_by_name_refuses_sizes_beyond_its_kernels():
    arguments, _ = Case("too many", K=17).make()
    device = next(device for backend, device in reversed(SERVING) if backend == "triton")
    x, slots, weights, T = arguments
    on_device = x.to(device), slots.to(device), SlotAttentionWeights(*(w.to(device) for w in weights)), T
    with pytest.raises(ValueError, match=r"backend: 'triton' has no kernels for 17 slots .*one of 'auto'"):
        slot_attention_module(*on_device, backend="triton")


# --- the operators ------------------------------------------------------------------------------------------


@kernels_alone
@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(attention, dtype, backend, device):
    """What torch asks of operators, with and without the attention and its gradient."""
    backends.implementation("slot_attention_module", backend)  # which defines them
    operators = getattr(torch.ops, NAMESPACES[backend])
    (x, slots, weights, T), _ = SMALL.make(dtype, device)
    maps = operation._maps(weights, 0.7)
    weights, biases = list(maps[:5]), list(maps[5:])
    arguments = (x, slots, weights, biases, T, 1e-8, 1e-5, attention)
    torch.library.opcheck(operators.iterations_forward.default, arguments)
    out, A, tape = operators.iterations_forward(*arguments)
    d_out, dA = random_like(out, A)
    arguments = (d_out, dA if attention else None, x, tape, weights, 1e-8)
    torch.library.opcheck(operators.iterations_backward.default, arguments)


@kernels_alone
def test_operators_agree_with_the_reference_on_the_tape_and_what_maps_make(backend, device):
    """All of it, so that nothing there is left unwritten."""
    case = Case("tape", K=5, Dx=7, D=9, H=6)
    (x, slots, weights, T), _ = case.make(device=device)
    operands, options = Operands(x, slots, operation._maps(weights, 0.7)), Options(T, 1e-8, 1e-5)
    kernels, reference = (backends.implementation("slot_attention_module", name) for name in (backend, "reference"))
    out, A, tape = reference.forward(operands, options, True)
    assert tape.shape == (2, T, 5, sum(on_tape(9, 7, 6)))
    for got, expected in zip(kernels.forward(operands, options, True), (out, A, tape), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    backward = *random_like(out, A), operands, tape, options
    expected = reference.backward(*backward)
    assert expected[2].shape == (2, T, 5, sum(made_by_maps(9, 7, 6)))
    for got, exact in zip(kernels.backward(*backward), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


# --- torch.compile ------------------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic, backend, device):
    def function(*arguments):
        return slot_attention_module(*arguments, return_attention=True, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for B, N in ((2, 13), (3, 20)) if dynamic else ((2, 13),):
        arguments, _ = Case("compiled", B=B, N=N).make(device=device)
        assert_all_close(results(compiled, *arguments), results(function, *arguments))


@compiles
def test_compiles_where_nothing_has_a_gradient(backend, device):
    """Nothing at all, or only the first of two calls."""
    torch.compiler.reset()
    (x, slots, weights, T), _ = Case("compiled").make(device=device)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(x, slots):
        with torch.no_grad():
            slots = slot_attention_module(x, slots, weights, T - 1, backend=backend)
        return slot_attention_module(x, slots, weights, 1, backend=backend)

    expected = slot_attention_module(x, slots, weights, T, backend=backend)
    torch.testing.assert_close(function(x, slots), expected)
    torch.testing.assert_close(function(x.requires_grad_(), slots), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
@kernels_alone
def test_compiles_to_code(backend, device):
    """Once all the way through Inductor."""
    torch.compiler.reset()
    arguments, _ = Case("compiled", T=2).make(torch.float32, device)

    def function(*arguments):
        return slot_attention_module(*arguments, return_attention=True, backend=backend)

    compiled = torch.compile(function, fullgraph=True)
    assert_all_close(results(compiled, *arguments), results(function, *arguments), relative=1e-5)


# --- any shape ----------------------------------------------------------------------------------------------


@settings(max_examples=examples(25), deadline=None, derandomize=True)
@given(
    B=st.integers(0, 3),
    N=st.integers(1, 100),
    K=st.integers(1, 16),
    Dx=st.integers(1, 40),
    D=st.integers(1, 40),
    H=st.integers(1, 40),
    T=st.integers(1, 4),
)
def check_any_shape(backend, device, B, N, K, Dx, D, H, T):
    arguments, _ = Case("any", B, N, K, Dx, D, H, 8, T).make(device=device)
    assert_all_close(run(arguments, backend), plain(arguments), relative=1e-10)


def test_any_shape(backend, device):
    check_any_shape(backend, device)


# --- what is refused ----------------------------------------------------------------------------------------


def call(K=4, Dx=8, D=16, H=24, weights=None, **changes) -> dict[str, object]:
    """Good arguments but for the changes, of which `weights` replaces some of these."""
    (x, slots, all_weights, T), _ = Case("refused", K=K, Dx=Dx, D=D, H=H).make(torch.float32)
    all_weights = all_weights._replace(**weights) if isinstance(weights, dict) else weights or all_weights
    return {"x": x, "slots": slots, "weights": all_weights, "iterations": T} | changes


def on_meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


# A row: the arguments, the type of the error, and what its message must hold in this order.
TABLE = [
    (call(x=None), TypeError, ["x", "torch.Tensor (B, N, Dx)", "NoneType"]),
    (call(x=torch.ones(2, 37, 8, dtype=torch.int32)), TypeError, ["x", "float32", "torch.int32"]),
    (call(x=torch.rand(37, 8)), ValueError, ["x", "(B, N, Dx)", "(37, 8)"]),
    (call(x=torch.rand(2, 37, 0)), ValueError, ["x", "at least one feature", "(2, 37, 0)"]),
    (call(slots=[[0.0]]), TypeError, ["slots", "torch.Tensor (B, K, D)", "list"]),
    (call(slots=torch.rand(2, 4)), ValueError, ["slots", "(B, K, D)", "(2, 4)"]),
    (call(slots=torch.rand(3, 4, 16)), ValueError, ["slots", "(2, K, D)", "x (2, 37, 8)", "(3, 4, 16)"]),
    (call(slots=torch.rand(2, 0, 16)), ValueError, ["slots", "at least one slot", "(2, 0, 16)"]),
    (call(slots=on_meta(2, 4, 16)), ValueError, ["slots", "device of x, cpu", "meta"]),
    (call(weights=(torch.rand(3),)), TypeError, ["weights", "SlotAttentionWeights", "tuple"]),
    (call(weights={"wq": None}), TypeError, ["weights.wq", "torch.Tensor", "NoneType"]),
    (call(weights={"b1": torch.zeros(24).int()}), TypeError, ["weights.b1", "float32", "torch.int32"]),
    (call(weights={"wk": torch.rand(12, 9)}), ValueError, ["weights.wk", "(12, 8)", "x (2, 37, 8)", "(12, 9)"]),
    (call(weights={"wv": torch.rand(12, 8)}), ValueError, ["weights.wv", "(16, 8)", "slots", "(12, 8)"]),
    (call(weights={"weight_hh": torch.rand(16, 16)}), ValueError, ["weights.weight_hh", "(48, 16)", "(16, 16)"]),
    (call(weights={"bias_ih": torch.rand(48, 1)}), ValueError, ["weights.bias_ih", "(48,)", "(48, 1)"]),
    (call(weights={"w2": torch.rand(16, 25)}), ValueError, ["weights.w2", "(16, 24)", "(16, 25)"]),
    (call(weights={"b2": on_meta(16)}), ValueError, ["b2", "device of x, cpu", "meta"]),
    (call(iterations=0), ValueError, ["iterations", "int >= 1", "0"]),
    (call(iterations=1.0), TypeError, ["iterations", "int", "float"]),
    (call(eps=-1.0), ValueError, ["eps", ">= 0", "-1"]),
    (call(norm_eps=0.0), ValueError, ["norm_eps", "> 0", "0"]),
    (call(scale=NAN), ValueError, ["scale", "finite", "nan"]),
    (call(return_attention=1), TypeError, ["return_attention", "bool", "1"]),
    (call(backend="fastest"), ValueError, ["backend", "'auto'", "'reference'", "'fastest'"]),
]


@pytest.mark.parametrize(("arguments", "error", "words"), TABLE, ids=lambda x: ", ".join(x) if type(x) is list else "")
def test_bad_arguments_are_named(arguments, error, words):
    assert_refused(slot_attention_module, arguments, error, words)


def test_options_are_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        slot_attention_module(*call().values(), 1e-8)


@pytest.mark.parametrize("backend", ["reference", "written_out"])
def test_no_value_is_looked_at(backend):
    """A meta tensor has none: to look at one, or to wait for the device, raises."""
    (x, slots, weights, T), _ = Case("meta").make(device="meta")
    out, attention = slot_attention_module(
        x.requires_grad_(), slots, weights, T, return_attention=True, backend=backend
    )
    assert (out.shape, attention.shape) == ((2, 4, 16), (2, 4, 37))
    (out.sum() + attention.square().sum()).backward()
    assert x.grad.shape == (2, 37, 8)


# --- what it is measured on ---------------------------------------------------------------------------------


def test_bytes_and_flops_of_tetrominoes():
    case = BENCHMARKS["cpu"][0]
    assert case.bytes_moved(torch.float32) == 64 * 1225 * 32 * 4
    assert case.bytes_moved(torch.bfloat16, backward=True) == 2 * 64 * 1225 * 32 * 2
    # A slot's maps: to what x is compared with, to three gates from M and three from s, and the two of the MLP.
    maps = 64 * 32 + 3 * 64 * 32 + 3 * 64 * 64 + 2 * 64 * 128
    assert case.flops() == 2 * 64 * 3 * 4 * (2 * 1225 * 32 + maps)
    assert case.flops(backward=True) == 2 * 64 * 3 * 4 * (5 * 1225 * 32 + 2 * maps)
