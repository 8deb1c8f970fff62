"""The compiled CPU kernels read and write the memory that they are given, and no other."""

from __future__ import annotations

import ctypes
import platform

import pytest
import torch
from cpu_operators import (
    ATTENTION,
    BF16,
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
    call,
    each_operator,
    threads,
    without_nan,
)
from torch import Tensor

#: Blocks, vectors and tiles that are not full, one by one and together.
ODD = [
    *(
        (operator, {"N": N, "Dk": Dk, "Dv": Dv, "K": K, "dtype": dtype})
        for operator in ATTENTION
        for N, Dk, Dv, K in ((1, 1, 3, 1), (31, 15, 17, 2), (1057, 33, 1, 5), (45, 16, None, 9), (1025, 64, 64, 3))
        for dtype in (F32, F64, BF16)
    ),
    *(
        (operator, {"H": H, "W": W, "C": C, "K": K, "dtype": dtype})
        for operator in INPAINTING
        for H, W, C, K in ((5, 5, 1, 2), (7, 33, 3, 4), (17, 16, 4, 3), (13, 5, 5, 5))
        for dtype in (F32, F64)
    ),
    *(
        (operator, {"H": H, "W": W, "C": C, "K": K, "dtype": dtype, "channels_last": channels_last})
        for operator in COMPOSITION
        for H, W, C, K in ((1, 1, 3, 2), (7, 9, 3, 4), (16, 17, 3, 1), (5, 13, 2, 24), (1, 1025, 3, 3))
        for dtype in (F32, F64, BF16)
        for channels_last in (False, True)
    ),
    *(
        (operator, {"H": H, "W": W, "C": C, "K": K, "dtype": dtype, "channels_last": channels_last})
        for operator in MIXTURE
        for H, W, C, K in ((1, 1, 3, 2), (7, 9, 3, 4), (5, 13, 2, 24))
        for dtype, channels_last in ((F32, False), (F32, True), (F64, True), (BF16, False))
    ),
    *(
        (operator, {"B": B, "O": O, "H": H, "W": W, "rows": rows, "columns": columns, "dtype": dtype})
        for operator in BROADCAST
        for B, O, H, W, rows, columns in (
            (1, 1, 1, 1, (0, 1, 0), (1, 1, 0)),
            (9, 15, 4, 5, (2, 1, 2), (0, 3, 1)),
            (2, 17, 1, 7, (0, 2, 1), (3, 2, 4)),
            (40, 64, 3, 3, (1, 1, 1), (1, 1, 1)),
        )
        for dtype in (F32, F64, BF16)
    ),
    *(
        (operator, {"N": N, "K": K, "Dx": Dx, "D": D, "H": H, "dtype": dtype})
        for operator in ITERATIONS
        for N, K, Dx, D, H in ((1, 1, 1, 1, 1), (31, 2, 17, 15, 33), (33, 16, 16, 16, 16), (65, 5, 1, 40, 3))
        for dtype in (F32, F64, BF16)
    ),
]
each_odd = pytest.mark.parametrize(("operator", "how"), ODD, ids=str)


@each_operator
def test_memory_of_results_begins_as_nan(operator):
    """conftest.py asks torch for it: what the operators allocate in C++ is filled too."""
    arguments = GOOD[operator]()
    with torch.autograd.profiler.profile() as profile:
        call(operator, arguments)
    names = [event.name for event in profile.function_events]
    assert names.count("aten::fill_") == names.count("aten::empty") >= 1


@each_odd
def test_results_are_written_to_the_last_number(operator, how):
    without_nan(call(operator, GOOD[operator](**how)))


@pytest.fixture
def fill_memory():
    """A function that makes malloc fill all memory that it gives out with a byte: the kernels' own workspace too."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc's malloc fills memory")
    libc = ctypes.CDLL(None)
    torch.utils.deterministic.fill_uninitialized_memory = False

    def fill(byte: int) -> None:
        # M_PERTURB: the number's lowest byte is inverted, and 0 means not to fill.
        assert libc.mallopt(-6, 0x100 | byte ^ 0xFF) == 1
        assert (torch.empty(5000, dtype=torch.uint8) == byte).all()

    yield fill
    libc.mallopt(-6, 0)


@pytest.mark.parametrize(("operator", "how"), ODD + LARGE, ids=str)
def test_results_do_not_depend_on_what_fresh_memory_holds(operator, how, fill_memory):
    arguments = GOOD[operator](**how)
    expected = without_nan(call(operator, arguments))
    for byte in (0xFF, 0x7F):  # NaN, and the largest numbers
        fill_memory(byte)
        with threads(2):
            assert_same(call(operator, arguments), expected)


def surrounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x amid NaN (True for a mask), and all of that memory."""
    memory = torch.full((x.numel() + 130,), float("nan")).to(x.dtype)
    return memory[65:-65].view(x.shape).copy_(x), memory


@pytest.mark.parametrize(("operator", "how"), ODD + LARGE, ids=str)
def test_what_is_given_is_not_written_to_and_what_lies_beside_it_does_not_matter(operator, how):
    arguments = GOOD[operator](**how)
    pairs = {name: surrounded(x) for name, x in arguments.items() if isinstance(x, Tensor)}
    before = {name: memory.clone() for name, (_, memory) in pairs.items()}
    expected = without_nan(call(operator, arguments))
    assert_same(call(operator, arguments | {name: x for name, (x, _) in pairs.items()}), expected)
    for name, (_, memory) in pairs.items():
        assert torch.equal(memory.view(torch.uint8), before[name].view(torch.uint8)), name
