"""Whose files may be loaded: a library runs with all that its user may do, so no other user's is.

A file is trusted that only root and this user can have written. It and every folder above it belong to one of the two,
and neither group nor others may write them. In a folder with the sticky bit, such as /tmp, others may write: they
cannot rename or remove what is not theirs. A symbolic link has no mode: its owner and folders count, and what it leads
to is judged for itself. Access control lists are not looked at.

Unprivileged containers and `unshare -Ur` make a user namespace without the system's root. In it the files of root, and
of every other user outside, show one user id: the overflow id. A folder with this id is taken for root's if it lies
above what is judged. It is not if a folder above it has user id 0: root is then inside. A library with this id, or a
cache folder, is another user's.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def open_to_others(path: Path) -> str | None:
    """How a user other than root and this one could have written a file or folder or put another in its place.

    None where nobody could. What is not there yet, or out of this user's reach, is judged by the folders above it.

    Args:
        path: absolute, and its folders without symbolic links, as `os.path.realpath` makes them. A link is judged
            itself, not what it leads to.
    """
    for part in (path, *path.parents):
        try:
            status = part.lstat()
        except OSError:
            continue
        if status.st_uid not in (0, os.geteuid()) and (part == path or not _is_taken_for_roots(part)):
            return f"{part} belongs to user {status.st_uid}"
        if part == path and stat.S_ISLNK(status.st_mode):
            continue
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_mode & stat.S_IWOTH and not sticky:
            return f"{part} can be written by everyone"
        if status.st_mode & stat.S_IWGRP and not sticky and not _has_no_other_member(status.st_gid):
            return f"{part} can be written by group {status.st_gid}"
    return None


def _is_taken_for_roots(folder: Path) -> bool:
    """Whether a folder belongs to a user outside of this user namespace, and root is there, not inside."""
    if folder.lstat().st_uid != _id_of_users_outside():
        return False
    return all(above.lstat().st_uid != 0 for above in folder.parents)


def _id_of_users_outside() -> int | None:
    """The user id that Linux shows of those outside of this user namespace; None where a user inside has it too."""
    try:
        overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
        lines = Path("/proc/self/uid_map").read_text().splitlines()
    except OSError:  # not Linux
        return None
    ranges = [[int(number) for number in line.split()] for line in lines]
    is_inside = any(first <= overflow < first + count for first, _, count in ranges)
    return None if is_inside else overflow


def _has_no_other_member(group: int) -> bool:
    """Whether a group is this user's own, as Linux makes one for each: called like the user, and without others.

    Others are its members, and those whose first group it is, which no list of members tells. Only those are known that
    the system lists: some directories of users (LDAP) do not. Where such groups are in use people let them write all
    that they make. Root has none.
    """
    import grp
    import pwd

    try:
        user, own = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    is_own = user.pw_uid != 0 and (user.pw_gid, user.pw_name) == (own.gr_gid, own.gr_name)
    if not is_own or not set(own.gr_mem) <= {user.pw_name}:
        return False
    return all(other.pw_uid == user.pw_uid for other in pwd.getpwall() if other.pw_gid == group)
