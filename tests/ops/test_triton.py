"""What the Triton kernels promise beyond the results that every backend's tests compare."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from depth import DEEP
from torch import Tensor

from iio_kernels import slot_attention, slot_attention_from_inputs, spatial_mixture
from iio_kernels.runtime import triton_support
from iio_kernels.runtime.backends import BACKENDS, with_file
from iio_kernels.testing import broadcast_conv2d as broadcast_samples
from iio_kernels.testing import compose as composition_spec
from iio_kernels.testing import iio_loss as iio_spec
from iio_kernels.testing import slot_attention as attention_samples
from iio_kernels.testing import slot_attention_module as iterations_samples
from iio_kernels.testing import spatial_mixture as mixture_spec
from iio_kernels.testing.aot import ARCHITECTURES, Compiled, all_calls, compile_calls
from iio_kernels.testing.slot_attention import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
here = pytest.mark.skipif(
    BACKENDS["triton"].refuses(torch.device(DEVICE)) is not None, reason="Triton can run no kernels here"
)


# --- offsets ------------------------------------------------------------------------------------------------------


def test_offsets_have_64_bits_where_32_are_too_few():
    tl = pytest.importorskip("triton.language")
    index_type = triton_support.index_type

    def on_meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    small, last = on_meta(4, 64), on_meta(2**31)
    assert index_type(small) == index_type(small, last) == tl.int32
    assert index_type(small, on_meta(2**31 + 1)) == tl.int64
    assert index_type(on_meta(1, 2**20, 2**12)) == tl.int64
    # What counts is how far elements lie apart, not how many there are.
    assert index_type(small.expand(2**40, 4, 64)) == tl.int32
    assert index_type(on_meta(2**16, 2**16)[:, :1]) == tl.int64
    assert index_type(on_meta(0, 2**40), small) == tl.int32


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


# --- what is stored -----------------------------------------------------------------------------------------------

interpreted = pytest.mark.skipif(not triton_support.INTERPRETED, reason="a GPU multiplies 16 bits otherwise than 32")


@here
@interpreted
def test_the_interpreter_rounds_as_hardware_does():
    triton, tl = pytest.importorskip("triton"), pytest.importorskip("triton.language")

    @triton.jit
    def store(x, y, N: tl.constexpr):
        n = tl.arange(0, N)
        tl.store(y + n, tl.load(x + n))
        tl.store(y + N + n, tl.load(x + n).to(tl.bfloat16))

    largest, unit = torch.finfo(torch.bfloat16).max, 2.0**-7
    x = [1 + unit / 2, 1 + 3 * unit / 2, 1 + 0.49 * unit, 1 + 0.51 * unit, -1 - 0.51 * unit, largest * 1.004, 1e-40]
    x = torch.tensor([*x, 2 - 1e-7, float("inf"), float("nan"), 0.0, -0.0, *torch.randn(52)])
    y = torch.empty(128, dtype=torch.bfloat16)
    store[(1,)](x, y, N=64)
    for half in y.view(2, 64):
        torch.testing.assert_close(half, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def random_like(*shapes: tuple[int, ...]) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=random) for shape in shapes]


def of_slot_attention(cast, **options):
    case = Case("rounded", N=13, **options)
    tensors, more = case.make(torch.float32)
    incoming = random_like((*case.batch, case.K, case.Dv), (*case.batch, case.K, case.N))
    return attention_samples.run([cast(x) for x in tensors], "triton", [cast(x) for x in incoming], **more)


def of_from_inputs(cast):
    tensors, _ = attention_samples.from_inputs(Case("rounded", N=13), "cpu")
    leaves = [cast(x).requires_grad_() for x in tensors]
    U, A = slot_attention_from_inputs(*leaves, return_attention=True, backend="triton")
    incoming = [cast(x) for x in random_like(U.shape, A.shape)]
    return U.detach(), A.detach(), *torch.autograd.grad((U, A), leaves, incoming)


def of_broadcast(cast, transposed):
    case = broadcast_samples.Case("rounded", size=(5, 4), transposed=transposed)
    tensors, options = case.make(torch.float32)
    (incoming,) = random_like((2, 3, *case.result))
    return broadcast_samples.run([cast(x) for x in tensors], "triton", cast(incoming), **options)


def of_images(module, run, cast):
    """Of an operation that takes images and their masks, or what was decoded, and whose results are float32."""
    return run(*(cast(x) for x in module.Case("rounded", B=1, K=3).make(torch.float32)[0]))


def of_iterations(cast):
    (x, slots, weights, T), _ = iterations_samples.Case("rounded", B=1, N=11, T=2).make(torch.float32)
    weights = type(weights)(*map(cast, weights))
    incoming = cast(random_like(slots.shape)[0]), random_like((1, 4, 11))[0]
    return iterations_samples.run((cast(x), cast(slots), weights, T), "triton", incoming)


#: What of each operation goes to and comes from a kernel, by a cast of all that it takes.
STORED = {
    "slot_attention": of_slot_attention,
    "slot_attention, joint heads": partial(of_slot_attention, batch=(2, 2), options={"joint_heads": True}),
    "slot_attention_from_inputs": of_from_inputs,
    "broadcast_conv2d": partial(of_broadcast, transposed=False),
    "broadcast_conv2d, transposed": partial(of_broadcast, transposed=True),
    "composition_error": partial(of_images, composition_spec, lambda *x: composition_spec.run(*x, "triton")),
    "compose": partial(of_images, composition_spec, lambda *x: composition_spec.composed(*x, "triton")),
    "spatial_mixture": partial(
        of_images, mixture_spec, lambda *x: mixture_spec.results(spatial_mixture, *x, backend="triton")
    ),
    "iio_loss": partial(of_images, iio_spec, lambda *x: iio_spec.run(*x, "triton")),
    "slot_attention_module": of_iterations,
}


def test_results_of_every_operation_are_looked_at():
    public = {"slot_attention_from_inputs": "slot_attention", "composition_error": "compose"}
    named = {name.partition(",")[0] for name in STORED}
    assert {public.get(name, name) for name in named} == set(with_file("triton"))


@here
@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(STORED))
def test_results_are_rounded_once_from_float32(name, dtype):
    """Those of tensors of 16 bits are the nearest to those of the same numbers in float32, whose error is far less."""
    narrow = STORED[name](lambda x: x.to(dtype))
    wide = STORED[name](lambda x: x.to(dtype).float())
    assert any(x.dtype == dtype for x in narrow)
    for x, y in zip(narrow, wide, strict=True):
        assert y.dtype == torch.float32
        about, y = torch.finfo(x.dtype), y.double()
        unit = (about.eps * 2.0 ** (y.frexp().exponent - 1)).clamp(min=about.eps * about.smallest_normal)
        allowed = 0.501 * unit * (y != 0) + 1e-6 * y.abs().max()
        assert ((x.double() - y).abs() <= allowed).all()


# --- compiled for GPUs that are not here --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    """What every call takes of every architecture; in a quick check of each change, of one for each maker."""
    pytest.importorskip("triton")
    return compile_calls(all_calls(), list(ARCHITECTURES) if DEEP else ["sm_90", "gfx942"])


@pytest.mark.long
def test_kernels_fit_the_gpus_they_are_compiled_for(compiled, capsys):
    with capsys.disabled():
        print("", *compiled, sep="\n")
    for x in compiled:
        assert x.shared <= ARCHITECTURES[x.architecture].shared_by_one, x
        assert x.blocks >= 1, x


@pytest.mark.long
def test_nothing_spills_from_registers(compiled):
    """But float64, and a few numbers with Triton 3.6, whose layouts take more registers."""
    triton = pytest.importorskip("triton")
    allowed = 128 if triton.__version__.startswith("3.6.") else 0
    assert not [str(x) for x in compiled if x.spilled > allowed and "float64" not in x.call]


@pytest.mark.long
def test_tensor_cores_multiply_where_they_should(compiled):
    own = [x for x in compiled if x.call.startswith("slot_attention, ")]
    assert {"forward_kernel", "backward_kernel"} <= {x.kernel for x in own}
    for x in compiled:
        matrices = x in own and x.kernel in ("forward_kernel", "backward_kernel")
        if matrices and ("float16" in x.call or "DINOSAUR," in x.call):  # bfloat16 too
            assert x.tensor_cores, x
        # Full precision is the general units' on NVIDIA's GPUs. AMD's matrix units have it.
        if x.architecture.startswith("sm") and any(name in x.call for name in (" Tetrominoes,", "CLEVR6", "SAVi,")):
            assert not x.tensor_cores, x
