"""Spatial mixture (IODINE): an image as a mixture, at every pixel, of what a decoder drew for each slot."""

from iio_kernels.ops.spatial_mixture.api import SpatialMixture, mixture_log_likelihood, spatial_mixture

__all__ = ["SpatialMixture", "mixture_log_likelihood", "spatial_mixture"]
