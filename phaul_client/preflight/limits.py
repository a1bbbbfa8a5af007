"""What a tree takes up of a node's limits: those of setrlimit(2), and what inotify and epoll may watch. Blocking."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Final

from phaul_client.preflight.proc_files import try_text

#: Names of /proc/PID/limits → those of setrlimit(2).
NAMES: Final = {
    "Max cpu time": "CPU",
    "Max file size": "FSIZE",
    "Max data size": "DATA",
    "Max stack size": "STACK",
    "Max core file size": "CORE",
    "Max resident set": "RSS",
    "Max processes": "NPROC",
    "Max open files": "NOFILE",
    "Max locked memory": "MEMLOCK",
    "Max address space": "AS",
    "Max pending signals": "SIGPENDING",
    "Max msgqueue size": "MSGQUEUE",
    "Max nice priority": "NICE",
    "Max realtime priority": "RTPRIO",
    "Max realtime timeout": "RTTIME",
}
UNLIMITED: Final = (1 << 64) - 1  # RLIM64_INFINITY
_NAME_COLUMNS: Final = 26
_ENTRIES: Final = ("inotify wd:", "tfd:")
_PROBED: Final = 1024  #: instances that are made for a moment in order to see whether they may be
_IN_CLOEXEC: Final = 0o2000000
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def parse_hard(text: str) -> dict[str, int]:
    """The hard limits of /proc/PID/limits by their names of setrlimit(2); those that we do not know are left out."""
    found = {}
    for line in text.splitlines():
        values = line[_NAME_COLUMNS:].split()
        name = NAMES.get(line[:_NAME_COLUMNS].strip())
        if name is not None and len(values) > 1 and (values[1].isdecimal() or values[1] == "unlimited"):
            found[name] = UNLIMITED if values[1] == "unlimited" else int(values[1])
    return found


def hard_of(pids: Collection[int]) -> dict[str, int]:
    """The largest of each that a process of these has."""
    found: dict[str, int] = {}
    for pid in pids:
        for name, value in parse_hard(try_text(f"/proc/{pid}/limits")).items():
            found[name] = max(value, found.get(name, 0))
    return found


def count_entries(fdinfo: str) -> int:
    """How much an inotify or epoll watches."""
    return sum(line.startswith(_ENTRIES) for line in fdinfo.splitlines())


def exceeded(wanted: Mapping[str, int]) -> dict[str, int]:
    """Which of these are above ours, and ours."""
    return {name: limit for name, limit in _ours(wanted) if limit < wanted[name]}


def _ours(names: Collection[str]) -> Iterator[tuple[str, int]]:
    for name in names:
        if (number := getattr(resource, f"RLIMIT_{name}", None)) is not None:
            hard = resource.getrlimit(number)[1]
            yield name, UNLIMITED if hard == resource.RLIM_INFINITY else hard


def setting(name: str) -> int:
    """A number below /proc/sys; 0: unknown."""
    with suppress(ValueError):
        return int(try_text(f"/proc/sys/{name}") or 0)
    return 0


def has_instances(count: int) -> bool:
    """Whether so many inotify instances may be made here, by our user. They are closed at once."""
    made: list[int] = []
    try:
        for _ in range(min(count, _PROBED)):
            descriptor = _LIBC.inotify_init1(_IN_CLOEXEC)
            if descriptor < 0:
                return ctypes.get_errno() != errno.EMFILE or not _may_open()
            made.append(descriptor)
    finally:
        for descriptor in made:
            os.close(descriptor)
    return True


def _may_open() -> bool:
    """EMFILE may also mean that we have too many descriptors ourselves."""
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
