"""`torch.compile(model, backend="iio_kernels")` where the package is not installed, but on the path."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from iio_kernels._version import __version__
from iio_kernels.runtime.torch_private import register_with_compile

#: The files of an installed distribution, which pyproject.toml makes as well.
FILES = {
    "METADATA": f"Metadata-Version: 2.1\nName: iio_kernels\nVersion: {__version__}\n",
    "entry_points.txt": "[torch_dynamo_backends]\niio_kernels = iio_kernels.acceleration:inductor\n",
}


def announce() -> None:
    """Let torch.compile find its backend: as it looks for any, or, if it has looked already, in its register.

    torch.compile itself, which takes seconds to import, is not imported for it.
    """
    sys.meta_path.append(_Finder)
    register_with_compile("iio_kernels", _inductor)


def _inductor() -> Callable[..., Any]:
    from iio_kernels.acceleration import inductor

    return inductor


class _Distribution(importlib.metadata.Distribution):
    """This package, as if it were installed."""

    def read_text(self, filename: str) -> str | None:
        return FILES.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        return Path(__file__).parents[2] / path


class _Finder(importlib.metadata.DistributionFinder):
    """Finds no modules, and one distribution; of two with a name the first counts, which is one that is installed."""

    @classmethod
    def find_spec(cls, *_: object) -> None:
        return None

    @classmethod
    def find_distributions(cls, context: Any = None) -> Iterator[_Distribution]:
        # Of other places than the path that modules are imported from, nothing is known.
        here = context is None or context.path is sys.path or context.path == sys.path
        if here and (context is None or _normal(context.name) in (None, "iio_kernels")):
            yield _Distribution()


def _normal(name: str | None) -> str | None:
    """A distribution's name with the spellings that mean the same made one."""
    return None if name is None else re.sub(r"[-_.]+", "_", name).lower()
