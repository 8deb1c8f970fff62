"""Checkpoints that are no good are refused."""

import os
import pickle

import torch
from commands import call


def test_a_checkpoint_of_another_version_is_refused(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "old"
    out.mkdir()
    (out / "config.json").write_bytes((finished / "config.json").read_bytes())
    for state in (
        {"step": 3},
        torch.load(finished / "checkpoint.pt", weights_only=True) | {"optimizer": {"state": {}}},
    ):
        torch.save(state, out / "checkpoint.pt")
        assert call(monkeypatch, "--resume", out) == 2
        assert "another version of train.py" in capsys.readouterr().err


def test_a_checkpoint_from_a_stranger_cannot_run_code(finished, tmp_path, monkeypatch, capsys):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text((finished / "config.json").read_text())
    torch.save({"model": Attack()}, run / "checkpoint.pt")
    assert call(monkeypatch, "--resume", run) == 2
    (run / "checkpoint.pt").write_bytes(pickle.dumps(Attack(), protocol=2))
    assert call(monkeypatch, "--resume", run) == 2
    assert "is not a checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "attacked").exists()


def test_a_checkpoint_damaged_in_any_way_is_refused(unfinished, monkeypatch, capsys):
    checkpoint = unfinished / "checkpoint.pt"
    content = checkpoint.read_bytes()
    torch.save(torch.zeros(2), checkpoint)
    tensor = checkpoint.read_bytes()
    pickled = content.index(b"data.pkl") + 100
    damaged = [content[: len(content) // 2], content[:pickled] + bytes(50) + content[pickled + 50 :], b"", b"x" * 999]
    for wrong in (tensor, *damaged):
        checkpoint.write_bytes(wrong)
        assert call(monkeypatch, "--resume", unfinished) == 2
        assert str(checkpoint) in capsys.readouterr().err
