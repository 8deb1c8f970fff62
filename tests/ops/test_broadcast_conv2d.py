"""The broadcast convolution against literally convolving the grid, and the properties it promises."""

from __future__ import annotations

import functools
from dataclasses import replace

import literal
import pytest
import torch
import torch.nn.functional as F
from comparing import assert_refused, comparison
from depth import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from serving import SERVING
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from iio_kernels import BroadcastFunction, broadcast_conv2d
from iio_kernels.ops.broadcast_conv2d import reference
from iio_kernels.ops.broadcast_conv2d.common import Classes, Operands, Options, classes, inside
from iio_kernels.runtime import backends
from iio_kernels.testing.broadcast_conv2d import BENCHMARKS, CASES, Case, allowed_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# torch.compile itself makes an instance of every Function that it traces.
compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
STRIDED_CONV = Case("transposed", size=(6, 5), stride=(2, 2), output_padding=(1, 1), transposed=True)
each_kind = pytest.mark.parametrize("kind", [Case("conv"), STRIDED_CONV], ids=lambda case: case.name)
each_relu = pytest.mark.parametrize("relu", [True, False], ids=["ReLU", "no ReLU"])
#: Instead of all backends: those that have kernels, and the namespaces of their operators.
NAMESPACES = {"cpu": "iio_kernels", "triton": "iio_kernels_triton"}
kernels_alone = pytest.mark.parametrize(
    "serving", [pair for pair in SERVING if pair[0] in NAMESPACES], indirect=True, ids="-".join
)
NAN = float("nan")
NAMES = ("out", "dz", "dweight", "dposition_map")


def random_like(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)


