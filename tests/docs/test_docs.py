"""What README and docs/ show works: Python runs, commands parse, links lead somewhere."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from pages import PAGES, ROOT, anchors, blocks, commands, links, name, prose, spans
from torch import nn

import data.__main__ as data_command
from iio_kernels import accelerate
from iio_kernels.testing.families import OUTSIDE
from iio_kernels.testing.families.locatello import Locatello
from models import iem
from training.config import from_command_line

SHOWING = [page for page in PAGES if blocks(page, "python") and page.name != "CONTRIBUTING.md"]
each_page = pytest.mark.parametrize("page", PAGES, ids=name)


def sample() -> dict[str, Any]:
    """What the blocks take for granted: a model, an image, layers and tensors of toy sizes."""
    inputs, decoded = torch.randn(2, 6 * 6, 32), torch.randn(2, 4, 4, 12, 12)
    return {
        "torch": torch, "F": F, "inputs": inputs, "x": inputs, "iterations": 2, "h": 6, "w": 6, "H": 6, "W": 6,
        "model": Locatello(2, 3, 32, 64, 128), "images": inputs, "theirs": Locatello(2, 3, 32, 64, 128),
        "image": torch.rand(2, 3, 12, 12), "masks": torch.randn(2, 4, 12, 12).softmax(1), "decoded": decoded,
        "reconstruction_error": torch.tensor(0.1), "norm_slots": nn.LayerNorm(64), "norm_mlp": nn.LayerNorm(64),
        "to_q": nn.Linear(64, 64), "to_k": nn.Linear(32, 64), "to_v": nn.Linear(32, 64), "mlp": nn.Linear(64, 64),
        "gru": nn.GRUCell(64, 64), "q": torch.randn(2, 4, 64), "k": torch.randn(2, 36, 64), "v": torch.randn(2, 36, 64),
        "wk": torch.randn(64, 32), "bk": torch.randn(64), "wv": torch.randn(64, 32), "bv": torch.randn(64),
        "slots": torch.randn(2, 4, 64), "conv": nn.Conv2d(64, 8, 5, padding=2), "position": torch.randn(64, 6, 6),
        "mean": torch.zeros(2, 4, 8, requires_grad=True), "deviation": torch.ones(2, 4, 8),
        "decoder": nn.Sequential(nn.Linear(8, 576), nn.Unflatten(2, (4, 12, 12))),
    }  # fmt: skip


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def module_page(names: dict[str, Any]) -> None:
    assert names["slots"].shape == (2, 7, 64)
    assert names["attention"].shape == (2, 7, 36)
    assert names["loss"].isfinite()


def operations_page(names: dict[str, Any]) -> None:
    (d_z,) = torch.autograd.grad(names["nll"], names["z"])
    torch.testing.assert_close(names["d_z"], 2 * d_z)  # as printed, of a mean over the two images
    expected = F.relu(names["conv"](names["slots"][..., None, None].flatten(0, 1) + names["position"]))
    torch.testing.assert_close(names["out"].flatten(0, 1), expected, rtol=1e-4, atol=1e-4)


def readme(names: dict[str, Any]) -> None:
    assert "forward" in vars(names["model"]), "accelerated"
    assert names["updates"].shape == (2, 4, 64)
    assert names["loss"].isfinite()


def accelerate_page(names: dict[str, Any]) -> None:
    assert "forward" not in vars(names["model"]), "restored"


def not_binding_page(names: dict[str, Any]) -> None:
    assert names["share"].sum(-1).allclose(torch.ones(2))
    assert 1 / 4 <= names["decided"] <= 1


#: What a page's blocks must have left behind.
LEFT: dict[str, Callable[[dict[str, Any]], None]] = {
    "README.md": readme,
    "docs/module.md": module_page,
    "docs/operations.md": operations_page,
    "docs/accelerate.md": accelerate_page,
    "docs/not-binding.md": not_binding_page,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("page", SHOWING, ids=name)
def test_python_blocks_run(page: Path):
    names = sample()
    for block in blocks(page, "python"):
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
    LEFT.get(name(page), lambda names: None)(names)


def test_what_is_checked_of_a_page_is_shown():
    assert set(LEFT) <= {name(page) for page in SHOWING}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_left_alone_has_the_reason_that_the_report_gives():
    rows = (ROOT / "docs/accelerate.md").read_text().splitlines()
    for family in OUTSIDE.values():
        args, kwargs = family.arguments(family.small)
        (entry,) = accelerate(family.make(family.small), *args, **kwargs).entries
        (row,) = [row for row in rows if row.startswith(f"| {family.source} |")]
        assert f"| left alone: {entry.what} |" in row


@each_page
def test_bash_blocks_parse(page: Path):
    for block in blocks(page, "bash"):
        done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
        assert done.returncode == 0, f"{name(page)}, line {block.line}: {done.stderr}"


def parse(arguments: list[str], program: Callable[..., Any]) -> None:
    """Let a program's own parser read its arguments; it ends in SystemExit where it does not take them."""

    @functools.wraps(program)
    def nothing(*args: Any, **kwargs: Any) -> None:
        """Do none of the program's work."""

    if "--help" not in arguments:
        tyro.cli(program if isinstance(program, type) else nothing, args=arguments)


#: What the recipes of CONTRIBUTING.md add, and what stands in for it here. Their own tests run the real ones.
TOYS = {"stripes": "tetrominoes", "color-slots": "slot-attention"}


