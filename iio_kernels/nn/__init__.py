"""Modules on the operations of this package: `SlotAttention`, and `convert_weights` from and to others' modules."""

from iio_kernels.nn.layers import Identity as _Identity  # noqa: F401  # as modules that were pickled before name it
from iio_kernels.nn.slot_attention import SlotAttention
from iio_kernels.nn.weights import convert_weights

__all__ = ["SlotAttention", "convert_weights"]
