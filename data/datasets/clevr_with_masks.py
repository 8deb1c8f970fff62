"""CLEVR with masks, from the files of Multi-Object Datasets: the middle of each picture, and what its objects are."""

from data.dataset import Dataset
from data.formats import MULTI_OBJECT_DATASETS, Format

__all__ = ["ENTRIES"]


def _entry(name: str, most: int | None) -> Dataset:
    form = Format(
        "clevr10",
        image=(240, 320, 3),
        mask=(11, 240, 320, 1),
        entity_axis=0,
        crop=(29, 64, 192),
        side=128,
        properties=True,
        most=most,
    )
    return Dataset(name, 'Kabra et al., "Multi-Object Datasets", 2019', MULTI_OBJECT_DATASETS, file=form)


ENTRIES = (_entry("clevr6", 6), _entry("clevr10", None))
