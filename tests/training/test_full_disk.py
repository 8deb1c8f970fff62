"""A full disk costs nothing, and says how to go on."""

from pathlib import Path

import pytest
from commands import SHORT, assert_finished, call, needs_dev_full

from training.metrics_log import Metrics


@needs_dev_full
@pytest.mark.parametrize("name", ["checkpoint.pt", "before.safetensors", "summary.json", "metrics.jsonl"])
def test_a_full_disk_ends_in_a_line_that_says_how_to_go_on(name, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    out.mkdir()
    with monkeypatch.context() as patch:
        if name == "metrics.jsonl":
            open_metrics = Metrics.__init__

            def on_full_disk(metrics, *arguments):
                open_metrics(metrics, *arguments)
                metrics.path = Path("/dev/full")

            patch.setattr(Metrics, "__init__", on_full_disk)
        else:
            (out / f"{name}.tmp").symlink_to("/dev/full")
        assert call(patch, *SHORT, "--out", out) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "No space left on device: '" in errors
    assert f"; to continue: python train.py --resume {out}\n" in errors
    assert not list(out.glob("*.tmp"))
    assert call(monkeypatch, "--resume", out) == 0
    assert_finished(out, whole)


@needs_dev_full
def test_a_full_disk_at_the_first_and_the_last_file(whole, tmp_path, monkeypatch, capsys):
    for name in ("first", "last"):
        (tmp_path / name).mkdir()
    (tmp_path / "first" / "config.json.tmp").symlink_to("/dev/full")
    assert call(monkeypatch, *SHORT, "--out", tmp_path / "first") == 2
    said = f"train.py: --out: cannot write to {tmp_path / 'first' / 'config.json'}: No space left on device\n"
    assert capsys.readouterr().err == said
    (tmp_path / "last" / "masks.png.tmp").symlink_to("/dev/full")
    assert call(monkeypatch, *SHORT, "--out", tmp_path / "last") == 0
    assert "masks.png is not drawn (OSError: [Errno 28] No space left on device" in capsys.readouterr().err
    assert call(monkeypatch, "--resume", tmp_path / "last") == 0
    assert_finished(tmp_path / "last", whole)


@pytest.mark.long
@needs_dev_full
@pytest.mark.parametrize("name", ["summary.md", "summary.json", "seed1/config.json"])
def test_a_full_disk_in_several_runs(name, tmp_path, monkeypatch, capsys):
    file = tmp_path / f"{name}.tmp"
    file.parent.mkdir(exist_ok=True)
    file.symlink_to("/dev/full")
    assert call(monkeypatch, *SHORT, "--seeds", 2, "--out", tmp_path) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert f"; to continue: python train.py --resume {tmp_path}\n" in errors
    assert call(monkeypatch, "--resume", tmp_path) == 0
    assert "mean ± std over 2 trainings" in capsys.readouterr().out
    assert (tmp_path / "summary.md").exists()
    assert not list(tmp_path.glob("**/*.tmp"))