def results(function, tensors, incoming=None, **options) -> tuple[Tensor, ...]:
    """What `function` returns, and the gradients to its tensors from the one that comes in, `incoming` or else random
    (fixed seed)."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    out = function(*leaves, **options)
    incoming = random_like(out) if incoming is None else incoming
    return out.detach(), *torch.autograd.grad(out, leaves, incoming)


def run(tensors, backend: str, incoming=None, **options) -> tuple[Tensor, ...]:
    return results(broadcast_conv2d, tensors, incoming, backend=backend, **options)


def literally(tensors, incoming=None, **options) -> tuple[Tensor, ...]:
    return results(literal.broadcast_conv2d, tensors, incoming, **options)


assert_all_close = comparison(NAMES, 1e-12)


# --- the formula --------------------------------------------------------------------------------------------


@each_case
def test_equals_the_literal_convolution(case, backend, device):
    tensors, options = case.make(device=device)
    assert_all_close(run(tensors, backend, **options), literally(tensors, **options))


@each_case
@each_dtype
def test_rounding_is_within_budget(case, dtype, backend, device):
    tensors, options = case.make(dtype, device)
    got = run(tensors, backend, **options)
    incoming = random_like(got[0])
    eager, truth = (
        literally([x.to(kind) for x in tensors], incoming.to(kind), **options)
        for kind in (torch.float32, torch.float64)
    )
    for name, x, plain, exact in zip(NAMES, got, eager, truth, strict=True):
        assert x.dtype == dtype
        assert x.shape == exact.shape
        if exact.numel():
            assert (x.double() - exact).abs().max() <= allowed_error(exact, plain.to(dtype)), name


def test_position_embedding_added_to_the_slots(backend, device):
    """A decoder's layer: the convolution of slots plus positions, as Slot Attention's decoders have them."""
    for case in (Case("conv"), STRIDED_CONV):
        conv = F.conv_transpose2d if case.transposed else F.conv2d
        more = (case.output_padding,) if case.transposed else ()
        (z, weight, _), options = case.make(device=device)
        position, bias = torch.randn(case.D, *case.size).to(z), torch.randn(case.O).to(z)

        def plain(z, weight, position, bias, conv=conv, more=more, case=case):
            grid = z.flatten(0, 1)[:, :, None, None] + position
            return conv(grid, weight, bias, case.stride, case.padding, *more).relu().unflatten(0, z.shape[:2])

        def ours(z, weight, position, bias, conv=conv, more=more, case=case, options=options):
            position_map = conv(position[None], weight, bias, case.stride, case.padding, *more)[0]
            return broadcast_conv2d(z, weight, position_map, backend=backend, **options)

        inputs = z, weight, position, bias
        for x, y in zip(results(ours, inputs), results(plain, inputs), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def test_coordinates_concatenated_to_the_slots(backend, device):
    """As in IODINE: the convolution of slots and coordinates, one behind the other."""
    (z, _, _), options = Case("concatenated", D=6).make(device=device)
    weight, coordinates = torch.randn(8, 6 + 2, 5, 5).to(z), torch.rand(2, 9, 7).to(z)

    def plain(z, weight):
        slots = z.flatten(0, 1)[:, :, None, None].expand(-1, -1, 9, 7)
        grid = torch.cat([slots, coordinates.expand(len(slots), -1, -1, -1)], 1)
        return F.conv2d(grid, weight, padding=2).relu().unflatten(0, z.shape[:2])

    def ours(z, weight):
        position_map = F.conv2d(coordinates[None], weight[:, 6:], padding=2)[0]
        return broadcast_conv2d(z, weight[:, :6], position_map, backend=backend, **options)

    for x, y in zip(results(ours, (z, weight)), results(plain, (z, weight)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def test_numbers_stand_for_pairs(backend, device):
    (z, weight, position_map), _ = Case("square", size=(7, 7), relu=False).make(device=device)
    pairs = broadcast_conv2d(z, weight, position_map, (7, 7), stride=(1, 1), padding=(2, 2), backend=backend)
    assert torch.equal(broadcast_conv2d(z, weight, position_map, 7, padding=2, backend=backend), pairs)
    assert torch.equal(broadcast_conv2d(z, weight, position_map, [7, 7], padding=[2, 2], backend=backend), pairs)


def test_classes_are_as_few_as_rows_differ():
    """Where all taps of a class that lies between others fall inside, no two classes see the same taps."""
    assert classes(35, 35, 5, 1, 2, False) == (2, 1, 2)
    assert classes(8, 16, 5, 2, 2, True) == (1, 2, 2)
    for axis in ((35, 35, 5, 1, 2, False), (8, 16, 5, 2, 2, True), (20, 10, 4, 2, 1, False), (9, 25, 3, 3, 1, True)):
        taps = inside(classes(*axis), *axis, torch.zeros(()))
        assert len(taps.unique(dim=0)) == len(taps)


# --- dtypes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", ["0 16 16", "16 0 0", "32 0 16", "0 0 32", "64 32 0", "0 16 64"])
def test_mixed_dtypes(dtypes, backend, device):
    kinds = {"0": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}
    dtypes = [kinds[name] for name in dtypes.split()]
    tensors, options = Case("mixed").make(torch.float16, device)
    tensors = [x.to(dtype) for x, dtype in zip(tensors, dtypes, strict=True)]
    got = run(tensors, backend, **options)
    promoted = functools.reduce(torch.promote_types, dtypes)
    assert [x.dtype for x in got] == [promoted, *dtypes]
    exact = literally([x.double() for x in tensors], random_like(got[0]).double(), **options)
    for x, y in zip(got, exact, strict=True):
        assert (x.double() - y).abs().max() <= 8 * torch.finfo(x.dtype).eps * y.abs().max()


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_the_result_alone(autocast, backend, device):
    tensors, options = Case("autocast").make(torch.float32, device)

    def function(*tensors, **options):
        with torch.autocast(device, dtype=autocast):
            return broadcast_conv2d(*tensors, **options)

    out, *gradients = results(function, tensors, backend=backend, **options)
    assert out.dtype == autocast
    assert [x.dtype for x in gradients] == [torch.float32] * 3
    rounded = broadcast_conv2d(*tensors, backend=backend, **options).to(autocast)
    torch.testing.assert_close(out, rounded, rtol=0, atol=0)
    expected = run(tensors, backend, random_like(out).float(), **options)[1:]
    for x, y in zip(gradients, expected, strict=True):
        torch.testing.assert_close(x, y)
    double, options = Case("autocast").make(torch.float64, device)
    assert results(function, double, backend=backend, **options)[0].dtype == torch.float64


def test_the_sum_is_rounded_once(backend, device):
    """Where a product or the map by itself would lose what makes the difference."""
    z, weight = (torch.ones(shape, dtype=torch.bfloat16, device=device) for shape in ((1, 2), (1, 2, 1, 1)))
    weight[0, 1] = 2**-9
    position_map = torch.full((1, 1, 1), -1.0, dtype=torch.bfloat16, device=device)
    assert broadcast_conv2d(z, weight, position_map, 1, backend=backend).item() == 2**-9


# --- gradients ----------------------------------------------------------------------------------------------


@each_relu
@each_kind
def test_gradcheck(relu, kind, backend, device, interpreted):
    case = replace(kind, D=2, O=3, size=(3, 4), kernel=(3, 2), padding=(1, 1), batch=(2,), relu=relu)
    tensors, options = case.make(device=device)
    leaves = [x.requires_grad_() for x in tensors]

    def function(*leaves):
        return broadcast_conv2d(*leaves, backend=backend, **options)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=interpreted)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("wanted", range(3), ids=NAMES[1:])
def test_gradient_of_one_input_alone(wanted, backend, device):
    tensors, options = Case("one input").make(device=device)
    expected = run(tensors, backend, **options)[1 + wanted]
    leaf = tensors[wanted].requires_grad_()
    out = broadcast_conv2d(*tensors, backend=backend, **options)
    torch.testing.assert_close(torch.autograd.grad(out, leaf, random_like(out))[0], expected)


@each_relu
def test_second_derivatives_are_the_references_alone(relu, backend, device):
    """Also where the incoming gradient is a constant, as that of a sum: nothing passes silently for 0."""
    tensors, options = Case("twice", relu=relu).make(device=device)
    z, weight, position_map = (x.requires_grad_() for x in tensors)
    out = broadcast_conv2d(z, weight, position_map, backend=backend, **options)
    for loss in (out.sum(), out.square().sum()):
        penalty = torch.autograd.grad(loss, z, create_graph=True)[0].square().sum()
        if backend == "reference":
            assert torch.autograd.grad(penalty, weight, retain_graph=True)[0].abs().max() > 0
        else:
            with pytest.raises(RuntimeError, match=r"differentiates once.*reference"):
                torch.autograd.grad(penalty, weight, retain_graph=True)


def test_functional_gradient(backend, device):
    tensors, options = Case("functional").make(device=device)

    def loss(*tensors):
        return broadcast_conv2d(*tensors, backend=backend, **options).square().sum()

    leaves = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for x, y in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*tensors), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_function_by_itself(any_device):
    """`BroadcastFunction` with the reference's kernels: the gradient as written out, against plain autograd."""
    for relu in (True, False):
        kinds = Classes(1, 2, 1), Classes(0, 3, 2)
        tensors = [torch.randn(shape).double().to(any_device) for shape in ((3, 4, 5, 2), (6, 9, 2))]
        options = Options(*kinds, relu, torch.float64)
        got = results(lambda *x, o=options: BroadcastFunction.apply(*x, *o, "reference"), tensors)
        expected = results(lambda *x, o=options: reference.forward(Operands(*x), o), tensors)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y)


