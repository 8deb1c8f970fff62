"""The data sets, a file each: its entries in the table, and its generator where it is drawn.

A new one is a file with a tuple `ENTRIES`, and its name below.
"""

import importlib

from data.dataset import Dataset

__all__ = ["DATASETS"]

#: In the order in which users meet them.
FILES = (
    "tetrominoes",
    "multi_dsprites",
    "shapes",
    "clevr_like",
    "objects_room",
    "clevr_with_masks",
    "clevr",
)

#: All data sets by name.
DATASETS: dict[str, Dataset] = {
    entry.name: entry for file in FILES for entry in importlib.import_module(f"data.datasets.{file}").ENTRIES
}
