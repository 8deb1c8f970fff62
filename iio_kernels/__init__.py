"""Kernels for object-centric learning: slot attention, and the Interaction Information Optimization loss."""

from iio_kernels._backends import backends
from iio_kernels._version import __version__
from iio_kernels.ops.inpainting import (
    IIOLossFunction,
    conditional_entropies,
    iio_loss,
    inpaint,
    interaction_information,
)
from iio_kernels.ops.slot_attention import SlotAttentionFunction, slot_attention, slot_attention_from_inputs

__all__ = [
    "IIOLossFunction",
    "SlotAttentionFunction",
    "__version__",
    "backends",
    "conditional_entropies",
    "iio_loss",
    "inpaint",
    "interaction_information",
    "slot_attention",
    "slot_attention_from_inputs",
]
