"""Kernels for object-centric learning: slot attention, composition, mixtures, Interaction Information Optimization."""

from iio_kernels import nn
from iio_kernels._version import __version__
from iio_kernels.acceleration import accelerate, restore
from iio_kernels.ops.broadcast_conv2d.api import BroadcastFunction, broadcast_conv2d
from iio_kernels.ops.compose.api import CompositionFunction, compose, composition_error
from iio_kernels.ops.iio_loss.api import conditional_entropies, iio_loss, inpaint, interaction_information
from iio_kernels.ops.iio_loss.functions import IIOLossFunction
from iio_kernels.ops.slot_attention.api import SlotAttentionFunction, slot_attention, slot_attention_from_inputs
from iio_kernels.ops.slot_attention_module.api import IterationsFunction, SlotAttentionWeights, slot_attention_module
from iio_kernels.ops.spatial_mixture.api import MixtureFunction, SpatialMixture, mixture_log_likelihood, spatial_mixture
from iio_kernels.runtime import entry_point
from iio_kernels.runtime.backends import backends

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

entry_point.announce()
