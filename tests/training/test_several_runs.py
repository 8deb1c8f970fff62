"""Several seeds, and table 1 of the IIO paper."""

import json
import re
import signal

import pytest
from commands import SHORT, TINY, assert_same_tensors, assert_same_weights, call

from training.run import Run
from training.signals import Interrupted


@pytest.mark.long
def test_several_seeds_resume_and_are_summed_up(finished, tmp_path, monkeypatch, capsys):
    out, train_phase = tmp_path / "both", Run.train_phase

    def interrupted(run, phase):
        if run.config.seed == 1 and phase == "fine-tuning":
            raise Interrupted(signal.SIGTERM)
        train_phase(run, phase)

    monkeypatch.setattr(Run, "train_phase", interrupted)
    assert call(monkeypatch, *TINY, "--seeds", 2, "--out", out) == 128 + signal.SIGTERM
    assert f"--resume {out}" in capsys.readouterr().err
    assert call(monkeypatch, *TINY, "--seeds", 2, "--out", out) == 2
    assert "holds an unfinished run" in capsys.readouterr().err
    monkeypatch.setattr(Run, "train_phase", train_phase)
    assert call(monkeypatch, "--resume", out) == 0
    printed = capsys.readouterr().out
    assert "seed0" not in printed, "the first is finished"
    assert_same_weights(finished, out / "seed0")
    runs = [json.loads((out / f"seed{seed}" / "summary.json").read_text()) for seed in (0, 1)]
    assert runs[0]["before"] != runs[1]["before"]
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert [name.strip() for name in rows] == ["Slot Attention, 8 steps", "+ IIO, 5 steps"]
    for row, key in zip(rows.values(), ("before", "after"), strict=True):
        a, b = (run[key]["ari"] for run in runs)
        assert row["ari_each"] == [a, b]
        assert row["ari"] == pytest.approx((a + b) / 2)
        assert row["ari_std"] == pytest.approx(abs(a - b) / 2**0.5)
        assert f"{100 * row['ari']:.2f} ± {100 * row['ari_std']:.2f}" in printed
    assert (out / "summary.md").read_text().count("\n| ") == 3
    assert call(monkeypatch, *TINY, "--seeds", 2, "--out", out) == 2
    assert "holds a finished run" in capsys.readouterr().err


@pytest.mark.long
def test_table_1_compares_what_the_paper_does(tmp_path, monkeypatch):
    out = tmp_path / "table"
    assert call(monkeypatch, *TINY, "--table1", "--out", out) == 0
    rows = json.loads((out / "summary.json").read_text())["rows"]
    short = "Slot Attention, 8 steps"
    longer = [f"{short} + reconstruction, 5 steps", f"{short} + IIO, 5 steps"]
    assert list(rows) == [short, "Slot Attention, 32 steps", *longer]
    assert all(row["ari_std"] > 0 for row in rows.values()), "of one training, that over draws"
    # What is fine-tuned is what was pre-trained as long: the same as one run of both phases.
    assert call(monkeypatch, *TINY, "--out", tmp_path / "one") == 0
    assert_same_tensors(out / "seed0-plain" / "step-8.safetensors", tmp_path / "one" / "before.safetensors")
    runs = ("plain", "iio", "reconstruction")
    plain, tuned, longer = (json.loads((out / f"seed0-{run}" / "summary.json").read_text()) for run in runs)
    assert plain["step-8"] == tuned["before"] == longer["before"]
    # The baseline takes the same steps, of the same scenes at the same rates, on another loss.
    logs = [
        [json.loads(line) for line in (out / f"seed0-{run}" / "metrics.jsonl").read_text().splitlines()]
        for run in runs[1:]
    ]
    steps, longer_steps = ([(line["step"], line["lr"]) for line in log if "lr" in line] for log in logs)
    assert steps == longer_steps
    assert steps[-1][0] == 5
    assert [("iio" in line) for log in logs for line in log if "lr" in line] == [True] * 3 + [False] * 3
    assert len({line["gradient_norm"] for log in logs for line in log if line.get("step") == 2}) == 2


@pytest.mark.long
def test_table_1_without_its_longest_row(tmp_path, monkeypatch):
    out = tmp_path / "table"
    assert call(monkeypatch, *TINY, "--table1", "--no-long-row", "--seeds", 2, "--out", out) == 0
    rows = json.loads((out / "summary.json").read_text())["rows"]
    short = "Slot Attention, 8 steps"
    assert list(rows) == [short, f"{short} + reconstruction, 5 steps", f"{short} + IIO, 5 steps"]
    assert all(len(row["ari_each"]) == 2 for row in rows.values())


@pytest.mark.long
def test_a_signal_while_a_run_is_scored_stops_the_next(tmp_path, monkeypatch, capsys):
    out, score = tmp_path / "both", Run.score

    def signal_then_score(run, key, *arguments):
        if key == "after":
            signal.raise_signal(signal.SIGTERM)
        score(run, key, *arguments)

    monkeypatch.setattr(Run, "score", signal_then_score)
    assert call(monkeypatch, *TINY, "--seeds", 2, "--out", out) == 128 + signal.SIGTERM
    assert (out / "seed0" / "summary.json").exists(), "what was done is kept"
    assert not (out / "seed1").exists()


@pytest.mark.parametrize(
    "options",
    [["--score-steps", "1"], ["--from", "x.safetensors"], ["--steps", "0"]],
    ids=" ".join,
)
def test_table_1_refuses_what_would_make_it_another(tmp_path, monkeypatch, capsys, options):
    assert call(monkeypatch, *TINY, "--table1", *options, "--out", tmp_path / "run") == 2
    assert re.search("--table1 (takes|pre-trains)", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_damaged_scores_of_one_of_several_runs(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, *SHORT, "--seeds", 2, "--out", tmp_path) == 0
    (tmp_path / "summary.json").unlink()
    (tmp_path / "seed0" / "summary.json").write_text('{"before": {"ar')
    assert call(monkeypatch, "--resume", tmp_path) == 2
    assert "seed0/summary.json is damaged: delete it" in capsys.readouterr().err
    (tmp_path / "seed0" / "summary.json").unlink()
    assert call(monkeypatch, "--resume", tmp_path) == 0
