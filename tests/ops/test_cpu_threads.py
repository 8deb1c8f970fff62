"""Neither threads nor batches nor caches change what the compiled CPU kernels compute."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cpu_operators import (
    ATTENTION,
    BROADCAST,
    COMPOSITION,
    F32,
    F64,
    GOOD,
    INPAINTING,
    ITERATIONS,
    LARGE,
    MIXTURE,
    _one_thread,  # noqa: F401
    assert_same,
    attention_backward,
    broadcast,
    broadcast_backward,
    call,
    composition_backward,
    each_large,
    each_operator,
    iterations_backward,
    threads,
    without_nan,
)
from torch import Tensor


@pytest.mark.long
@pytest.mark.parametrize(
    "operators",
    [
        tuple(ATTENTION),
        *((x,) for x in INPAINTING),
        tuple(COMPOSITION),
        tuple(MIXTURE),
        tuple(BROADCAST),
        tuple(ITERATIONS),
    ],
    ids=" ".join,
)
def test_a_thousand_runs_on_two_threads_give_the_same_bits(operators):
    how = {"B": 3, "N": 1100, "K": 4, "Dk": 16, "Dv": 16} if operators[0] in ATTENTION else {"B": 3}
    how = {"B": 70, "O": 64} if operators[0] in BROADCAST else how
    calls = [(operator, GOOD[operator](**how)) for operator in operators]
    with threads(2):
        expected = [without_nan(call(*each)) for each in calls]
        for _ in range(1000):
            for each, results in zip(calls, expected, strict=True):
                assert all(map(torch.equal, call(*each), results))


@each_large
def test_the_number_of_threads_changes_no_bit(operator, how):
    arguments = GOOD[operator](**how)
    with threads(1):
        expected = without_nan(call(operator, arguments))
    for number in (2, 5):
        with threads(number):
            assert_same(call(operator, arguments), expected)


@pytest.mark.parametrize(("operator", "how"), [x for x in LARGE if x[0] not in BROADCAST], ids=str)
@pytest.mark.parametrize("number", [1, 2])
def test_an_image_does_not_depend_on_the_others(operator, how, number):
    arguments = GOOD[operator](**how)
    with threads(number):
        whole = without_nan(call(operator, arguments))
        for b in range(how["B"]):
            own = [name for name, x in arguments.items() if isinstance(x, Tensor) and name != "weights"]
            one = arguments | {name: arguments[name][b : b + 1] for name in own}
            assert_same(call(operator, one), [x[b : b + 1] if x.numel() else x for x in whole])


@pytest.mark.parametrize("how", [how for operator, how in LARGE if operator == "broadcast_backward"], ids=str)
def test_a_broadcast_slot_does_not_depend_on_the_others(how):
    arguments = broadcast_backward(**how)
    images = call("broadcast_forward", broadcast(**how))[0], call("broadcast_backward", arguments)[0]
    for b in (0, 7, 8, how["B"] - 1):
        one = arguments | {name: arguments[name][b : b + 1] for name in ("d_out", "constant")}
        forward = {name: x for name, x in one.items() if name != "d_out"} | {"dtype": images[0].dtype}
        got = call("broadcast_forward", forward)[0], call("broadcast_backward", one)[0]
        assert_same(got, without_nan([x[b : b + 1] for x in images]))


@each_operator
def test_calls_from_four_threads_of_python_at_once(operator):
    arguments = GOOD[operator]()
    expected = without_nan(call(operator, arguments))
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: call(operator, arguments), range(100)):
            assert_same(results, expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("dtype", "B"), [(F32, 96), (F64, 48)], ids=["float32", "float64"])
def test_gradients_of_compositions_too_large_for_the_caches(dtype, B, channels_last):
    """As above; images beside a chunk that is not full, whose last block is written otherwise."""
    one = composition_backward(dtype=dtype, B=1, K=8, H=37, W=40, channels_last=channels_last)
    many = {name: x.expand(B, *x.shape[1:]) if isinstance(x, Tensor) else x for name, x in one.items()}
    expected = without_nan(call("composition_backward", one))
    for x, y in zip(call("composition_backward", many), expected, strict=True):
        assert torch.equal(x, y.expand_as(x))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("operator", MIXTURE)
def test_mixtures_too_large_for_the_caches(operator, channels_last):
    one = GOOD[operator](B=1, K=8, H=37, W=40, channels_last=channels_last)
    many = {name: x.expand(96, *x.shape[1:]) if isinstance(x, Tensor) else x for name, x in one.items()}
    for x, y in zip(call(operator, many), without_nan(call(operator, one)), strict=True):
        assert torch.equal(x, y.expand_as(x))


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("relu", [True, False])
def test_broadcasts_too_large_for_the_caches(dtype, relu):
    """Those too are written past them."""
    one = broadcast(dtype=dtype, B=1, O=32, H=35, W=33, relu=relu)
    many = one | {"constant": one["constant"].expand(120, -1, -1, -1)}
    (expected,), (got,) = (without_nan(call("broadcast_forward", arguments)) for arguments in (one, many))
    assert torch.equal(got, expected.expand_as(got))


@pytest.mark.parametrize(("dtype", "B"), [(F32, 66), (F64, 33)], ids=["float32", "float64"])
def test_gradients_of_iterations_too_large_for_the_caches(dtype, B):
    """As below."""
    one = iterations_backward(dtype=dtype, B=1, N=1030, Dx=64)
    many = {name: x.expand(B, *x.shape[1:]) if isinstance(x, Tensor) else x for name, x in one.items()}
    expected = without_nan(call("iterations_backward", one))
    for x, y in zip(call("iterations_backward", many), expected, strict=True):
        assert torch.equal(x, y.expand_as(x))


@pytest.mark.parametrize(("dtype", "B"), [(F32, 33), (F64, 17)], ids=["float32", "float64"])
def test_gradients_too_large_for_the_caches(dtype, B):
    """Rows are then written past the caches, and hold the same bits."""
    one = attention_backward(dtype=dtype, B=1, H=1, K=4, N=1030, Dk=64, Dv=64)
    many = {name: x.expand(B, *x.shape[1:]) if isinstance(x, Tensor) else x for name, x in one.items()}
    expected = without_nan(call("slot_attention_backward", one))
    for x, y in zip(call("slot_attention_backward", many), expected, strict=True):
        assert torch.equal(x, y.expand_as(x))
