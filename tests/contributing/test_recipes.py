"""Each recipe of CONTRIBUTING.md, word for word, brings what it says, and touches what it names alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from recipes import apply, copy_of_the_tree, printed, recipe, run

OPERATION, BACKEND = "Add an operation", "Add a backend"
MODEL, DATA_SET, METRIC = "Add a model", "Add a data set", "Add a metric"


@pytest.fixture
def project(tmp_path: Path) -> Callable[..., Path]:
    """A function of titles that makes a copy of the tree with these recipes applied."""

    def make(*titles: str) -> Path:
        copy = tmp_path / "project"
        copy_of_the_tree(copy)
        for title in titles:
            apply(recipe(title), copy)
        return copy

    return make


def contract(copy: Path, words: str) -> int:
    """How many tests of what every operation keeps pass, of those that these words choose."""
    options = ["-q", "--deep", "-p", "no:cacheprovider", "-rN"]
    out = run(copy, "-m", "pytest", *options, "-k", words, "tests/ops/test_every_operation.py")
    return int(out.rpartition(" passed")[0].split()[-1])


@pytest.mark.long
def test_an_operation_is_found_and_keeps_the_contract(project):
    assert contract(project(OPERATION), "slot_energy") >= 5


@pytest.mark.long
def test_a_backend_is_found_and_keeps_the_contract(project):
    assert contract(project(OPERATION, BACKEND), "plain and slot_energy") >= 3


def test_a_data_set_loads_and_is_trained_on(project):
    copy = project(DATA_SET)
    program = "import data, torch; print(data.generator('stripes', 3).batch(torch.arange(3))[0].shape)"
    assert run(copy, "-c", program).split() == ["torch.Size([3,", "3,", "32,", "32])"]
    for command in printed(DATA_SET):
        run(copy, *command)
    assert (copy / "sheet.png").stat().st_size
    (summary,) = copy.glob("runs/*/summary.json")
    assert json.loads(summary.read_text())["config"]["dataset"] == "stripes"


def test_a_model_trains_and_a_metric_is_scored(project):
    copy = project(MODEL, METRIC)
    (command,) = printed(MODEL)
    tables = run(copy, *command, "--out", "run")
    summary = json.loads((copy / "run" / "summary.json").read_text())
    assert summary["config"]["model"] == "color-slots"
    for phase in ("before", "after"):
        assert 0 < summary[phase]["background_unity"] <= 1
    assert "one-slot bg" in tables
    assert "Color slots" in run(copy, "train.py", "--eval-only", "run/before.safetensors", "--eval-draws", "1")


@pytest.mark.long
def test_a_model_trains_on_a_data_set_of_its_own(project):
    copy = project(MODEL, DATA_SET)
    run(copy, "train.py", "--model", "color-slots", "--dataset", "stripes", "--preset", "smoke", "--out", "run")
    assert json.loads((copy / "run" / "summary.json").read_text())["config"]["dataset"] == "stripes"


@pytest.mark.parametrize("title", [OPERATION, BACKEND, MODEL, DATA_SET, METRIC])
def test_a_recipe_adds_files_and_at_most_a_few_lines(title):
    """What it changes of files that exist is short: nothing is listed in several places."""
    touched = {edit.path for edit in recipe(title) if edit.old is not None}
    assert len(touched) <= 2
    for edit in recipe(title):
        if edit.old is not None and title != METRIC:
            assert len(edit.new.splitlines()) - len(edit.old.splitlines()) <= 1
