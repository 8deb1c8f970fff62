"""Other people's slot models made faster: `accelerate` finds slot attention in any module and replaces it."""

from iio_kernels.acceleration.api import accelerate, restore
from iio_kernels.acceleration.compiler import inductor
from iio_kernels.acceleration.forward import Accelerated
from iio_kernels.acceleration.report import Entry, Report

__all__ = ["Accelerated", "Entry", "Report", "accelerate", "inductor", "restore"]
