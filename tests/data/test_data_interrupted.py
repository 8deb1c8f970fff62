"""A conversion that is interrupted, killed or overtaken leaves nothing behind but what the next one goes on from."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from written_files import generated, refuse, same, write

from data import (
    blocks,
    cache,
    conversion,
    load,
)

ROOT = Path(__file__).parents[2]

RUN = f"import sys, os, signal; sys.path.insert(0, {str(ROOT)!r}); from data import conversion, load; "
LOAD = "print(len(load(sys.argv[1], progress=False)))"


@pytest.mark.long
def test_processes_at_the_same_time(path):
    """One converts, and the others wait for what it makes."""
    write(path, 600)
    tell = "convert = conversion.convert; conversion.convert = lambda *a: print('converts') or convert(*a); "
    command = [sys.executable, "-c", RUN + tell + LOAD, str(path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = [process.communicate()[0].split() for process in started]
    assert sorted(printed, key=len) == [["600"], ["600"], ["converts", "600"]]
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.long
def test_waiting_for_a_process_that_is_killed(path):
    """Its place is taken, and what it had converted kept."""
    write(path, 600)
    slow = "import time; labels = conversion._labels; "
    slow += (
        "conversion._labels = lambda *a: labels(*a) if a[1] < 512 else print('half', flush=True) or time.sleep(600); "
    )
    first = subprocess.Popen([sys.executable, "-c", RUN + slow + LOAD, str(path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "half\n"
    tell = "labels = conversion._labels; conversion._labels = lambda mask, *a: print(len(mask)) or labels(mask, *a); "
    second = subprocess.Popen(
        [sys.executable, "-c", RUN + tell + LOAD, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert "another process converts these scenes; waiting for it" in second.stderr.readline()
    first.kill()
    first.communicate()
    assert second.communicate()[0].split() == ["88", "600"]
    assert len(list(path.parent.iterdir())) == 2


def test_a_lock_that_is_never_the_folders_own(tmp_path, monkeypatch):
    """As on file systems that number their files anew: no lock, and no waiting for oneself."""
    monkeypatch.setattr(cache.os.path, "samestat", lambda *_: False)
    with contextlib.ExitStack() as stack:
        assert not cache._lock(tmp_path / "part", stack)


@pytest.mark.long
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks(path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache.fcntl, "flock", flock)
    write(path)
    assert same(load(path, progress=False), 6)
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.long
def test_killed_during_the_conversion(path, monkeypatch):
    """The next process goes on with the block where it was killed."""
    write(path, 600)
    kill = "labels = conversion._labels; kill = lambda: os.kill(os.getpid(), 9); "
    kill += "conversion._labels = lambda *a: labels(*a) if a[1] < 512 else kill(); "
    process = subprocess.run([sys.executable, "-c", RUN + kill + LOAD, str(path)])
    assert process.returncode == -signal.SIGKILL
    assert not (path.parent / f"{path.name}.cache").exists()
    with (path.parent / f".{path.name}.cache.part" / "new" / "image.npy").open("ab") as file:
        file.write(b"half a block")
    done, labels = [], conversion._labels
    monkeypatch.setattr(conversion, "_labels", lambda mask, *rest: done.append(len(mask)) or labels(mask, *rest))
    assert same(load(path, progress=False, verify=True), 600)
    assert done == [88]
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.parametrize("kind", ["tfrecord", "npz"])
def test_interrupted_later(path, monkeypatch, kind):
    """What was interrupted goes on, unless the file changed or what is there is too short."""
    if kind == "npz":
        image, labels = generated(9)
        with path.open("wb") as file:
            np.savez(file, image=image.transpose(0, 2, 3, 1), mask=np.stack([labels == k for k in range(4)], 1))
    else:
        write(path, 9, compress=False)
    monkeypatch.setattr(blocks, "BLOCK", 4)
    labels, done = conversion._labels, []

    def interrupt(mask, first, *rest):
        if done == [0]:
            raise KeyboardInterrupt
        done.append(first)
        return labels(mask, first, *rest)

    part = path.parent / f".{path.name}.cache.part" / "new"
    for change, expected in (
        (lambda: None, [0, 4, 8]),
        (lambda: os.truncate(part / "labels.npy", 4000), [0, 0, 4, 8]),
        (lambda: os.utime(path, ns=(0, 1)), [0, 0, 4, 8]),
    ):
        monkeypatch.setattr(conversion, "_labels", interrupt)
        done.clear()
        with pytest.raises(KeyboardInterrupt):
            load(path, progress=False)
        change()
        monkeypatch.setattr(
            conversion, "_labels", lambda mask, first, *rest: done.append(first) or labels(mask, first, *rest)
        )
        assert same(load(path, progress=False), 9)
        assert done == expected
        assert len(list(path.parent.iterdir())) == 2
        cache.shutil.rmtree(path.parent / f"{path.name}.cache")


def test_interrupted(path, monkeypatch):
    write(path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "_labels", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(path, progress=False)
    assert list(path.parent.iterdir()) == [path]


def test_full_disk(path, monkeypatch):
    write(path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.GrowingArrays, "append", full)
    refuse(path, "cannot convert .*train.tfrecords .No space left on device", OSError)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("count", [1, 600])  # a small block and a large one
def test_really_full_disk(path, monkeypatch, count):
    write(path, count)
    monkeypatch.setattr(cache.GrowingArrays, "_path", lambda *_: Path("/dev/full"))
    refuse(path, "cannot convert .*train.tfrecords .No space left on device", OSError)
