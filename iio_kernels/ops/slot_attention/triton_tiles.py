"""The tiles and chunks of slot attention's Triton kernels: how large they are, and how tiles are multiplied.

What limits it. Bytes are k and v read, and backward dk and dv written; operations those of the dot products. On an
H200 (4.8 TB/s; 67 TFLOP/s in float32, 990 in bfloat16), in microseconds:

                                          forward: bytes  operations   backward: bytes  operations
    Tetrominoes  B64 N1225  K4  D64  float32      8.4        1.2                  17         3.0
    CLEVR6       B64 N16384 K7  D64  float32      112         28                 224          70
    DINOSAUR     B64 N784   K7  D256 bfloat16      11        0.4                  21         0.9
    SAVi         B64 N4096  K24 D192 float32       84         72                 168         180
    SAVi                             bfloat16      42        4.9                  84          12

A product with few slots is too thin for the usual tile of 16 slots. In bfloat16 the tensor cores' time for it is lost
beside that of the bytes (0.8 microseconds of DINOSAUR's 11). In float32 there are no tensor cores: 16 slots for 4
would be four times the operations, and with their operands' loads more than the bytes take. There `tl.dot` multiplies
exactly as many slots as the next power of two: 46 instructions a warp and input forward and 96 backward for K = 4, 67
and 156 for K = 7, of the 99 and 198 that an H200 can issue while the bytes of an input of D = 64 arrive and leave. With
many slots (SAVi) float32 is a matter of operations, and a few times slower than bfloat16; torch's setting for TF32
products, `torch.backends.cuda.matmul.fp32_precision`, is obeyed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from iio_kernels.runtime.triton_support import INTERPRETED


class Tile(NamedTuple):
    """The sizes of a kernel's tiles, as in `Meta`, how many warps work on one, and how many loads run ahead of it."""

    K_PADDED: int
    BLOCK_N: int
    BLOCK_D: int
    WIDTH: int
    num_warps: int
    num_stages: int


ANY = 1 << 30
#: For each way to multiply and pass the first row serves whose K_PADDED and D are not exceeded. Small products have
#: tiles of 32 inputs, which leave registers for three or four thread blocks on a multiprocessor: one's loads hide
#: behind another's work. Wide ones keep the sums of K_PADDED by WIDTH in registers: one pass while that is at most
#: 8192 numbers, but without tensor cores 2048 or fewer where a program makes three gradients at a time. Beyond WIDTH
#: features the others are other programs', which compute A again. BLOCK_D bounds how much of a row the general units
#: hold at a time. No row spills registers, nor takes more shared memory than 64 KiB, which each architecture has:
#: tests/ops/test_triton.py compiles them all.
TILES = (
    # multiply, pass, K_PADDED, D: BLOCK_N, BLOCK_D, WIDTH, num_warps, num_stages
    ("fma", "forward", 16, 64, 32, 64, 64, 4, 2),
    ("fma", "forward", 32, ANY, 16, 32, 256, 8, 2),
    ("fma", "forward", 64, ANY, 16, 16, 128, 8, 2),
    ("fma", "backward", 16, 64, 32, 64, 64, 4, 2),
    ("fma", "backward", 16, ANY, 16, 32, 128, 8, 2),
    ("fma", "backward", 32, ANY, 16, 32, 64, 8, 2),
    ("fma", "backward", 64, ANY, 16, 16, 16, 8, 1),
    ("bf16", "forward", 16, ANY, 64, 64, 256, 4, 2),
    ("bf16", "forward", 32, ANY, 64, 64, 256, 8, 2),
    ("bf16", "forward", 64, ANY, 64, 64, 128, 8, 2),
    ("bf16", "backward", 16, 64, 64, 64, 64, 4, 2),
    ("bf16", "backward", 16, 256, 32, 256, 256, 8, 2),
    ("bf16", "backward", 16, ANY, 32, 64, 128, 8, 2),
    ("bf16", "backward", 32, ANY, 16, 128, 256, 8, 1),
    ("bf16", "backward", 64, ANY, 64, 64, 128, 8, 2),
    ("tf32", "forward", 32, ANY, 32, 64, 256, 8, 2),
    ("tf32", "forward", 64, ANY, 32, 64, 128, 8, 2),
    ("tf32", "backward", 16, ANY, 32, 64, 256, 8, 2),
    ("tf32", "backward", 32, ANY, 16, 64, 256, 8, 1),
    ("tf32", "backward", 64, ANY, 16, 32, 64, 8, 2),
    # Correct rather than fast, and some spill: float64, and more slots than anyone has had.
    ("fp64", "forward", ANY, ANY, 16, 32, 32, 8, 2),
    ("fp64", "backward", ANY, ANY, 16, 16, 32, 8, 2),
    *((how, way, ANY, ANY, 16, 16, 16, 8, 1) for how in ("fma", "bf16", "tf32") for way in ("forward", "backward")),
)


def tile(how: str, way: str, K: int, D: int) -> Tile:
    """The table's for K slots and D = max(Dk, Dv) features."""
    # Tensor cores multiply 16 slots at a time, and `tl.dot` adds no fewer up. Without them, small tiles need neither.
    K_PADDED = max(triton.next_power_of_2(K), 4 if how == "fma" and D <= 64 else 16)
    D_PADDED = max(triton.next_power_of_2(D), 16)
    rows = (row[4:] for row in TILES if row[:2] == (how, way) and row[2] >= K_PADDED and row[3] >= D)
    BLOCK_N, BLOCK_D, WIDTH, num_warps, num_stages = next(rows)
    if torch.version.hip:  # whose warps have 64 threads
        num_warps //= 2
    return Tile(K_PADDED, BLOCK_N, min(BLOCK_D, D_PADDED), min(WIDTH, D_PADDED), num_warps, num_stages)


def multiplication(k: Tensor, v: Tensor) -> str:
    """How keys and values of these dtypes are multiplied: what `TILES` calls it.

    bfloat16 by the tensor cores, W and dL rounded to it. Not so float16, in which 1e-8 is 0, as are many gradients: it
    is multiplied in TF32, which holds every number of either 16 bits and has float32's range. float32 by the general
    units, or in TF32 if torch may do so. (AMD's matrix units multiply float32 as it is.)
    """
    if k.dtype == torch.float64:
        return "fp64"
    if k.dtype == v.dtype == torch.bfloat16 and not INTERPRETED:  # the interpreter cannot multiply it
        return "bf16"
    halves = k.dtype.itemsize == v.dtype.itemsize == 2
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if (halves or allowed) and not torch.version.hip else "fma"


def chunking(N: int, groups: int, K: int, BLOCK_N: int) -> tuple[int, int]:
    """How many inputs of a group a program takes, and how many such chunks there are.

    2048 programs are enough to end together. But a chunk's sums, K rows, are written and read again: it has at least
    32 * K inputs, of which these are a few percent, unless that left fewer than two programs for each of 132
    multiprocessors. Nothing of the machine goes in, so that all add up in the same order.
    """
    inputs = max(triton.cdiv(N * groups, 2048), min(32 * K, triton.cdiv(N * groups, 264)), 1)
    chunk = triton.cdiv(inputs, BLOCK_N) * BLOCK_N
    return chunk, max(1, triton.cdiv(N, chunk))
