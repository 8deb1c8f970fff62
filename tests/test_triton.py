"""What the Triton kernels promise beyond the results that every backend's tests compare."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from aot import ARCHITECTURES, Compiled, compile_calls
from torch import Tensor

from iio_kernels import slot_attention
from iio_kernels._backends import BACKENDS
from iio_kernels.ops.slot_attention.spec import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
here = pytest.mark.skipif(
    BACKENDS["triton"].refuses(torch.device(DEVICE)) is not None, reason="Triton can run no kernels here"
)


# --- offsets ------------------------------------------------------------------------------------------------------


def results(tensors: tuple[Tensor, ...], **options) -> tuple[Tensor, ...]:
    """U, A and the gradients to q, k and v."""
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    U, A = slot_attention(*leaves, return_attention=True, backend="triton", **options)
    random = torch.Generator().manual_seed(1)
    incoming = [torch.randn(x.shape, generator=random).to(x) for x in (U, A)]
    return U, A, *torch.autograd.grad((U, A), leaves, incoming)


@here
@pytest.mark.parametrize("joint_heads", [False, True], ids=["heads apart", "joint heads"])
def test_offsets_of_64_bits_change_nothing(joint_heads, monkeypatch):
    from iio_kernels.ops.slot_attention import triton as kernels

    case = Case("offsets", batch=(2, 2), N=45, slots="some", inputs="some", options={"joint_heads": joint_heads})
    tensors, options = case.make(torch.float32, DEVICE)
    expected = results(tensors, **options)
    monkeypatch.setattr(kernels, "index_type", lambda *tensors: kernels.tl.int64)
    assert all(map(torch.equal, results(tensors, **options), expected))


@here
def test_offsets_have_64_bits_where_32_are_too_few():
    from iio_kernels.ops.slot_attention.triton import index_type, tl

    def on_meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    small, last = on_meta(4, 64), on_meta(2**31)
    assert index_type(small) == index_type(small, last) == tl.int32
    assert index_type(small, on_meta(2**31 + 1)) == tl.int64
    assert index_type(on_meta(1, 2**20, 2**12)) == tl.int64
    # What counts is how far elements lie apart, not how many there are.
    assert index_type(small.expand(2**40, 4, 64)) == tl.int32
    assert index_type(on_meta(2**16, 2**16)[:, :1]) == tl.int64
    assert index_type(on_meta(2**16, 2**16)[:, :0], small) == tl.int64
    assert index_type(on_meta(0, 2**40), small) == tl.int32


# --- compiled for GPUs that are not here --------------------------------------------------------------------------


def attend(
    backward: bool, batch: int, K: int, N: int, D: int, dtype: torch.dtype, heads: int = 1, everything: bool = False,
    values: bool = True,
) -> None:  # fmt: skip
    """Launch the kernels of a call; with `everything`, with each of its options, heads joint."""
    from iio_kernels.ops.slot_attention import triton as kernels

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty((batch, heads, *shape), dtype=dtype, device="meta")

    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    sums = partial(new, dtype=arithmetic)
    options = sums(K), new(K, dtype=torch.bool), new(N, dtype=torch.bool)
    inputs = new(K, D), new(N, D), new(N, D) if values else None, *(options if everything else (None,) * 3)
    arguments = D**-0.5, 1e-8, True, True, everything
    if backward:
        dS, dA = (sums(K), new(K, N)) if everything else (None, None)
        kernels.slot_attention_backward(sums(K, D), dS, dA, *inputs, sums(K, D), sums(K), *arguments)
    else:
        kernels.slot_attention_forward(*inputs, *arguments, everything)


#: Every row of the table of settings at least once, and the sizes in use.
SIZES = {
    "Tetrominoes": (64, 4, 1225, 64, torch.float32),
    "CLEVR6": (64, 7, 16384, 64, torch.float32),
    "set prediction": (512, 10, 1024, 64, torch.float32),
    "DINOSAUR float32": (64, 7, 784, 256, torch.float32),
    "SAVi": (64, 24, 4096, 192, torch.float32),
    "K64 D1024": (64, 64, 1024, 1024, torch.float32),
    "Tetrominoes bfloat16": (64, 4, 1225, 64, torch.bfloat16),
    "DINOSAUR": (64, 7, 784, 256, torch.bfloat16),
    "SAVi bfloat16": (64, 24, 4096, 192, torch.bfloat16),
    "K10 D1024 bfloat16": (64, 10, 1024, 1024, torch.bfloat16),
    "K64 D128 bfloat16": (64, 64, 1024, 128, torch.bfloat16),
    "DINOSAUR float16": (64, 7, 784, 256, torch.float16),
    "SAVi float16": (64, 24, 4096, 192, torch.float16),
    "K64 D128 float16": (64, 64, 1024, 128, torch.float16),
    "float64": (4, 7, 300, 64, torch.float64),
}
CALLS: dict[str, Callable[[], None]] = {
    f"{name}, {way}": partial(attend, way == "backward", *sizes)
    for name, sizes in SIZES.items()
    for way in ("forward", "backward")
} | {
    f"{name}, {way}": partial(attend, way == "backward", *arguments, **options)
    for name, arguments, options in (
        ("all options", (16, 7, 1024, 64, torch.float32), {"heads": 4, "everything": True}),
        ("all options bfloat16", (16, 24, 1024, 192, torch.bfloat16), {"heads": 4, "everything": True}),
        ("from inputs", (64, 4, 1225, 32, torch.float32), {"values": False}),
    )
    for way in ("forward", "backward")
}
EVERYWHERE = ("Tetrominoes", "DINOSAUR", "SAVi", "SAVi bfloat16", "all options")


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    """All calls for the GPUs we expect most, and a few for each other architecture."""
    pytest.importorskip("triton")
    everywhere = [f"{name}, {way}" for name in EVERYWHERE for way in ("forward", "backward")]
    others = [name for name in ARCHITECTURES if name != "sm_90"]
    return compile_calls("test_triton", list(CALLS), ["sm_90"]) + compile_calls("test_triton", everywhere, others)


def test_kernels_fit_the_gpus_they_are_compiled_for(compiled):
    for x in compiled:
        print(x)
    for x in compiled:
        assert x.shared <= ARCHITECTURES[x.architecture].shared_by_one, x
        assert x.blocks >= 1, x


def test_nothing_spills_from_registers(compiled):
    assert not [str(x) for x in compiled if x.spilled and not x.call.startswith("float64")]


def test_tensor_cores_multiply_where_they_should(compiled):
    for x in compiled:
        matrices = x.kernel in ("_forward_kernel", "_backward_kernel")
        if matrices and ("float16" in x.call or x.call.startswith("DINOSAUR,")):  # bfloat16 too
            assert x.tensor_cores, x
        # Full precision is the general units' on NVIDIA's GPUs. AMD's matrix units have it.
        if x.architecture.startswith("sm") and x.call.startswith(("Tetrominoes,", "CLEVR6", "SAVi,")):
            assert not x.tensor_cores, x
