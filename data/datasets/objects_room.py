"""Objects Room (Burgess et al., 2019), from the files of Multi-Object Datasets: objects in a room, seen in 3D.

Four entities are background: the sky, the floor and the two halves of the wall.
"""

from data.dataset import Dataset
from data.formats import MULTI_OBJECT_DATASETS, Format

__all__ = ["ENTRIES"]


def _entry(name: str, entities: int, stored_as: str) -> Dataset:
    return Dataset(
        name,
        citation='Kabra et al., "Multi-Object Datasets", 2019',
        origin=MULTI_OBJECT_DATASETS,
        file=Format(stored_as, image=(64, 64, 3), mask=(entities, 64, 64, 1), entity_axis=0, backgrounds=4),
    )


ENTRIES = (
    _entry("objects-room", 7, "objects-room"),
    _entry("objects-room-six-objects", 10, "objects-room-identical-color"),
    _entry("objects-room-empty-room", 4, "objects-room-empty-room"),
    _entry("objects-room-identical-color", 10, "objects-room-identical-color"),
)
