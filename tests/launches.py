"""The calls whose kernels tests compile for GPUs that are not here, and the table of what they take of one.

    python tests/launches.py            # all of them for all architectures, a few minutes on two cores
    python tests/launches.py "SAVi"     # those with this in their names

All tensors are on the meta device: see aot.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from aot import ARCHITECTURES, compile_calls
from torch import Tensor

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def new(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


def slot_attention(
    way: str, batch: int, K: int, N: int, D: int, dtype: torch.dtype, heads: int = 1, everything: bool = False,
    values: bool = True,
) -> None:  # fmt: skip
    """With `everything`, with each of its options, heads joint."""
    from iio_kernels.ops.slot_attention import triton as kernels

    own, sums = (partial(new, batch, heads, dtype=x) for x in (dtype, arithmetic(dtype)))
    options = sums(K), own(K).bool(), own(N).bool()
    inputs = own(K, D), own(N, D), own(N, D) if values else None, *(options if everything else (None,) * 3)
    arguments = D**-0.5, 1e-8, True, True, everything
    if way == "forward":
        kernels.slot_attention_forward(*inputs, *arguments, everything)
    else:
        dS, dA = (sums(K), own(K, N)) if everything else (None, None)
        kernels.slot_attention_backward(sums(K, D), dS, dA, *inputs, sums(K, D), sums(K), *arguments)


def composition(
    way: str, B: int, K: int, C: int, H: int, W: int, dtype: torch.dtype, channels_last: bool, everything: bool = False
) -> None:
    """The error; with `everything` all results and all gradients."""
    from iio_kernels.ops.compose import triton as kernels

    own, results = (partial(new, dtype=x) for x in (dtype, arithmetic(dtype)))
    decoded, image = own(B, K, C + 1, H, W), results(B, C, H, W)
    if channels_last:
        decoded = own(B, K, H, W, C + 1).permute(0, 1, 4, 2, 3)
    if way == "forward":
        kernels._composition_forward(decoded, image, everything, everything)
    else:
        incoming = (results(B, C, H, W), results(B, K, H, W)) if everything else (None, None)
        kernels._composition_backward(*incoming, results(B), decoded, image, everything)


def mixture(
    way: str, B: int, K: int, C: int, H: int, W: int, dtype: torch.dtype, channels_last: bool, everything: bool = True
) -> None:
    """With `everything` all results, or all gradients; otherwise the log-likelihood's."""
    from iio_kernels.ops.spatial_mixture import triton as kernels

    own, results = (partial(new, dtype=x) for x in (dtype, arithmetic(dtype)))
    decoded, image = own(B, K, C + 1, H, W), results(B, C, H, W)
    if channels_last:
        decoded = own(B, K, H, W, C + 1).permute(0, 1, 4, 2, 3)
    if way == "forward":
        kernels._mixture_forward(image, decoded, 0.1, everything)
    else:
        incoming = results(B, H, W), *(results(B, K, H, W) if everything else None for _ in range(2))
        kernels._mixture_backward(*incoming, image, decoded, 0.1, everything)


def broadcast(
    way: str, M: int, H: int, W: int, O: int, rows: list[int], columns: list[int], dtype: torch.dtype, relu: bool = True
) -> None:
    from iio_kernels.ops.broadcast_conv2d import triton as kernels

    sums = partial(new, dtype=arithmetic(dtype))
    inputs = sums(M, sum(rows), sum(columns), O), sums(H, W, O)
    if way == "forward":
        kernels._broadcast_forward(*inputs, rows, columns, relu, dtype)
    else:
        kernels._broadcast_backward(new(M, H, W, O, dtype=dtype), *inputs, rows, columns, relu)


def iterations(
    way: str, B: int, N: int, K: int, Dx: int, D: int, H: int, dtype: torch.dtype, attention: bool = False
) -> None:
    from iio_kernels.ops.slot_attention_module import triton as kernels
    from iio_kernels.ops.slot_attention_module.common import made_by_maps, on_tape, read_by_maps

    own, results = (partial(new, dtype=x) for x in (dtype, arithmetic(dtype)))
    x, slots, made = own(B, N, Dx), results(B, K, D), made_by_maps(D, Dx, H)
    weights = [results(*shape) for shape in zip(made, read_by_maps(D, Dx, H), strict=True)]
    if way == "forward":
        kernels._iterations_forward(x, slots, weights, [results(width) for width in made], 3, 1e-8, 1e-5, attention)
    else:
        tape, dA = results(B, 3, K, sum(on_tape(D, Dx, H))), results(B, K, N) if attention else None
        kernels._iterations_backward(slots, dA, x, tape, weights, 1e-8)


