"""Slot composition: what a decoder drew for each slot, put together by a softmax of its masks, and compared."""

from iio_kernels.ops.compose.api import compose, composition_error

__all__ = ["compose", "composition_error"]
