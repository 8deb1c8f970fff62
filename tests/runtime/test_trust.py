"""The rule of whom to trust: what another user than root and this one could have written is not loaded."""

from __future__ import annotations

import grp
import os
import pwd
from pathlib import Path
from types import SimpleNamespace

import pytest

from iio_kernels.runtime import build, trust
from iio_kernels.runtime.build import cache
from iio_kernels.runtime.trust import open_to_others

USER, OTHER = 12345, 12346

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.mark.parametrize(
    ("where", "owner", "mode", "reason"),
    [
        ("file", 0, 0o644, None),
        ("file", USER, 0o444, f"belongs to user {USER}"),
        ("file", 0, 0o646, "can be written by everyone"),
        ("file", 0, 0o664, "can be written by group 0"),
        ("file", 0, 0o1646, "can be written by everyone"),  # a sticky file means nothing
        ("folder", 0, 0o555, None),
        ("folder", USER, 0o555, f"belongs to user {USER}"),
        ("folder", 0, 0o757, "can be written by everyone"),
        ("folder", 0, 0o775, "can be written by group 0"),
        ("folder", 0, 0o1777, None),
        ("folder", USER, 0o1777, f"belongs to user {USER}"),
        ("above", USER, 0o755, f"belongs to user {USER}"),
        ("above", 0, 0o777, "can be written by everyone"),
        ("above", 0, 0o1777, None),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_who_can_change_a_file(tmp_path, where, owner, mode, reason, exists):
    above = tmp_path / "above"
    paths = {"above": above, "folder": above / "folder", "file": above / "folder" / "file"}
    paths["folder"].mkdir(parents=True)
    paths["file"].touch()
    os.chown(paths[where], owner, owner)
    paths[where].chmod(mode)
    assert open_to_others(paths["file"]) == (reason and f"{paths[where]} {reason}")
    if not exists and where != "file":
        paths["file"].unlink()
        assert open_to_others(paths["file"]) == (reason and f"{paths[where]} {reason}")


def test_links_are_followed_to_what_they_lead_to(tmp_path, monkeypatch):
    for name, mode in (("safe", 0o755), ("open", 0o777)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    (tmp_path / "safe" / "link").symlink_to(tmp_path / "open")
    monkeypatch.setenv("IIO_KERNELS_CACHE", str(tmp_path / "safe" / "link"))
    assert build.cache_folders()[0] == tmp_path / "open"
    assert cache.trusted(build.cache_folders()[0]) is None
    (tmp_path / "open" / "cpu-1.so").touch()
    (tmp_path / "safe" / "cpu-1.so").symlink_to(tmp_path / "open" / "cpu-1.so")
    assert cache.trusted(tmp_path / "safe" / "cpu-1.so") is None


@pytest.mark.parametrize(
    ("folder_owner", "mode", "link_owner", "trust", "loaded"),
    [
        (0, 0o755, 0, "", True),
        (OTHER, 0o777, OTHER, "", False),
        (OTHER, 0o777, 0, "", False),
        (0, 0o1777, 0, "", True),
        (0, 0o1777, OTHER, "", False),  # who cannot write the file, but chooses it
        (OTHER, 0o777, OTHER, "1", True),
    ],
)
def test_a_link_in_a_cache_is_judged_with_its_folder(
    tmp_path, monkeypatch, folder_owner, mode, link_owner, trust, loaded
):
    """Though it leads to a file of root's. What is loaded is that file: the link may lead elsewhere by then."""
    file, folder = tmp_path / "file", tmp_path / "cache"
    file.write_text("of root")
    folder.mkdir()
    link = folder / f"cpu-1-{cache.content_hash(file)}.so"
    link.symlink_to(file)
    os.chown(link, link_owner, link_owner, follow_symlinks=False)
    os.chown(folder, folder_owner, folder_owner)
    folder.chmod(mode)
    monkeypatch.setenv("IIO_KERNELS_CACHE", str(folder))
    monkeypatch.setenv("IIO_KERNELS_TRUST_CACHE", trust)
    assert cache.cached(folder, "cpu-1") == (file if loaded else None)


OUTSIDE = 65534


@pytest.mark.parametrize(
    ("owners", "outside", "stranger"),
    [
        # The owners of /, /a, /a/b and /a/b/c as far as they exist.
        ([OUTSIDE, OUTSIDE, USER, USER], OUTSIDE, None),
        ([OUTSIDE, OUTSIDE, 0, USER], OUTSIDE, None),
        ([USER, OUTSIDE, USER, USER], OUTSIDE, None),  # a sandbox made of folders from outside
        ([OUTSIDE, OUTSIDE], OUTSIDE, None),  # what is to be made will be one's own
        ([OUTSIDE, OUTSIDE, OUTSIDE, OUTSIDE], OUTSIDE, "/a/b/c"),
        ([OUTSIDE, OUTSIDE, USER, OUTSIDE], OUTSIDE, "/a/b/c"),
        ([0, OUTSIDE, USER, USER], OUTSIDE, "/a"),  # root is inside, so it is another's
        ([OUTSIDE, OTHER, USER, USER], OUTSIDE, "/a"),
        ([OUTSIDE, OUTSIDE, USER, USER], None, "/a"),  # a user of that id
    ],
)
def test_folders_of_users_outside_of_a_user_namespace(monkeypatch, owners, outside, stranger):
    path = Path("/a/b/c")
    uids = dict(zip([*reversed(path.parents), path], owners, strict=False))

    def lstat(part):
        if part not in uids:
            raise FileNotFoundError
        return SimpleNamespace(st_uid=uids[part], st_gid=0, st_mode=0o40755)

    monkeypatch.setattr(Path, "lstat", lstat)
    monkeypatch.setattr(os, "geteuid", lambda: USER)
    monkeypatch.setattr(trust, "_id_of_users_outside", lambda: outside)
    reason = open_to_others(path)
    assert reason == (stranger and f"{stranger} belongs to user {uids[Path(stranger)]}")


@pytest.mark.parametrize(
    ("uid_map", "outside"),
    [
        ("         0          0 4294967295\n", None),  # as without namespaces
        ("0 12345 1\n", OUTSIDE),
        ("12345 12345 1\n", OUTSIDE),
        ("0 1000 1\n1 100000 65536\n", None),
        ("0 1000 1\n1 100000 65533\n", OUTSIDE),
        ("", OUTSIDE),
        (None, None),
    ],
)
def test_the_id_of_users_outside_of_a_user_namespace(monkeypatch, uid_map, outside):
    files = {"/proc/sys/kernel/overflowuid": f"{OUTSIDE}\n", "/proc/self/uid_map": uid_map}

    def read_text(path):
        if files[str(path)] is None:
            raise FileNotFoundError
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert trust._id_of_users_outside() == outside


@pytest.mark.parametrize(
    ("name", "members", "bobs_group", "trusted"),
    [
        ("ann", [], OTHER, True),
        ("ann", ["ann"], OTHER, True),
        ("ann", ["ann", "bob"], OTHER, False),
        ("ann", [], USER, False),  # it is bob's first group: he is not among its members
        ("users", [], OTHER, False),
    ],
)
def test_a_group_of_ones_own_may_write(tmp_path, monkeypatch, name, members, bobs_group, trusted):
    """As where everyone has a group, and the umask is 002."""
    ann = SimpleNamespace(pw_uid=USER, pw_gid=USER, pw_name="ann")
    bob = SimpleNamespace(pw_uid=OTHER, pw_gid=bobs_group, pw_name="bob")
    monkeypatch.setattr(pwd, "getpwuid", lambda _: ann)
    monkeypatch.setattr(pwd, "getpwall", lambda: [ann, bob])
    monkeypatch.setattr(grp, "getgrgid", lambda group: SimpleNamespace(gr_gid=group, gr_name=name, gr_mem=members))
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", 0, USER)
    (tmp_path / "cache").chmod(0o775)
    assert (open_to_others(tmp_path / "cache") is None) == trusted
