"""What a family is: a module of the field, in a size, and an example of what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Size(NamedTuple):
    """How large a module and its inputs are."""

    B: int = 2  # images, or videos
    N: int = 13  # inputs
    K: int = 3  # slots
    Dx: int = 10  # width of an input
    D: int = 8  # width of a slot
    Dk: int = 8  # width of keys, queries and values, where it may be another
    H: int = 12  # hidden width of the MLP
    T: int = 3  # iterations
    heads: int = 1
    frames: int = 2  # of a video


SMALL = Size()
SQUARE = Size(Dx=8)  # for those whose inputs are as wide as their slots
TETROMINOES = Size(B=64, N=35**2, K=4, Dx=64, D=64, Dk=64, H=128)
CLEVR = TETROMINOES._replace(N=128**2, K=7)
DINOSAUR = Size(B=64, N=28**2, K=7, Dx=256, D=256, Dk=256, H=1024)
MOVI = Size(B=8, N=64**2, K=24, Dx=192, D=192, Dk=192, H=192, T=2, frames=3)


@dataclass(frozen=True)
class Family:
    """A module of the field.

    `make` builds it in a size, `arguments` gives an example of what it is called with. `projection_free` says whether
    keys and values are linear in inputs that all iterations share, so that they need not be made; `draws`, whether
    forward draws the initial slots by torch's random numbers; `is_slot_attention`, whether it is that and does not just
    look alike.
    """

    make: Callable[[Size], nn.Module]
    arguments: Callable[[Size], tuple[tuple[Any, ...], dict[str, Any]]]
    source: str
    small: Size = SMALL
    published: Size = TETROMINOES
    projection_free: bool = True
    draws: bool = False
    is_slot_attention: bool = True


def inputs_of(size: Size) -> Tensor:
    return torch.randn(size.B, size.N, size.Dx)


def slots_of(size: Size) -> Tensor:
    return torch.randn(size.B, size.K, size.D)


def mask_of(size: Size, length: int) -> Tensor:
    """(B, length) bool: of the first image two take part, of the second all but the last but one, of others all."""
    mask = torch.ones(size.B, length, dtype=torch.bool)
    mask[0, 2:] = False
    mask[1:2, -2] = False
    return mask


def of_inputs(size: Size) -> tuple[tuple, dict]:
    return (inputs_of(size),), {}


def of_inputs_and_slots(size: Size) -> tuple[tuple, dict]:
    return (inputs_of(size), slots_of(size)), {}