def test_recipes_add_the_toys():
    added = "".join(block.text for block in blocks(ROOT / "CONTRIBUTING.md", "python"))
    assert [toy for toy in TOYS if f'"{toy}"' not in added] == []


@each_page
def test_commands_take_their_options(page: Path, request: pytest.FixtureRequest):
    for words in commands(page):
        try:
            take([TOYS.get(word, word) for word in words], request.config)
        except (SystemExit, pytest.UsageError) as error:
            pytest.fail(f"{name(page)}: {' '.join(words)}: {error}")


def take(words: list[str], config: pytest.Config) -> None:
    """Parse a command by its own program's parser.

    Raises:
        SystemExit, pytest.UsageError: the program does not take these arguments.
    """
    if "train.py" in words:
        arguments = words[words.index("train.py") + 1 :]
        return None if "--help" in arguments else from_command_line(arguments)
    if words[0] == "pytest":
        return check_pytest(words[1:], config)
    if words[:2] == ["python", "-m"]:
        module, arguments = words[2], words[3:] or ["--help"]
        assert importlib.util.find_spec(module) is not None, f"there is no module {module}"
        if module == "data":
            parse(arguments, data_command.main)
        elif module == "models.iem":
            parse(arguments, iem.Arguments)
        elif module.startswith("bench."):
            from_command_line([] if words[3:] == [] else arguments[1:])  # behind the folder, options of train.py
        return None
    assert words[0] in ("pip", "bench/gpu.sh", "mypy", "ruff", "clang-format", "git", "head"), f"not known: {words}"
    if "-e" in words:
        extras, project = re.findall(r"\[(\w+)\]", words[-1]), (ROOT / "pyproject.toml").read_text()
        assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
    return None


def check_pytest(arguments: list[str], config: pytest.Config) -> None:
    """pytest knows the options, and what it is to test is there."""
    parsed = config._parser.parse(arguments)
    for path in parsed.file_or_dir:
        assert (ROOT / path.partition("::")[0]).exists(), path


@pytest.fixture
def known_options(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The options of all programs that the pages speak of."""
    for ask in (from_command_line, *(functools.partial(tyro.cli, x) for x in (data_command.main, iem.Arguments))):
        with pytest.raises(SystemExit):
            ask(args=["--help"])
    parser = request.config._parser
    groups = (parser._anonymous, *parser._groups)
    return {
        *re.findall(r"--[a-z][\w-]*", capsys.readouterr().out),
        *(option for group in groups for x in group.options for option in x.names()),
        "--dry-run",  # of bench/gpu.sh
        "--nproc-per-node",  # of torchrun
    }


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name)
def test_options_in_the_text_exist(page: Path, known_options: set[str]):
    named = {option for span in spans(page) for option in re.findall(r"(?:^|\s)(--[a-z][\w-]*)", span)}
    # Of other programs, shown with their name.
    named -= {option for words in commands(page) if words[0] in ("git", "ruff", "clang-format") for option in words}
    assert not named - known_options


@each_page
def test_links_lead_somewhere(page: Path):
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name(page)}: {target}"
        assert there.is_relative_to(ROOT), f"{name(page)}: {target} leads out of the tree"
        if anchor:
            assert there.suffix == ".md", f"{name(page)}: {target}"
            assert anchor in anchors(there), f"{name(page)}: {target} has no such heading"


def test_every_page_is_linked_from_the_readme():
    reached = {(ROOT / target.partition("#")[0]).resolve() for target in links(ROOT / "README.md")}
    assert {page for page in PAGES if page.name != "README.md"} <= reached | {ROOT / "README.md"}


#: The papers that the package stands on: title, authors, year and link. No public page of the last is known, nor who
#: wrote it when; see docs/papers.md.
CREDITED = (
    (
        "Object-Centric Learning with Slot Attention",
        "Locatello, Weissenborn, Unterthiner, Mahendran, Heigold, Uszkoreit, Dosovitskiy, Kipf",
        "2020", "https://arxiv.org/abs/2006.15055",
    ),
    (
        "Multi-Object Representation Learning with Iterative Variational Inference",
        "Greff, Kaufman, Kabra, Watters, Burgess, Zoran, Matthey, Botvinick, Lerchner",
        "2019", "https://arxiv.org/abs/1903.00450",
    ),
    (
        "Object-Centric Learning as Nested Optimization", "Chang, Levine, Griffiths",
        "2022", "https://iclr.cc/virtual/2022/8047",
    ),
    ("Interaction Information Optimization", "", "", ""),
)  # fmt: skip


def test_papers_are_credited_with_authors_year_and_link():
    four = prose(ROOT / "docs/papers.md").partition("These stand beside them")[0]
    entries = [" ".join(item.split()) for item in four.split("\n- ")[1:]]
    for title, authors, year, link in CREDITED:
        (entry,) = [entry for entry in entries if f"*{title}*" in entry]
        missing = [part for part in (*authors.split(", "), year, link) if part not in entry]
        assert not missing, title


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@each_page
def test_lines_outside_tables_fit(page: Path):
    long = [line for line in prose(page).splitlines() if len(line) > 120 and not re.match(r"\s*\||!\[", line)]
    assert not long


def test_the_first_commands_train_and_test():
    train, test = (block.text.strip() for block in blocks(ROOT / "README.md", "bash")[:2])
    assert train == 'pip install -e ".[train]" && python train.py --dataset tetrominoes --fine-tune iio'
    assert test == 'pip install -e ".[test]" && pytest -n auto --dist loadfile'