def test_results_without_gradients(backend, device):
    tensors, options = Case("inference").make(device=device)
    plain = broadcast_conv2d(*tensors, backend=backend, **options)
    assert not plain.requires_grad
    tensors[0].requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(broadcast_conv2d(*tensors, backend=backend, **options), plain)
    broadcast_conv2d(*tensors, backend=backend, **options).sum().backward()


# --- layout -------------------------------------------------------------------------------------------------


def _strided(x: Tensor, how: str) -> Tensor:
    """The same values under other strides."""
    if how == "transposed":
        return x.mT.contiguous().mT
    if how == "channels first":
        return x.contiguous()
    if how == "channels last":
        return x.movedim(-3, -1).contiguous().movedim(-1, -3)
    if how == "sliced":
        wide = torch.full((*x.shape[:-2], 2 * x.shape[-2], 3 * x.shape[-1] + 1), NAN).to(x)
        return wide[..., ::2, 1::3].copy_(x)
    if how == "expanded":
        return x[:1].expand_as(x)
    if how == "expanded over pixels":
        return x[..., :1, :1].expand_as(x)
    if how == "of one number":
        return x.flatten()[0].expand_as(x)
    raise ValueError(how)


STRIDES = ["transposed", "channels first", "channels last", "sliced", "expanded", "expanded over pixels"]
STRIDES += ["of one number"]
each_stride = pytest.mark.parametrize("how", STRIDES)


