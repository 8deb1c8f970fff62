"""Inpainting and the IIO loss on NVIDIA GPUs: csrc/iio_loss.cu."""

from iio_kernels.ops.iio_loss.compiled import *  # noqa: F403, all of it is this backend's
