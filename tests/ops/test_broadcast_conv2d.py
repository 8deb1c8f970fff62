"""The broadcast convolution against literally convolving the grid, and the properties it promises."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from comparing import comparison
from depth import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from marks import each_dtype

from iio_kernels import broadcast_conv2d
from iio_kernels.ops.broadcast_conv2d.common import classes, inside
from iio_kernels.testing.broadcast_conv2d import (
    BENCHMARKS,
    CASES,
    NAMES,
    STRIDED_CONV,
    Case,
    allowed_error,
    literally,
    random_like,
    results,
    run,
)

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
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


@pytest.mark.long("triton")
def test_any_shape(backend, device):
    check_any_shape(backend, device)


# --- what it is measured on ---------------------------------------------------------------------------------


def test_bytes_and_flops_of_tetrominoes():
    case = BENCHMARKS["cpu"][0]
    # 256 slots 64 wide to 32 channels of 35 x 35 pixels, 5 x 5 vectors of each slot.
    assert case.bytes_moved(torch.float32) == case.bytes_moved(torch.float32, backward=True) == 256 * 32 * 35 * 35 * 4
    assert case.flops() == 2 * 256 * 64 * 32 * 25 + 2 * 256 * 32 * 35 * 35
    assert case.flops(backward=True) == 4 * 256 * 64 * 32 * 25 + 4 * 256 * 32 * 35 * 35
