"""Gaussian inpainting and what is built on it: the IIO loss, conditional entropies, interaction information."""

from iio_kernels.ops.iio_loss.api import conditional_entropies, iio_loss, inpaint, interaction_information

__all__ = ["conditional_entropies", "iio_loss", "inpaint", "interaction_information"]
