"""The recipes of CONTRIBUTING.md: their blocks, and a copy of the tree that they are applied to.

A block begins with a comment that names its file. A Python block is that file, new. A diff takes the place of what it
shows: lines without a mark and those with a minus, which the file has once. Without such lines it is added at the end.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "CONTRIBUTING.md"
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


class Edit(NamedTuple):
    """What a block does to a file: `old` is replaced; None where the file is new."""

    path: str
    old: str | None
    new: str


def recipe(title: str) -> list[Edit]:
    """The edits of the section with this title, from top to bottom."""
    _, _, section = GUIDE.read_text().partition(f"\n## {title}\n")
    assert section, f"CONTRIBUTING.md has no section {title!r}"
    blocks = [(match[2], textwrap.dedent(match[3])) for match in FENCE.finditer(section.partition("\n## ")[0])]
    return [edit(language, text) for language, text in blocks if language in ("python", "diff")]


def printed(title: str) -> list[list[str]]:
    """The commands that the section with this title shows for Python to run: their words behind `python`."""
    _, _, section = GUIDE.read_text().partition(f"\n## {title}\n")
    blocks = [match[3] for match in FENCE.finditer(section.partition("\n## ")[0]) if match[2] == "bash"]
    lines = [line.split() for block in blocks for line in block.splitlines()]
    return [words[1:] for words in lines if words[:1] == ["python"]]


def edit(language: str, text: str) -> Edit:
    """What a block does."""
    first, _, rest = text.partition("\n")
    assert first.startswith("# "), f"a block begins with its file's name, not with {first!r}"
    if language == "python":
        return Edit(first[2:], None, rest)
    lines = rest.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    return Edit(first[2:], old, "".join(line[1:] for line in lines if line[0] in " +"))


def apply(edits: list[Edit], project: Path) -> None:
    """Apply edits to a copy of the tree."""
    for path, old, new in edits:
        file = project / path
        if old is None:
            assert not file.exists(), f"{path} is not new"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(new)
            continue
        text = file.read_text()
        if old:
            assert text.count(old) == 1, f"{path} has not once:\n{old}"
            file.write_text(text.replace(old, new))
        else:
            file.write_text(text + new)


def copy_of_the_tree(project: Path) -> None:
    """Copy what git knows, and what is new and not ignored."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    paths = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for path in filter(None, paths):
        if (ROOT / path).exists() and not path.startswith("bench/results/"):
            (project / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, project / path, follow_symlinks=False)


def run(project: Path, *arguments: str) -> str:
    """What Python prints with these arguments in the copy, which must end well."""
    environment = os.environ | {"PYTHONPATH": str(project)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    return done.stdout
