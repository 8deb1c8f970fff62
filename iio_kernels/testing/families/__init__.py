"""The Slot Attention modules of the field, each as its authors would write it: what they share, and how they differ.

Re-written from the papers and from how the published programs are known to differ: names of parameters, signatures,
and the ways to spell one attention. Plain PyTorch, nothing of the package.

A file here holds one family, or those of one author, and its table `FAMILIES`: by name, what `family.Family` says.
"""

from __future__ import annotations

import importlib
import pkgutil

from iio_kernels.testing.families.family import Family


def _found() -> dict[str, Family]:
    """The families of all files: the paper's own first, the others by name."""
    found: dict[str, Family] = {}
    for file in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{file.name}"), "FAMILIES", {})
    return {name: found[name] for name in sorted(found, key=lambda name: (name != "locatello", name))}


_ALL = _found()

#: What is slot attention.
FAMILIES = {name: family for name, family in _ALL.items() if family.is_slot_attention}

#: What looks like it, and is something else.
OUTSIDE = {name: family for name, family in _ALL.items() if not family.is_slot_attention}