def inpainting(
    operator: str, B: int, K: int, C: int, H: int, W: int, dtype: torch.dtype, *needs: bool, kernel_size: int = 11,
    repeats: int = 2, subsets: int = 256,
) -> None:  # fmt: skip
    from iio_kernels.ops.iio_loss import triton as kernels

    own, results = (partial(new, dtype=x) for x in (dtype, arithmetic(dtype)))
    incoming = {
        "conditional_entropies_backward": (B, K, 2 ** (K - 1) - 1),
        "inpaint_backward": (B, K, C, H, W),
    }
    grad = (results(*incoming[operator]),) if operator in incoming else ()
    pairs = new(B, subsets // 2, dtype=torch.int64)
    listed = (pairs, results(subsets // 2)) if operator == "sampled_iio_loss" else ()
    inputs = *grad, own(B, C, H, W), own(B, K, H, W), *listed
    getattr(kernels, f"_{operator}")(*inputs, 5.0, kernel_size, repeats, 1e-8, *needs)


#: Every row of the table of settings at least once, and the sizes in use.
ATTENTION = {
    "Tetrominoes": (64, 4, 1225, 64, F32),
    "CLEVR6": (64, 7, 16384, 64, F32),
    "set prediction": (512, 10, 1024, 64, F32),
    "DINOSAUR float32": (64, 7, 784, 256, F32),
    "SAVi": (64, 24, 4096, 192, F32),
    "K64 D1024": (64, 64, 1024, 1024, F32),
    "Tetrominoes bfloat16": (64, 4, 1225, 64, BF16),
    "DINOSAUR": (64, 7, 784, 256, BF16),
    "SAVi bfloat16": (64, 24, 4096, 192, BF16),
    "K10 D1024 bfloat16": (64, 10, 1024, 1024, BF16),
    "K64 D128 bfloat16": (64, 64, 1024, 128, BF16),
    "DINOSAUR float16": (64, 7, 784, 256, F16),
    "SAVi float16": (64, 24, 4096, 192, F16),
    "K64 D128 float16": (64, 64, 1024, 128, F16),
    "float64": (4, 7, 300, 64, F64),
}
WAYS = ("forward", "backward")
CALLS: dict[str, Callable[[], None]] = {
    f"attention, {name}, {way}": partial(slot_attention, way, *sizes, **options)
    for name, sizes, options in (
        *((name, sizes, {}) for name, sizes in ATTENTION.items()),
        ("all options", (16, 7, 1024, 64, F32), {"heads": 4, "everything": True}),
        ("all options bfloat16", (16, 24, 1024, 192, BF16), {"heads": 4, "everything": True}),
        ("from inputs", (64, 4, 1225, 32, F32), {"values": False}),
    )
    for way in WAYS
}
CALLS |= {
    f"composition, {name}, {way}": partial(composition, way, *arguments)
    for name, arguments in (
        ("Tetrominoes", (64, 4, 3, 35, 35, F32, True)),
        ("Tetrominoes bfloat16", (64, 4, 3, 35, 35, BF16, True)),
        ("CLEVR6 plain", (64, 7, 3, 128, 128, F32, False)),
        ("all results", (64, 7, 3, 128, 128, F32, True, True)),
        ("K24", (8, 24, 3, 64, 64, BF16, True)),
        ("float64", (8, 4, 3, 35, 35, F64, False)),
    )
    for way in WAYS
}
CALLS |= {
    f"mixture, {name}, {way}": partial(mixture, way, *arguments)
    for name, arguments in (
        ("Tetrominoes", (32, 4, 3, 35, 35, F32, True)),
        ("log-likelihood", (32, 4, 3, 35, 35, F32, True, False)),
        ("CLEVR plain", (32, 7, 3, 128, 128, F32, False)),
        ("CLEVR bfloat16", (32, 7, 3, 128, 128, BF16, True)),
        ("K24", (8, 24, 3, 64, 64, BF16, True)),
        ("float64", (8, 4, 3, 35, 35, F64, False)),
    )
    for way in WAYS
}
SAME, TRANSPOSED = [2, 1, 2], [1, 2, 2]  # classes of 5 taps: stride 1, and a transposed convolution of stride 2
CALLS |= {
    f"broadcast, {name}, {way}": partial(broadcast, way, *arguments)
    for name, arguments in (
        ("Tetrominoes", (256, 35, 35, 32, SAME, SAME, F32)),
        ("Tetrominoes bfloat16", (256, 35, 35, 32, SAME, SAME, BF16)),
        ("Tetrominoes float16", (256, 35, 35, 32, SAME, SAME, F16)),
        ("no ReLU", (256, 35, 35, 32, SAME, SAME, F32, False)),
        ("CLEVR6", (448, 16, 16, 64, TRANSPOSED, TRANSPOSED, F32)),
        ("CLEVR6 bfloat16", (448, 16, 16, 64, TRANSPOSED, TRANSPOSED, BF16)),
        ("IODINE", (448, 128, 128, 64, SAME, SAME, F32)),
        ("float64", (256, 35, 35, 32, SAME, SAME, F64)),
    )
    for way in WAYS
}
CALLS |= {
    f"iterations, {name}, {way}": partial(iterations, way, *arguments)
    for name, arguments in (
        ("Tetrominoes", (64, 1225, 4, 32, 64, 128, F32)),
        ("Tetrominoes bfloat16", (64, 1225, 4, 32, 64, 128, BF16)),
        ("CLEVR6", (64, 16384, 7, 64, 64, 128, F32)),
        ("CLEVR6 bfloat16", (64, 16384, 7, 64, 64, 128, BF16)),
        ("K16 D256", (64, 1024, 16, 64, 256, 256, F32, True)),
        ("Tetrominoes with attention", (64, 1225, 4, 32, 64, 128, F32, True)),
        ("float64", (4, 300, 7, 32, 64, 128, F64)),
    )
    for way in WAYS
}
CALLS |= {
    f"inpainting, {name}": partial(inpainting, *arguments, **dict(*options))
    for name, arguments, *options in (
        ("Tetrominoes", ("iio_loss", 64, 4, 3, 35, 35, F32, False, True)),
        ("Tetrominoes bfloat16", ("iio_loss", 64, 4, 3, 35, 35, BF16, True, True)),
        ("CLEVR6", ("iio_loss", 64, 7, 3, 128, 128, F32, False, True)),
        ("CLEVR6 both gradients", ("iio_loss", 64, 7, 3, 128, 128, F32, True, True)),
        ("CLEVR6 loss alone", ("iio_loss", 64, 7, 3, 128, 128, F32, False, False)),
        ("K11", ("iio_loss", 8, 11, 3, 64, 64, F32, False, True)),
        ("K16", ("iio_loss", 1, 16, 3, 35, 35, F32, False, True)),
        ("grey 512x512", ("iio_loss", 8, 2, 1, 512, 512, F32, False, True)),
        ("33 taps", ("iio_loss", 8, 2, 3, 64, 64, F32, False, True), {"kernel_size": 33, "repeats": 1}),
        ("25 taps thrice", ("iio_loss", 8, 2, 3, 64, 64, F32, False, True), {"kernel_size": 25, "repeats": 3}),
        ("3 taps often", ("iio_loss", 8, 2, 3, 64, 64, F32, False, True), {"kernel_size": 3, "repeats": 22}),
        ("256 subsets of 24", ("sampled_iio_loss", 16, 24, 3, 64, 64, F32, False, True)),
        ("256 subsets, both gradients", ("sampled_iio_loss", 16, 24, 3, 64, 64, BF16, True, True)),
        ("256 subsets, loss alone", ("sampled_iio_loss", 16, 24, 3, 64, 64, F32, False, False)),
        ("256 subsets, grey", ("sampled_iio_loss", 16, 24, 1, 64, 64, F32, False, True)),
        ("256 subsets, float64", ("sampled_iio_loss", 16, 24, 3, 64, 64, F64, True, True)),
        ("entropies", ("conditional_entropies", 64, 7, 3, 128, 128, F32)),
        ("entropies backward", ("conditional_entropies_backward", 64, 7, 3, 128, 128, F32, True)),
        ("predictions", ("inpaint", 64, 7, 3, 128, 128, F32)),
        ("predictions backward", ("inpaint_backward", 64, 7, 3, 128, 128, F32)),
        ("float64", ("iio_loss", 8, 4, 3, 35, 35, F64, True, True)),
    )
}

if __name__ == "__main__":
    asked = [name for name in CALLS if all(word in name for word in sys.argv[1:])]
    if not asked:
        sys.exit(f"there is no call of that name, only: {'; '.join(CALLS)}")
    for launch in compile_calls("launches", asked, list(ARCHITECTURES)):
        print(launch)
