"""Output that fails: no output, odd encodings, no picture."""

import io
import os
import sys
from types import ModuleType

import pytest
from commands import NAME, SHORT, Killed, assert_finished, call, needs_dev_full, shell

import training.pictures
import training.run


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_that_has_not_all_characters(encoding, whole, tmp_path, monkeypatch):
    printed = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", printed)
    assert call(monkeypatch, *SHORT, "--out", tmp_path / NAME) == 0
    assert_finished(tmp_path / NAME, whole)
    text = printed.buffer.getvalue().decode(encoding)
    assert "\\xb1" in text if encoding == "ascii" else "±" in text
    assert "caf\\udce9/summary.json" in text


@pytest.mark.long
def test_ascii_and_no_such_backend_and_a_name_that_is_no_utf8(whole, tmp_path):
    out = os.fsencode(tmp_path).decode() + "/$'caf\\xe9'"
    code, printed, errors = shell(f"train {' '.join(SHORT)} --out {out}", PYTHONIOENCODING="ascii", MPLBACKEND="module")
    assert code == 0, errors
    assert "warning" not in errors
    assert "Scores on 6 unseen scenes" in printed
    assert_finished(tmp_path / NAME, whole)


@pytest.mark.long
def test_nothing_open_to_print_to(whole, tmp_path):
    code, _, _ = shell(f"train {' '.join(SHORT)} --out {tmp_path / 'run'} >&- 2>&-")
    assert code == 0
    assert_finished(tmp_path / "run", whole)


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_one_of_both_closed(closed, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, closed, None)
    assert call(monkeypatch, *SHORT, "--out", tmp_path / "run") == 0
    getattr(sys, closed).close()
    assert_finished(tmp_path / "run", whole)
    assert ("Scores on" in capsys.readouterr().out) == (closed == "stderr")


@pytest.mark.parametrize(
    ("gone", "reason"),
    [("a reader", "Broken pipe"), pytest.param("space", "No space left on device", marks=needs_dev_full)],
)
def test_output_that_ends_does_not_end_the_run(gone, reason, whole, tmp_path, monkeypatch, capsys):
    if gone == "a reader":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open("/dev/full", os.O_WRONLY)
    with open(writing, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert call(monkeypatch, *SHORT, "--out", tmp_path / "run") == 0
    assert_finished(tmp_path / "run", whole)
    assert capsys.readouterr().err == f"train.py: warning: nothing more can be printed ({reason}); the work goes on\n"


@pytest.mark.parametrize("words", ["Scores on", "pre-training at step 2"])
def test_scores_and_weights_are_written_before_they_are_printed(words, whole, tmp_path, monkeypatch):
    def fail(said, file=None):
        if said.lstrip().startswith(words):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training.run, "say", fail)
        with pytest.raises(Killed):
            call(patch, *SHORT, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "before.safetensors").exists()
    if words == "Scores on":
        assert_finished(tmp_path / "run", whole)
    else:
        assert call(monkeypatch, "--resume", tmp_path / "run") == 0
        assert_finished(tmp_path / "run", whole)


def test_a_picture_that_cannot_be_drawn_is_a_warning_and_resume_draws_it(whole, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no fonts\nand more")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training.pictures, "draw_masks", fail)
        assert call(patch, *SHORT, "--out", run) == 0
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "masks.png is not drawn (RuntimeError: no fonts); to try again: " in printed.err
    assert "Scores on 6 unseen scenes" in printed.out
    summary = (run / "summary.json").read_bytes()
    (run / "checkpoint.pt").unlink()
    assert call(monkeypatch, "--resume", run) == 0
    assert_finished(run, whole)
    assert (run / "summary.json").read_bytes() == summary
    assert call(monkeypatch, "--resume", run) == 2
    assert "is finished" in capsys.readouterr().err


def test_a_tensorboard_that_does_not_work_is_a_warning(whole, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise TypeError("Descriptors cannot be created directly")

    broken = ModuleType("torch.utils.tensorboard")
    broken.SummaryWriter = fail
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", broken)
    assert call(monkeypatch, *SHORT, "--out", tmp_path / "run") == 0
    said = "train.py: warning: no events for TensorBoard (TypeError: Descriptors cannot be created directly)\n"
    assert capsys.readouterr().err == said
    assert_finished(tmp_path / "run", whole)
