"""`train.py` where its surroundings fail: no output, no room on the disk, odd names, damaged files, busy cores."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_train import PLAIN, ROOT, SCORE, Killed, call

import train
from data import DATASETS

#: A short run: what comes after training is as in a long one.
SHORT = [*PLAIN, "--steps", "2", "--eval-draws", "1"]
#: What a file's name may be on Linux, and no UTF-8.
NAME = "caf\udce9"
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is always full")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run whose surroundings are in order."""
    out = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, *SHORT, "--out", out) == 0
    return out


@pytest.fixture
def unfinished(whole, tmp_path):
    """The same run, killed before it left its scores."""
    run = tmp_path / "unfinished"
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    return run


@pytest.fixture
def scenes(tmp_path):
    """A file of as many scenes as the run takes."""
    image, labels = DATASETS["tetrominoes"].generator(46).batch(torch.arange(46))
    masks = torch.stack([labels == k for k in range(4)], 1)
    path = tmp_path / f"{NAME}.npz"
    np.savez(path, image=image.permute(0, 2, 3, 1).numpy(), mask=masks.numpy())
    return path


def start(command, **environment):
    """A shell command, with `train` for the program."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        ["bash", "-c", command.replace("train", f"exec {sys.executable} train.py", 1)],
        cwd=ROOT, env=environment, capture_output=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def assert_finished(run, whole):
    """All is there that the run leaves whose surroundings are in order, and nothing half written."""
    assert "ari" in json.loads((run / "summary.json").read_text())["before"]
    assert (run / "before.safetensors").read_bytes() == (whole / "before.safetensors").read_bytes()
    assert (run / "masks.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.glob("*.tmp"))


# ------------------------------------------------------------------------------------- printing and drawing


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_that_has_not_all_characters(encoding, whole, tmp_path, monkeypatch):
    printed = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", printed)
    assert call(monkeypatch, *SHORT, "--out", tmp_path / NAME) == 0
    assert_finished(tmp_path / NAME, whole)
    text = printed.buffer.getvalue().decode(encoding)
    assert "\\xb1" in text if encoding == "ascii" else "±" in text
    assert "caf\\udce9/summary.json" in text


def test_ascii_and_no_such_backend_and_a_name_that_is_no_utf8(whole, tmp_path):
    out = os.fsencode(tmp_path).decode() + "/$'caf\\xe9'"
    code, printed, errors = start(f"train {' '.join(SHORT)} --out {out}", PYTHONIOENCODING="ascii", MPLBACKEND="module")
    assert code == 0, errors
    assert "warning" not in errors
    assert "Scores on 6 unseen scenes" in printed
    assert_finished(tmp_path / NAME, whole)


def test_nothing_open_to_print_to(whole, tmp_path):
    code, _, _ = start(f"train {' '.join(SHORT)} --out {tmp_path / 'run'} >&- 2>&-")
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
        patch.setattr(train, "say", fail)
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
        patch.setattr(train, "draw_masks", fail)
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


# ------------------------------------------------------------------------------------- names that are no UTF-8


def test_scenes_and_weights_whose_names_are_no_utf8(scenes, tmp_path, monkeypatch, capsys):
    run = tmp_path / f"run-{NAME}"
    assert call(monkeypatch, *SHORT, "--data", scenes, "--out", run) == 0
    (run / "summary.json").unlink()
    assert call(monkeypatch, "--resume", run) == 0
    weights = (run / "before.safetensors").rename(run / f"{NAME}.safetensors")
    assert call(monkeypatch, *SCORE, weights, "--data", scenes, "--out", tmp_path / f"scores-{NAME}") == 0
    assert "from number 40 on" in capsys.readouterr().out, "it knows that it has seen the first 40 of this file"
    assert call(monkeypatch, *SHORT, "--from", weights, "--seeds", 2, "--out", tmp_path / "both") == 0
    assert "caf\\udce9, 2 more steps" in (tmp_path / "both" / "summary.md").read_text()


def test_the_command_to_resume_can_be_pasted_whatever_the_name(tmp_path):
    for name in ("plain", "two words", "it's", NAME, f"\\ '{NAME} ü\n"):
        echoed = subprocess.run(["bash", "-c", f"printf %s {train.quoted(name)}"], capture_output=True).stdout
        assert os.fsdecode(echoed) == name
        assert train.quoted(name).isprintable() or name.isprintable() or "\n" in name


# ------------------------------------------------------------------------------------- a full disk


@needs_dev_full
@pytest.mark.parametrize("name", ["checkpoint.pt", "before.safetensors", "summary.json", "metrics.jsonl"])
def test_a_full_disk_ends_in_a_line_that_says_how_to_go_on(name, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    out.mkdir()
    with monkeypatch.context() as patch:
        if name == "metrics.jsonl":
            open_metrics = train.Metrics.__init__

            def on_full_disk(metrics, *arguments):
                open_metrics(metrics, *arguments)
                metrics.path = Path("/dev/full")

            patch.setattr(train.Metrics, "__init__", on_full_disk)
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


def test_no_room_for_scores_is_told_before_scoring(whole, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(train, "evaluate", None)
    assert call(monkeypatch, *SCORE, whole / "before.safetensors", "--out", tmp_path / "file") == 2
    assert "--out: cannot write to" in capsys.readouterr().err


@needs_dev_full
def test_scores_that_cannot_be_kept_are_printed(whole, tmp_path, monkeypatch, capsys):
    (tmp_path / "scores.json.tmp").symlink_to("/dev/full")
    assert call(monkeypatch, *SCORE, whole / "before.safetensors", "--out", tmp_path) == 2
    printed = capsys.readouterr()
    assert "No space left on device" in printed.err
    assert "Scores on 6 scenes" in printed.out
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- other folders, damaged files


@pytest.mark.parametrize("moved", [False, True], ids=["from another folder", "with all of it moved"])
def test_relative_names_are_found_again(moved, scenes, whole, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    shutil.move(scenes, first / "scenes.npz")
    shutil.copy(whole / "before.safetensors", first / "start.safetensors")
    monkeypatch.chdir(first)
    assert call(monkeypatch, *SHORT, "--data", "scenes.npz", "--from", "start.safetensors", "--out", "run") == 0
    Path("run", "summary.json").unlink()
    if moved:
        first.rename(second)
    else:
        second.mkdir()
    monkeypatch.chdir(second)
    assert call(monkeypatch, "--resume", "run" if moved else "../first/run") == 0


def test_damaged_lines_of_the_log_are_left_out(unfinished, monkeypatch, capsys):
    log = unfinished / "metrics.jsonl"
    lines = log.read_bytes().splitlines(True)
    assert len(lines) == 2
    log.write_bytes(b"".join([lines[0], b'{"step": 1, "l\n', b"\xff\xfe\n", b"null\n", b"{}\n", *lines[1:], b'{"st']))
    assert call(monkeypatch, "--resume", unfinished) == 0
    assert capsys.readouterr().err == f"train.py: warning: {log}: damaged lines are left out\n"
    assert log.read_bytes().splitlines(True) == lines


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


def test_damaged_scores_of_one_of_several_runs(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, *SHORT, "--seeds", 2, "--out", tmp_path) == 0
    (tmp_path / "summary.json").unlink()
    (tmp_path / "seed0" / "summary.json").write_text('{"before": {"ar')
    assert call(monkeypatch, "--resume", tmp_path) == 2
    assert "seed0/summary.json is damaged: delete it" in capsys.readouterr().err
    (tmp_path / "seed0" / "summary.json").unlink()
    assert call(monkeypatch, "--resume", tmp_path) == 0


# ------------------------------------------------------------------------------------- equal runs, equal files


def test_equal_runs_leave_equal_files(whole, tmp_path, monkeypatch):
    assert call(monkeypatch, *SHORT, "--out", tmp_path / "again") == 0
    for name in ("before.safetensors", "masks.png"):
        assert (whole / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    layer = torch.nn.Linear(1, 1)
    for number in range(10):
        train.save_weights(tmp_path / f"{number}.safetensors", layer, train.Config(), {"ari": 0.5})
    assert len({file.read_bytes() for file in tmp_path.glob("*.safetensors")}) == 1


def test_what_weights_carry_in_the_form_of_earlier_versions(whole, tmp_path, monkeypatch, capsys):
    tensors, carried = train.read_weights(whole / "before.safetensors")
    old = {"architecture": json.dumps(carried["architecture"]), "scores": json.dumps(carried["scores"])}
    old |= {"num_scenes": str(carried["num_scenes"]), "dataset": carried["dataset"], "data": "", "format": "pt"}
    save_file(tensors, tmp_path / "before.safetensors", old)
    printed = []
    for weights in (whole / "before.safetensors", tmp_path / "before.safetensors"):
        assert call(monkeypatch, *SCORE, weights) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "from number 40 on" in printed[0]


# ------------------------------------------------------------------------------------- busy cores


@pytest.mark.parametrize(("share", "told"), [(0.5, True), (0.2, False)])
def test_cores_that_others_have_are_told_once(share, told, monkeypatch, capsys):
    now = [0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train, "waited", lambda: share * 2 * now[0])
    monkeypatch.setattr(train.torch, "get_num_threads", lambda: 2)
    cores = train.Cores()
    for now[0] in range(40):
        cores.look(Path("runs/x"))
    errors = capsys.readouterr().err
    assert errors.count("\n") == told
    if told:
        assert "keep its 2 threads from a core for 50% of the time" in errors
        assert f"OMP_NUM_THREADS=1 {train.resume_command(Path('runs/x'))}\n" in errors


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not tell")
def test_how_long_threads_waited_for_a_core():
    """Two programs on one core: of two seconds this one waits for about one."""
    code = """
import os, subprocess, sys, time
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
import train
other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
before, end = train.waited(), time.monotonic() + 2
while time.monotonic() < end:
    pass
other.kill()
print(train.waited() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert 0.4 < float(done.stdout) < 3, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch comes with libgomp on Linux alone")
@pytest.mark.parametrize("policy", [None, "passive"])
def test_openmp_is_told_how_to_wait_before_it_is_loaded(policy):
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= {"OMP_DISPLAY_ENV": "verbose"} | ({"OMP_WAIT_POLICY": policy} if policy else {})
    done = subprocess.run([sys.executable, "-c", "import train"], cwd=ROOT, env=environment, capture_output=True)
    assert (b"GOMP_SPINCOUNT = '10000'" in done.stderr) == (policy is None)
