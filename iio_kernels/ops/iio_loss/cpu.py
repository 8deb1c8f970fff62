"""Inpainting and the IIO loss on the CPU: csrc/iio_loss.cpp."""

from iio_kernels.ops.iio_loss.compiled import *  # noqa: F403, all of it is this backend's
