"""The spatial-broadcast decoder's first layer: a convolution of slots that are the same all over a grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iio_kernels.ops.broadcast_conv2d import reference
from iio_kernels.ops.broadcast_conv2d.common import Classes, Operands, Options, classes, constants, inside
from iio_kernels.runtime import backends, checks
from iio_kernels.runtime.autograd import autocast_dtype, differentiable_once, signature_kept
from iio_kernels.runtime.numerics import arithmetic_dtype
from iio_kernels.runtime.options import Backend


def broadcast_conv2d(
    z: Tensor,
    weight: Tensor,
    position_map: Tensor,
    size: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    transposed: bool = False,
    relu: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """What a convolution makes of z, broadcast to a grid, plus what it makes of all else: without that grid.

        out[m] = relu(conv2d(z[m] at every pixel of the grid, weight) + position_map)

    Convolution is linear, so everything that is the same for all slots is convolved once, by the caller, bias
    included: `position_map = F.conv2d(position[None], weight, bias, stride, padding)[0]` for an embedding of
    positions that is added to z. For coordinates concatenated to it that is the convolution of the coordinates with
    `weight[:, D:]`, and the weight here is `weight[:, :D]`. A picture that is the same everywhere is convolved to one
    of a few vectors for each pixel, by which taps of the kernel fall inside the grid.

    Args:
        z: `(..., D)`, slots; any leading dimensions.
        weight: `(O, D, kh, kw)`, or `(D, O, kh, kw)` if transposed, as torch's convolutions have it.
        position_map: `(O, H', W')`, where H' and W' are the sizes that the convolution makes of `size`. A transposed
            one with stride s makes any of s sizes, which torch tells apart by `output_padding`.
        size: (H, W) of the grid that z is broadcast to, or one int for both.
        stride, padding: of the convolution, an int or a pair.
        transposed: `conv_transpose2d` rather than `conv2d`.
        relu: whether a ReLU follows, which saves a pass over the result, and one over its gradient.
        backend: "auto" takes the fastest that serves the tensors' device; see `iio_kernels.backends()`.

    Returns:
        `(..., O, H', W')` in channels-last memory. Its dtype is as a convolution's: that of autocast where it is on,
        otherwise the widest of z's, weight's and position_map's. Arithmetic is in at least float32 whatever these are;
        a sum is rounded once. Gradients go to z, weight and position_map, each in its input's dtype.

    Edge cases: there may be no slots. Values are never inspected, so a NaN or an infinity travels into the result and
    no call waits for the device. An infinite weight is a NaN where its tap falls outside the grid.

    Raises:
        TypeError: a tensor is not a floating-point tensor, or an option has the wrong type.
        ValueError: shapes or devices do not fit, or an option has a value that does not exist.
        RuntimeError: the backend asked for by name cannot be used on this machine.

    Complexity: O(M O H' W') for M slots, and O(M D O) for each of some kh kw vectors, where the convolution itself
    takes O(M D O kh kw) for each pixel. The least traffic is the result written once; the backward pass reads its
    gradient once, recomputes where the ReLU cut, and keeps nothing of that size.

    Source: Watters et al. 2019, "Spatial Broadcast Decoder", section 3.

    Example:
        >>> conv, slots, position = torch.nn.Conv2d(64, 32, 5, padding=2), torch.randn(8, 4, 64), torch.rand(64, 35, 35)
        >>> position_map = conv(position[None])[0]
        >>> broadcast_conv2d(slots, conv.weight, position_map, (35, 35), padding=2, relu=True).shape
        torch.Size([8, 4, 32, 35, 35])
    """
    axes = _check(z, weight, position_map, size, stride, padding, transposed)
    checks.flag("relu", relu)
    device = checks.same_device(z=z, weight=weight, position_map=position_map)
    name = backends.choose("broadcast_conv2d", backend, device)
    arithmetic = arithmetic_dtype(z, weight, position_map)
    promoted = torch.promote_types(torch.promote_types(z.dtype, weight.dtype), position_map.dtype)
    slots, weight, position_map = (x.to(arithmetic) for x in (z.reshape(-1, z.shape[-1]), weight, position_map))
    kinds = [classes(*axis) for axis in axes]
    row_taps, column_taps = (inside(own, *axis, slots) for own, axis in zip(kinds, axes, strict=True))
    constant = constants(slots, weight, row_taps, column_taps, transposed)
    operands = Operands(constant, position_map.permute(1, 2, 0))
    rows, columns = kinds
    out = _spread(operands, Options(rows, columns, relu, autocast_dtype(device, promoted)), name)
    return out.reshape(*z.shape[:-1], *out.shape[1:]).movedim(-1, -3)


@signature_kept
class BroadcastFunction(torch.autograd.Function):
    """The autograd Function under `broadcast_conv2d`: one backend's `forward` and `backward`.

    `BroadcastFunction.apply(constant, position_map, rows, columns, relu, dtype, backend)` spreads constant, a vector
    for each class of rows and of columns, over the pixels of position_map, and adds. It checks nothing: call
    `broadcast_conv2d`. It differentiates once; for second derivatives call that with `backend="reference"`, which plain
    autograd differentiates any number of times.
    """

    @staticmethod
    def forward(
        constant: Tensor,
        position_map: Tensor,
        rows: Classes,
        columns: Classes,
        relu: bool,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        kernels = backends.implementation("broadcast_conv2d", backend)
        return kernels.forward(Operands(constant, position_map), Options(rows, columns, relu, dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        constant, position_map, *options, ctx.backend = inputs
        ctx.options = Options(*options)
        ctx.save_for_backward(constant, position_map)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        kernels = backends.implementation("broadcast_conv2d", ctx.backend)
        return *kernels.backward(d_out, Operands(*ctx.saved_tensors), ctx.options), *(None,) * 5


def _spread(operands: Operands, options: Options, backend: str) -> Tensor:
    """`BroadcastFunction.apply`, but the reference is differentiated by autograd itself, any number of times."""
    if backend == "reference":
        return reference.forward(operands, options)
    return BroadcastFunction.apply(*operands, *options, backend)


def _check(
    z: Tensor,
    weight: Tensor,
    position_map: Tensor,
    size: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    transposed: bool,
) -> list[tuple[int, int, int, int, int, bool]]:
    """For rows and for columns: the grid's and the result's size, taps, stride, padding, transposed."""
    checks.flag("transposed", transposed)
    checks.tensor("z", z, "(..., D)", min_dims=1)
    layout = "(D, O, kh, kw)" if transposed else "(O, D, kh, kw)"
    checks.tensor("weight", weight, layout)
    checks.tensor("position_map", position_map, "(O, H', W')")
    D, O = z.shape[-1], weight.shape[1 if transposed else 0]
    if weight.shape[0 if transposed else 1] != D or 0 in weight.shape:
        raise ValueError(
            f"weight: expected shape {layout}{' without an empty dimension' if 0 in weight.shape else ''}, D = {D} to "
            f"match z {tuple(z.shape)}, got {tuple(weight.shape)}"
        )
    if position_map.shape[0] != O:
        raise ValueError(
            f"position_map: expected {O} channels to match weight {tuple(weight.shape)}, got "
            f"{tuple(position_map.shape)}"
        )
    pairs = _pair("size", size, 1), _pair("stride", stride, 1), _pair("padding", padding, 0)
    axes = []
    for *numbers, which in zip(*pairs, weight.shape[2:], position_map.shape[1:], ("H'", "W'"), strict=True):
        n, s, p, k, out = map(_constant, numbers)
        least = (n - 1) * s - 2 * p + k if transposed else (n + 2 * p - k) // s + 1
        most = least + s - 1 if transposed else least
        if most < 1 or (not transposed and n + 2 * p < k):
            raise ValueError(
                f"size: expected a grid of which {k} taps, stride {s} and padding {p} leave something, got {size}"
            )
        if not max(least, 1) <= out <= most:
            raise ValueError(
                f"position_map: expected {which} = {least}{f' to {most}' if most > least else ''} for size {n}, "
                f"{k} taps, stride {s} and padding {p}, got {tuple(position_map.shape)}"
            )
        axes.append((n, out, k, s, p, transposed))
    return axes


def _constant(n: int) -> int:
    """n; under torch.compile as a constant: a graph whose sizes are formulas of such numbers takes minutes to trace."""
    return len(range(n))


def _pair(name: str, value: int | tuple[int, int], at_least: int) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)):
        value = (value, value)
    if len(value) != 2:
        raise ValueError(f"{name}: expected an int or a pair, got {tuple(value)}")
    first, second = (checks.integer(name, number, at_least=at_least) for number in value)
    return first, second
