"""The whole Slot Attention module: all of its iterations in one operator."""

from iio_kernels.ops.slot_attention_module.api import SlotAttentionWeights, slot_attention_module

__all__ = ["SlotAttentionWeights", "slot_attention_module"]
