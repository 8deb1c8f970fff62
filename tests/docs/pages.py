"""The pages that people read: their code blocks, links and headings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
#: What a visitor reads, and what is in docs/.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A block of code: its language, its text, and the line of the page that it begins in."""

    language: str
    text: str
    line: int


def name(page: Path) -> str:
    """How a page is called in the tests: its path in the tree."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[Block]:
    """The page's blocks of a language, from top to bottom, without the indent that a list gives them."""
    text = page.read_text()
    found = [match for match in FENCE.finditer(text) if match[2] == language]
    lines = [text.count("\n", 0, match.start()) + 2 for match in found]
    texts = [re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE) for match in found]
    return [Block(language, text, line) for text, line in zip(texts, lines, strict=True)]


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def spans(page: Path) -> list[str]:
    """What stands between single ticks in the page's prose."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page))


def commands(page: Path) -> list[list[str]]:
    """The commands that a page shows, in blocks and in prose, as words; environment variables before them left out."""
    lines = [line for block in blocks(page, "bash") for line in block.text.replace("\\\n", " ").splitlines()]
    lines += [span for span in spans(page) if re.match(r"(python|torchrun|pytest|ruff)\s", span)]
    parts = [part for line in lines for part in re.split(r"&&|\||;", line)]
    split = (shlex.split(part, comments=True) for part in parts)
    return [words for words in split if words and "..." not in words]


def anchors(page: Path) -> set[str]:
    """Where a link may lead in a page: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def links(page: Path) -> list[str]:
    """Where the page's links and pictures lead within the tree."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in found if not re.match(r"https?:|mailto:", target)]