@each_stride
@each_kind
def test_strided_inputs(how, kind, backend, device):
    (z, weight, position_map), options = kind.make(device=device)
    views = (
        _strided(z, "transposed" if how.startswith("channels") else how),
        *(_strided(x, how) for x in (weight, position_map)),
    )
    expected = run([x.clone(memory_format=torch.contiguous_format) for x in views], backend, **options)
    leaves = [x.detach().requires_grad_() for x in views]
    out = broadcast_conv2d(*leaves, backend=backend, **options)
    assert_all_close((out, *torch.autograd.grad(out, leaves, random_like(out))), expected)


@each_stride
@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_strided_incoming_gradients(how, kind, dtype, backend, device):
    tensors, options = kind.make(dtype, device)
    incoming = _strided(random_like(run(tensors, backend, **options)[0]), how)
    expected = run(tensors, backend, incoming.clone(memory_format=torch.contiguous_format), **options)
    for x, y in zip(run(tensors, backend, incoming, **options), expected, strict=True):
        assert torch.equal(x, y)


def test_sum_sends_gradients_of_stride_zero(backend, device):
    tensors, options = Case("stride 0").make(device=device)
    expected = run(tensors, backend, torch.ones(2, 3, 8, 9, 7).to(tensors[0]), **options)
    leaves = [x.requires_grad_() for x in tensors]
    broadcast_conv2d(*leaves, backend=backend, **options).sum().backward()
    for leaf, gradient in zip(leaves, expected[1:], strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@each_kind
def test_the_result_is_channels_last(kind, dtype, backend, device):
    tensors, options = kind.make(dtype, device)
    out = broadcast_conv2d(*tensors, backend=backend, **options)
    assert out.shape == (2, 3, *kind.result)
    assert out.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


# --- edges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 2], ids=["z", "weight", "position_map"])
@each_relu
def test_nan_goes_to_everything_that_depends_on_it(place, relu, backend, device):
    tensors, options = Case("nan", relu=relu).make(device=device)
    clean = run(tensors, backend, **options)
    tensors[place][tuple(n // 2 for n in tensors[place].shape)] = NAN
    out, dz, dweight, d_map = run(tensors, backend, **options)
    if place == 0:  # all of slot 1, 1, and nothing of the others
        assert out[1, 1].isnan().all()
        assert dweight.isnan().any()
        for x, y in ((out, clean[0]), (dz, clean[1])):
            others = [x.flatten(0, 1)[[0, 1, 2, 3, 5]], y.flatten(0, 1)[[0, 1, 2, 3, 5]]]
            torch.testing.assert_close(*others)
    elif place == 1:
        assert out[:, :, 4].isnan().all()
        assert dz.isnan().any()
        torch.testing.assert_close(out[:, :, [0, 1, 2, 3, 5, 6, 7]], clean[0][:, :, [0, 1, 2, 3, 5, 6, 7]])
    else:
        assert out[:, :, 4, 4, 3].isnan().all()
        assert out.isnan().sum() == 6
        # What comes in passes where the sum is a NaN, as it does through torch's ReLU.
        torch.testing.assert_close(d_map[4, 4, 3], random_like(out)[:, :, 4, 4, 3].sum())


def test_an_incoming_nan_goes_to_the_gradients_it_belongs_to(backend, device):
    tensors, options = Case("nan", relu=False).make(device=device)
    incoming = random_like(run(tensors, backend, **options)[0])
    clean = run(tensors, backend, incoming, **options)
    incoming[1, 2, 5, 4, 3] = NAN
    _, dz, dweight, d_map = run(tensors, backend, incoming, **options)
    assert dz[1, 2].isnan().all()
    assert dweight[5].isnan().any()
    assert d_map.isnan().nonzero().tolist() == [[5, 4, 3]]
    torch.testing.assert_close(dz[0], clean[1][0])


def test_relu_cuts_at_0(backend, device):
    """A sum of exactly 0 has no gradient, as in torch; and infinities stay."""
    z, weight = (torch.ones(shape, dtype=torch.float64, device=device) for shape in ((1, 1), (1, 1, 1, 1)))
    position_map = torch.tensor([-2.0, -1.0, 0.0, float("inf"), -float("inf")], dtype=torch.float64, device=device)
    out, dz, _, d_map = run((z, weight, position_map.view(1, 1, 5)), backend, torch.ones(1, 1, 1, 5).to(z),
                            size=(1, 5), relu=True)  # fmt: skip
    assert out.flatten().tolist() == [0, 0, 1, float("inf"), 0]
    assert d_map.flatten().tolist() == [0, 0, 1, 1, 0]
    assert dz.item() == 2


def test_bitwise_repeatable(backend, device):
    for kind in (Case("repeated", (19,), size=(35, 35)), STRIDED_CONV):
        tensors, options = kind.make(torch.float32, device)
        assert all(map(torch.equal, run(tensors, backend, **options), run(tensors, backend, **options)))


def test_inputs_are_never_written_to(backend, device):
    tensors, options = Case("read only").make(device=device)
    before = [x.clone() for x in tensors]
    leaves = [x.requires_grad_() for x in tensors]
    out = broadcast_conv2d(*leaves, backend=backend, **options)
    incoming = random_like(out)
    out.backward(incoming)
    for x, y in zip((*leaves, incoming), (*before, random_like(out)), strict=True):
        assert torch.equal(x, y)


@kernels_alone
def test_nothing_of_the_results_size_is_kept_for_backward(backend, device):
    tensors, options = Case("kept", (2, 50)).make(device=device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = broadcast_conv2d(*(x.requires_grad_() for x in tensors), backend=backend, **options)
    assert max(x.numel() for x in kept) <= 100 * 5 * 5 * 8 < out.numel() / 2


def test_offsets_beyond_32_bits(backend, device):
    """A gradient in memory that is never touched, so that it costs nothing."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    tensors, options = Case("far", (2,), O=2, size=(3, 4), kernel=(3, 3), padding=(1, 1)).make(torch.bfloat16, device)
    incoming = random_like(broadcast_conv2d(*tensors, **options))
    try:
        memory = torch.empty(2**31 + incoming[0].numel(), dtype=incoming.dtype, device=device)
    except RuntimeError:
        pytest.skip("no 4 GiB of addresses")
    far = memory.as_strided(incoming.shape, (2**31, 1, 8, 2)).copy_(incoming)
    for x, y in zip(run(tensors, backend, far, **options), run(tensors, backend, incoming, **options), strict=True):
        assert torch.equal(x, y)


# --- the operators ------------------------------------------------------------------------------------------


@kernels_alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@each_relu
def test_opcheck(dtype, relu, backend, device):
    backends.implementation("broadcast_conv2d", backend)  # which defines them
    operators = getattr(torch.ops, NAMESPACES[backend])
    wide = torch.promote_types(dtype, torch.float32)
    constant, position_map = (torch.randn(shape, device=device).to(wide) for shape in ((3, 4, 5, 2), (6, 9, 2)))
    options = [1, 2, 1], [0, 3, 2], relu
    torch.library.opcheck(operators.broadcast_forward.default, (constant, position_map, *options, dtype))
    out = operators.broadcast_forward(constant, position_map, *options, dtype)
    torch.library.opcheck(operators.broadcast_backward.default, (random_like(out), constant, position_map, *options))


# --- torch.compile ------------------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@each_kind
def test_compiles_as_one_graph(dynamic, kind, backend, device):
    torch.compiler.reset()

    def function(*tensors, **options):
        return broadcast_conv2d(*tensors, **options, backend=backend)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch, size in (((2, 3), kind.size), ((4, 2), (8, 10))) if dynamic else (((2, 3), kind.size),):
        tensors, options = replace(kind, batch=batch, size=size).make(device=device)
        assert_all_close(results(compiled, tensors, **options), results(function, tensors, **options))


@compiles
def test_a_last_batch_is_not_compiled_anew(backend, device):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(broadcast_conv2d, backend=counter, fullgraph=True)
    for M in (8, 6, 3):
        tensors, options = Case("batches", (M,)).make(device=device)
        torch._dynamo.maybe_mark_dynamic(tensors[0], 0)
        compiled(*tensors, backend=backend, **options)
    assert counter.frame_count == 1


@compiles
def test_compiles_under_autocast(backend, device):
    torch.compiler.reset()
    tensors, options = Case("autocast").make(torch.float32, device)

    def function(*tensors):
        with torch.autocast(device, dtype=torch.bfloat16):
            return broadcast_conv2d(*tensors, backend=backend, **options)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got, expected = results(compiled, tensors), results(function, tensors)
    assert got[0].dtype == torch.bfloat16
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
@kernels_alone
def test_compiles_to_code(backend, device):
    """Once all the way through Inductor."""
    torch.compiler.reset()
    tensors, options = STRIDED_CONV.make(torch.float32, device)

    def function(*tensors):
        return broadcast_conv2d(*tensors, backend=backend, **options)

    compiled = torch.compile(function, fullgraph=True)
    assert_all_close(results(compiled, tensors), results(function, tensors), relative=1e-5)


# --- any shape ----------------------------------------------------------------------------------------------


def pairs(least: int, most: int):
    return st.tuples(st.integers(least, most), st.integers(least, most))


@settings(max_examples=examples(60), deadline=None, derandomize=True)
@given(
    batch=st.lists(st.integers(0, 4), max_size=2).map(tuple),
    D=st.integers(1, 5),
    O=st.one_of(st.integers(1, 40), st.sampled_from([16, 32, 64])),
    size=pairs(1, 14),
    kernel=pairs(1, 6),
    stride=pairs(1, 3),
    padding=pairs(0, 4),
    over=pairs(0, 2),
    transposed=st.booleans(),
    relu=st.booleans(),
)
def check_any_shape(backend, device, batch, D, O, size, kernel, stride, padding, over, transposed, relu):
    over = tuple(min(more, s - 1) for more, s in zip(over, stride, strict=True))
    case = Case("any", batch, D, O, size, kernel, stride, padding, over, transposed, relu)
    least = zip(size, kernel, padding, strict=True)
    assume(min(case.result) > 0 and (transposed or all(n + 2 * p >= k for n, k, p in least)))
    tensors, options = case.make(device=device)
    assert_all_close(run(tensors, backend, **options), literally(tensors, **options))


def test_any_shape(backend, device):
    check_any_shape(backend, device)


# --- what is refused ----------------------------------------------------------------------------------------


def good(transposed: bool = False, **changes) -> dict[str, object]:
    """Good arguments, but for the changes: a 5 x 6 grid, 3 taps."""
    shape = (4, 2, 3, 3) if transposed else (2, 4, 3, 3)
    tensors = {"z": torch.rand(7, 4), "weight": torch.rand(shape), "position_map": torch.rand(2, 5, 6)}
    return {**tensors, "size": (5, 6), "padding": 1, "transposed": transposed, **changes}


# A row: the arguments, the type of the error, and what its message must hold in this order.
TABLE = [
    (good(z=None), TypeError, ["z", "torch.Tensor (..., D)", "NoneType"]),
    (good(z=torch.ones(7, 4, dtype=torch.int32)), TypeError, ["z", "float32", "torch.int32"]),
    (good(z=torch.rand(7, 4) + 0j), TypeError, ["z", "float32", "torch.complex64"]),
    (good(z=torch.rand(())), ValueError, ["z", "(..., D)", "()"]),
    (good(weight=[[0.0]]), TypeError, ["weight", "torch.Tensor (O, D, kh, kw)", "list"]),
    (good(weight=torch.rand(2, 4, 3)), ValueError, ["weight", "(O, D, kh, kw)", "(2, 4, 3)"]),
    (good(True, weight=torch.rand(2, 4, 3)), ValueError, ["weight", "(D, O, kh, kw)", "(2, 4, 3)"]),
    (good(weight=torch.rand(2, 5, 3, 3)), ValueError, ["weight", "D = 4", "z (7, 4)", "(2, 5, 3, 3)"]),
    (good(True, weight=torch.rand(5, 2, 3, 3)), ValueError, ["weight", "D = 4", "z (7, 4)", "(5, 2, 3, 3)"]),
    (good(weight=torch.rand(2, 4, 0, 3)), ValueError, ["weight", "empty", "(2, 4, 0, 3)"]),
    (good(position_map=torch.rand(1, 2, 5, 6)), ValueError, ["position_map", "(O, H', W')", "(1, 2, 5, 6)"]),
    (good(position_map=torch.rand(3, 5, 6)), ValueError, ["position_map", "2 channels", "weight", "(3, 5, 6)"]),
    (good(position_map=torch.rand(2, 4, 6)), ValueError, ["position_map", "H' = 5", "size 5", "3 taps", "(2, 4, 6)"]),
    (good(position_map=torch.rand(2, 5, 7)), ValueError, ["position_map", "W' = 6", "size 6", "3 taps", "(2, 5, 7)"]),
    (good(True, stride=2), ValueError, ["position_map", "H' = 9 to 10", "stride 2 and padding 1", "(2, 5, 6)"]),
    (good(position_map=torch.empty(2, 5, 6, device="meta")), ValueError, ["position_map", "device of z, cpu", "meta"]),
    (good(size=(5, 6, 7)), ValueError, ["size", "an int or a pair", "(5, 6, 7)"]),
    (good(size=(5, 6.0)), TypeError, ["size", "int", "float"]),
    (good(size=0), ValueError, ["size", ">= 1", "0"]),
    (good(size=(1, 1), padding=0), ValueError, ["size", "3 taps, stride 1 and padding 0", "(1, 1)"]),
    (good(True, size=(1, 1), padding=2), ValueError, ["size", "3 taps, stride 1 and padding 2", "(1, 1)"]),
    (good(stride=0), ValueError, ["stride", ">= 1", "0"]),
    (good(stride=(1, True)), TypeError, ["stride", "int", "bool"]),
    (good(padding=-1), ValueError, ["padding", ">= 0", "-1"]),
    (good(padding="same"), TypeError, ["padding", "int", "str"]),
    (good(transposed=1), TypeError, ["transposed", "bool", "1"]),
    (good(relu=1), TypeError, ["relu", "bool", "1"]),
    (good(backend="fastest"), ValueError, ["backend", "'auto'", "'reference'", "'fastest'"]),
]


@pytest.mark.parametrize(
    ("arguments", "error", "words"), TABLE, ids=lambda x: ", ".join(x) if isinstance(x, list) else None
)
def test_bad_arguments_are_named(arguments, error, words):
    assert_refused(broadcast_conv2d, arguments, error, words)


def test_good_arguments_are_good():
    """But for the changes, those of the table are."""
    assert broadcast_conv2d(**good()).shape == broadcast_conv2d(**good(True)).shape == (7, 2, 5, 6)


def test_options_are_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        broadcast_conv2d(*list(good().values())[:4], 1)


@pytest.mark.parametrize("backend", ["reference", "written_out"])
def test_no_value_is_looked_at(backend):
    """A meta tensor has none: to look at one, or to wait for the device, raises."""
    arguments = good(relu=True)
    leaves = {name: x.to("meta").requires_grad_() for name, x in arguments.items() if isinstance(x, Tensor)}
    out = broadcast_conv2d(**arguments | leaves, backend=backend)
    assert out.shape == (7, 2, 5, 6)
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in leaves.values())


# --- what it is measured on ---------------------------------------------------------------------------------


def test_bytes_and_flops_of_tetrominoes():
    case = BENCHMARKS["cpu"][0]
    # 256 slots 64 wide to 32 channels of 35 x 35 pixels, 5 x 5 vectors of each slot.
    assert case.bytes_moved(torch.float32) == case.bytes_moved(torch.float32, backward=True) == 256 * 32 * 35 * 35 * 4
    assert case.flops() == 2 * 256 * 64 * 32 * 25 + 2 * 256 * 32 * 35 * 35
    assert case.flops(backward=True) == 4 * 256 * 64 * 32 * 25 + 4 * 256 * 32 * 35 * 35
