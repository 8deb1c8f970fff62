"""Kernels for object-centric learning: slot attention, composition, mixtures, Interaction Information Optimization."""

from iio_kernels import _entry_point, nn
from iio_kernels._backends import backends
from iio_kernels._version import __version__
from iio_kernels.acceleration import accelerate, restore
from iio_kernels.ops.broadcast import BroadcastFunction, broadcast_conv2d
from iio_kernels.ops.composition import CompositionFunction, compose, composition_error
from iio_kernels.ops.inpainting import (
    IIOLossFunction,
    conditional_entropies,
    iio_loss,
    inpaint,
    interaction_information,
)
from iio_kernels.ops.iterations import IterationsFunction, SlotAttentionWeights, slot_attention_module
from iio_kernels.ops.mixture import MixtureFunction, SpatialMixture, mixture_log_likelihood, spatial_mixture
from iio_kernels.ops.slot_attention import SlotAttentionFunction, slot_attention, slot_attention_from_inputs

__all__ = [
    "BroadcastFunction",
    "CompositionFunction",
    "IIOLossFunction",
    "IterationsFunction",
    "MixtureFunction",
    "SlotAttentionFunction",
    "SlotAttentionWeights",
    "SpatialMixture",
    "__version__",
    "accelerate",
    "backends",
    "broadcast_conv2d",
    "compose",
    "composition_error",
    "conditional_entropies",
    "iio_loss",
    "inpaint",
    "interaction_information",
    "mixture_log_likelihood",
    "nn",
    "restore",
    "slot_attention",
    "slot_attention_from_inputs",
    "slot_attention_module",
    "spatial_mixture",
]

_entry_point.announce()
