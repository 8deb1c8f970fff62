"""What the table of data sets says of each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from data.formats import Format, PictureFolder
from data.scenes import ObjectScenes, Scenes

__all__ = ["Dataset"]


@dataclass(frozen=True)
class Dataset:
    """Where the scenes of a data set come from, and what they are.

    Attributes:
        name: what users call it.
        citation: who published it.
        origin: where its files are, or what it is drawn after where there are none.
        generator: takes `num_scenes`, `seed` and `first`; None where the scenes come from files alone.
        file: how a file, or a folder of pictures, stores them, for `load`; None where there are no files.
    """

    name: str
    citation: str
    origin: str
    generator: Callable[..., Scenes] | None = None
    file: Format | PictureFolder | None = None

    @cached_property
    def _example(self) -> Scenes | Format | PictureFolder:
        """What tells the sizes: the file's format or, without one, a generator."""
        return self.file or self.generator(1)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every image, in pixels."""
        return self._example.size

    @property
    def num_entities(self) -> int:
        """The most entities a scene can hold, the background included."""
        return self._example.num_entities

    @property
    def properties(self) -> bool:
        """Whether the properties of the objects are known: the scenes follow `ObjectScenes`."""
        return isinstance(self._example, ObjectScenes) or (self.file is not None and self.file.properties)

    @property
    def masks(self) -> bool:
        """Whether it is known which pixels are whose."""
        return self.file is None or self.file.masks
