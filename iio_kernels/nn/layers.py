"""The module's layers, on slots in the dtype of the arithmetic."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Identity(nn.Module):
    """In the place of projections where there are none: a linear layer that changes nothing and learns nothing."""

    weight: Tensor
    bias: Tensor | None = None

    def __init__(self, size: int) -> None:
        super().__init__()
        self.out_features = size
        self.register_buffer("weight", torch.eye(size), persistent=False)


def linear(layer: nn.Linear | Identity, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def norm(layer: nn.LayerNorm | None, x: Tensor) -> Tensor:
    if layer is None:
        return x
    return F.layer_norm(x, layer.normalized_shape, layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)


def linears(mlp: nn.Sequential) -> tuple[nn.Linear, nn.Linear]:
    """The MLP's two."""
    layers: Any = mlp  # for type checkers: a Sequential takes them for any modules
    return layers[0], layers[2]


def of_heads(layer: nn.Linear | Identity, heads: int) -> tuple[Tensor, Tensor | None]:
    """A projection's weight (heads, width of one, width of x) and bias (heads, width of one)."""
    bias = None if layer.bias is None else layer.bias.unflatten(0, (heads, -1))
    return layer.weight.unflatten(0, (heads, -1)), bias
