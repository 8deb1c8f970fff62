"""How each operation is measured, a file for each: what it races against, its calls and its launch settings.

A file `<operation>.py` has
- `RACES`: its races, for `bench/test_operations.py`;
- `inputs(case, device)`: float32 inputs at a benchmark's size, and the gradient to a result that is no error;
- `function(case)`: what gives the result of these inputs, for a `backend`;
- `odd_calls(backend, device)`: calls at sizes that leave no tile full, for compute-sanitizer;
- `DTYPES`: those whose launch settings differ;
- `launch_settings()`: neighbours of what its triton.py has, by label: names there, and their values.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType

from iio_kernels.runtime.backends import OPERATIONS

__all__ = ["MEASURED", "TESTED"]

#: By operation, how it is measured, of those that have a file here, and what it is tested on.
MEASURED: dict[str, ModuleType] = {
    name: importlib.import_module(f"bench.operations.{name}")
    for name in OPERATIONS
    if find_spec(f"bench.operations.{name}") is not None
}
TESTED: dict[str, ModuleType] = {name: importlib.import_module(f"iio_kernels.testing.{name}") for name in MEASURED}
