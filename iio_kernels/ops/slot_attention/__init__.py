"""Slot attention: softmax over slots fused with the weighted mean over inputs."""

from iio_kernels.ops.slot_attention.api import slot_attention, slot_attention_from_inputs

__all__ = ["slot_attention", "slot_attention_from_inputs"]
