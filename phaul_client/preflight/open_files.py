"""Reads the descriptors of a process. Two or three system calls for a pipe or socket, six for a file."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from phaul_client.preflight.epoll import is_of_parent, watched_but_closed
from phaul_client.preflight.limits import count_entries
from phaul_client.preflight.model import FileKind, OpenFile
from phaul_client.preflight.proc_files import GONE, tail_digest, try_stat, try_text
from phaul_client.preflight.proc_text import parse_fields, parse_locks, strip_deleted
from phaul_client.tree import shares_namespace

_WATCHERS: Final = frozenset({"anon_inode:inotify", "anon_inode:[eventpoll]"})
_OWNER_READ, _OWNER_WRITE = stat.S_IRUSR, stat.S_IWUSR
_PTMX: Final = os.makedev(5, 2)
_NAMED: Final = frozenset({FileKind.REGULAR, FileKind.DIRECTORY, FileKind.CHARACTER_DEVICE, FileKind.FIFO})
_KINDS: Final = {
    stat.S_IFREG: FileKind.REGULAR,
    stat.S_IFDIR: FileKind.DIRECTORY,
    stat.S_IFCHR: FileKind.CHARACTER_DEVICE,
    stat.S_IFBLK: FileKind.BLOCK_DEVICE,
    stat.S_IFIFO: FileKind.FIFO,
    stat.S_IFSOCK: FileKind.SOCKET,
    stat.S_IFLNK: FileKind.SYMBOLIC_LINK,
}


def read_open_files(pid: int) -> Iterator[OpenFile]:
    """Every descriptor of the process; none if it is gone."""
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except GONE:
        return
    descriptors = [int(name) for name in names]
    for fd in descriptors:
        with contextlib.suppress(*GONE):  # closed meanwhile
            file = _read(pid, fd, f"{directory}/{fd}")
            if file.path == "anon_inode:[eventpoll]":
                file = replace(file, watches_closed=watched_but_closed(pid, fd, descriptors))
            yield file


def _read(pid: int, fd: int, link: str) -> OpenFile:
    target = os.readlink(link)
    permissions = os.lstat(link).st_mode
    readable, writable = bool(permissions & _OWNER_READ), bool(permissions & _OWNER_WRITE)
    scheme, colon, rest = target.partition(":[")
    if colon and scheme in ("socket", "pipe") and not target.startswith("/"):
        kind = FileKind.SOCKET if scheme == "socket" else FileKind.PIPE
        inode = int(rest.rstrip("]"))
        return OpenFile(
            pid=pid,
            fd=fd,
            kind=kind,
            path=target,
            readable=readable,
            writable=writable,
            inode=inode,
            packets=kind is FileKind.PIPE and _in_packets(pid, fd),
        )
    return _read_file(pid, fd, link, target, readable, writable)


def _read_file(pid: int, fd: int, link: str, target: str, readable: bool, writable: bool) -> OpenFile:
    status = os.stat(link)
    fdinfo = try_text(f"/proc/{pid}/fdinfo/{fd}")
    fields = parse_fields(fdinfo)
    path, deleted = strip_deleted(target)
    kind = _kind(status.st_mode, target)
    locks = parse_locks(fdinfo) if "lock:" in fdinfo else ()
    may_grow = kind is FileKind.REGULAR and writable and not deleted and status.st_size > 0
    may_grow &= not any(each.startswith("LEASE") for each in locks)  # to open it would break the lease
    return OpenFile(
        pid=pid,
        fd=fd,
        kind=kind,
        path=path,
        deleted=deleted,
        readable=readable,
        writable=writable,
        mode=status.st_mode,
        inode=status.st_ino,
        device_number=status.st_rdev,
        size_bytes=status.st_size,
        allocated_bytes=status.st_blocks * 512,
        links=status.st_nlink,
        mount_id=int(fields.get("mnt_id", "0")) or None,
        reachable=_reachable(pid, path, status) if path.startswith("/") and kind in _NAMED else None,
        locks=locks,
        tail_sha256=tail_digest(link, status.st_size) if may_grow else None,
        target_pid=int(fields["Pid"]) if "pidfd" in target and "Pid" in fields else None,
        entries=count_entries(fdinfo) if path in _WATCHERS and not is_of_parent(pid, fd) else -1,
        terminal_index=int(fields["tty-index"]) if status.st_rdev == _PTMX and "tty-index" in fields else None,
    )


def _in_packets(pid: int, fd: int) -> bool:
    return bool(int(parse_fields(try_text(f"/proc/{pid}/fdinfo/{fd}")).get("flags", "0"), 8) & os.O_DIRECT)


def _kind(mode: int, target: str) -> FileKind:
    if target.startswith("/memfd:"):
        return FileKind.MEMFD
    if target.startswith(("anon_inode:", "pidfd:", "/secretmem")):
        return FileKind.ANONYMOUS
    if not target.startswith("/") and ":[" in target:
        return FileKind.NAMESPACE
    return _KINDS.get(stat.S_IFMT(mode), FileKind.OTHER)


def _reachable(pid: int, path: str, status: os.stat_result) -> bool:
    """Whether it is found by its name, which begins at the root of the mounts: a process may have another (chroot)."""
    if _is_at(f"/proc/{pid}/root{path}", status):
        return True
    with contextlib.suppress(OSError):
        return shares_namespace(pid, "mnt") and _is_at(path, status)
    return False


def _is_at(path: str, status: os.stat_result) -> bool:
    found = try_stat(path)
    return found is not None and (found.st_ino, found.st_dev) == (status.st_ino, status.st_dev)
