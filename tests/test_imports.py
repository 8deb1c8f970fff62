"""Who may import whom, read from the sources: at the top of a file, within functions and for type checkers alike."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from iio_kernels.runtime.backends import BACKENDS, OPERATIONS

ROOT = Path(__file__).parents[1]
#: What is the project's own.
PROJECT = ("bench", "data", "iio_kernels", "models", "tests", "train", "training")

#: What the files of a package may import of the project; of a package that has its own line inside another, that line.
ALLOWED: dict[str, tuple[str, ...]] = {
    "iio_kernels": ("iio_kernels",),
    "iio_kernels.acceleration": ("iio_kernels.acceleration", "iio_kernels.ops", "iio_kernels.runtime"),
    "iio_kernels.nn": ("iio_kernels.nn", "iio_kernels.ops", "iio_kernels.runtime"),
    **{
        f"iio_kernels.ops.{operation}": (f"iio_kernels.ops.{operation}", "iio_kernels.runtime")
        for operation in OPERATIONS
    },
    "iio_kernels.runtime": ("iio_kernels.runtime", "iio_kernels._version"),
    "iio_kernels.testing": ("iio_kernels",),
    "data": ("data",),
    "models": ("models", "data", "iio_kernels"),
    "training": ("training", "models", "data", "iio_kernels"),
    "train": ("training", "data"),
    "bench": PROJECT,
    "tests": PROJECT,
}
#: One file each that may import one more thing, and why.
EXCEPTIONS = {
    ("iio_kernels.ops.slot_attention_module.api", "iio_kernels.ops.slot_attention.api"): (
        "sizes that its own kernels do not have room for are iterations of slot attention"
    ),
    ("iio_kernels.runtime.entry_point", "iio_kernels.acceleration"): (
        "torch finds torch.compile's backend by what is announced here, and imports it when it is first asked for"
    ),
}
#: Samples and compilers for absent GPUs are for these alone: what users install imports none of them.
MAY_IMPORT_TESTING = ("iio_kernels.testing", "bench", "tests")


def sources() -> dict[str, Path]:
    """Every file of the project by its module's name."""
    files = {}
    for name in PROJECT:
        for path in [ROOT / f"{name}.py", *(ROOT / name).rglob("*.py")]:
            if path.exists():
                parts = path.relative_to(ROOT).with_suffix("").parts
                files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


SOURCES = sources()


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def imports(module: str) -> Iterator[str]:
    """The modules of the project that a module imports, of `from package import name` the name where it is a module.

    A relative import is given as it stands.
    """
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = ["." * node.level + (node.module or "")]
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in SOURCES else str(node.module) for name in whole]
        else:
            continue
        yield from (name for name in names if name.startswith(".") or name.partition(".")[0] in PROJECT)


def package_of(module: str) -> str:
    """The line of `ALLOWED` that a module comes under."""
    return max((package for package in ALLOWED if within(module, (package,))), key=len)


@pytest.mark.parametrize("package", [package for package in ALLOWED if any(within(x, (package,)) for x in SOURCES)])
def test_a_package_imports_what_it_may(package):
    wrong = [
        f"{module} imports {name}"
        for module in SOURCES
        if package_of(module) == package
        for name in imports(module)
        if not within(name, ALLOWED[package]) and (module, name) not in EXCEPTIONS
    ]
    assert not wrong


def test_every_exception_is_needed():
    assert [pair for pair in EXCEPTIONS if pair[1] not in imports(pair[0])] == []


@pytest.mark.parametrize("module", PROJECT)
def test_imports_are_absolute(module):
    relative = [name for name in SOURCES if within(name, (module,)) if any(x.startswith(".") for x in imports(name))]
    assert not relative


def test_testing_is_imported_by_tests_and_benchmarks_alone():
    wrong = [
        f"{module} imports {name}"
        for module in SOURCES
        if not within(module, MAY_IMPORT_TESTING)
        for name in imports(module)
        if within(name, ("iio_kernels.testing", "tests"))
    ]
    assert not wrong


@pytest.mark.parametrize("operation", OPERATIONS)
def test_backends_import_neither_the_reference_nor_each_other(operation):
    """The files of a backend are `<backend>.py` and `<backend>_<subject>.py`. What is shared stands in common.py, of
    which the schema knows its types, too."""
    folder = f"iio_kernels.ops.{operation}"

    def backend_of(module: str) -> str | None:
        stem = module.removeprefix(f"{folder}.")
        return next((name for name in BACKENDS if stem == name or stem.startswith(f"{name}_")), None)

    wrong = []
    for module in (module for module in SOURCES if within(module, (folder,))):
        own = backend_of(module)
        if own == "reference" or (own is None and module != f"{folder}.schema"):
            continue
        wrong += [f"{module} imports {name}" for name in imports(module) if backend_of(name) not in (own, None)]
    assert not wrong
