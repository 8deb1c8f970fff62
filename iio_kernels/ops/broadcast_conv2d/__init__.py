"""The spatial-broadcast decoder's first layer: a convolution of slots that are the same all over a grid."""

from iio_kernels.ops.broadcast_conv2d.api import broadcast_conv2d

__all__ = ["broadcast_conv2d"]
