"""Whether an accelerated module gives what its own code does, as far as rounding allows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from iio_kernels.acceleration.state import as_before

#: How many times what the last bits change a replacement may change.
TIMES = 4


def deviation(module: nn.Module, plain: Callable, fast: Callable, args: tuple, kwargs: dict) -> float:
    """The largest deviation of `fast` from `plain`, of that which rounding allows; see `Entry.difference`."""
    device = next((x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), torch.device("cpu"))
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    own = _results(module, plain, args, kwargs, 0)
    eps = [torch.finfo(autocast or x.dtype).eps if x.dtype.is_floating_point else 0 for x in own]
    changed = _results(module, plain, args, kwargs, max(eps, default=0.0))
    ours = _results(module, fast, args, kwargs, 0)
    # An image that is masked wholly may be NaN, in both alike; what is left has to be the same.
    finite = [x.isfinite() for x in own]
    largest = max((x[f].abs().max().double() for x, f in zip(own, finite, strict=True) if f.any()), default=0.0)
    worst = 0.0
    for a, b, c, e, f in zip(own, ours, changed, eps, finite, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or not _equal(a[~f], b[~f]):
            return float("inf")
        if f.any():
            a, b, c = (x[f].double() for x in (a, b, c))
            # Some gradients are sums of terms that cancel, and what is rounded are the terms.
            allowed = TIMES * (c - a).abs().max() + e * (4 * TIMES * a.abs().max() + largest)
            apart = (b - a).abs().max()
            worst = max(worst, 0.0 if apart == 0 else (apart / allowed).nan_to_num(float("inf")).item())
    return worst


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers are the same, of which NaN is one."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _results(module: nn.Module, forward: Callable, args: tuple, kwargs: dict, noise: float) -> list[Tensor]:
    """Outputs and gradients, inputs and parameters changed by a factor of up to 1 + noise."""
    generator = torch.Generator().manual_seed(0)

    def jitter(x: Tensor) -> Tensor:
        signs = torch.rand(x.shape, generator=generator).to(x.device) * 2 - 1
        return (x * (1 + noise * signs)).to(x.dtype)

    inputs: list[Tensor] = []

    def fresh(x: Tensor) -> Tensor:
        if x.is_floating_point():
            x = jitter(x.detach()) if noise else x.detach().clone()
            inputs.append(x.requires_grad_())
        return x

    args, kwargs = tree_map_only(Tensor, fresh, (args, kwargs))
    with as_before(module, args, kwargs), torch.enable_grad():
        if noise:
            for p in module.parameters():
                if p.is_floating_point():
                    # Along a dimension of stride 0 a parameter repeats itself. Of its data no graph takes notice.
                    own = p.data[tuple(slice(1) if stride == 0 else slice(None) for stride in p.stride())]
                    own.copy_(jitter(own))
        outputs = [x for x in tree_leaves(forward(*args, **kwargs)) if isinstance(x, Tensor)]
        differentiable = [x for x in outputs if x.requires_grad]
        leaves = [x for x in (*inputs, *module.parameters()) if x.requires_grad]
        generator.manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in differentiable]
        gradients = (
            torch.autograd.grad(differentiable, leaves, weights, allow_unused=True, materialize_grads=True)
            if differentiable
            else ()
        )
        # What the module keeps is about to be put back, and results may lie in its memory.
        return [x.detach().clone() for x in (*outputs, *gradients)]
