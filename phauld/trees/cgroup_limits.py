"""Limits of a whole workload, by cgroup version 2: memory, processors, processes.

With systemd they are properties of the workload's scope, without it of a cgroup that phauld makes below its own, and
that the shim's child enters before it becomes the program, or the criu that restores it. The invariant: a limit that
this node does not enforce is refused, by name and with the reason; none is ignored.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from phaul_client.errors import InvalidRequest
from phauld.trees import shim
from phauld.trees.freezer import CannotFreeze, own_cgroup
from phauld.trees.workload_spec import CgroupLimits
from phauld.whole_files import write_json

PERIOD_MICROSECONDS: Final = 100_000  #: of cpu.max, the kernel's default
SPARE_PIDS: Final = 8  #: for the shim, the init, and criu while it restores
_PREFIX: Final = "phaul-"
_REMEDY: Final = "run phauld under systemd with cgroup2, or in a cgroup of version 2 that has controllers to give"


def controls(limits: CgroupLimits) -> dict[str, str]:
    """What the kernel's files are to hold, by their names."""
    found = {}
    if limits.memory_bytes:
        found["memory.max"] = str(limits.memory_bytes - limits.memory_bytes % os.sysconf("SC_PAGE_SIZE"))
    if limits.cpu_millis:
        found["cpu.max"] = f"{limits.cpu_millis * PERIOD_MICROSECONDS // 1000} {PERIOD_MICROSECONDS}"
    if limits.pids:
        found["pids.max"] = str(limits.pids + SPARE_PIDS)
    return found


def scope_properties(limits: CgroupLimits) -> tuple[str, ...]:
    """The same for `systemd-run --property`."""
    found = []
    if limits.memory_bytes:
        found.append(f"MemoryMax={controls(limits)['memory.max']}")
    if limits.cpu_millis:
        found.append(f"CPUQuota={limits.cpu_millis / 10:g}%")
    if limits.pids:
        found.append(f"TasksMax={limits.pids + SPARE_PIDS}")
    return tuple(found)


def check(limits: CgroupLimits) -> None:
    """Raises `InvalidRequest` if a controller that they need is not there."""
    wanted = _controllers(limits)
    if not wanted:
        return
    try:
        there = (_top(own_cgroup()) / "cgroup.controllers").read_text().split()
    except (CannotFreeze, OSError):
        raise _refusal(wanted, "no cgroup of version 2 is mounted where phauld sees it") from None
    if missing := [each for each in wanted if each not in there]:
        raise _refusal(missing, f"cgroup version 2 has only {', '.join(there) or 'no controllers'} here")


def make(limits: CgroupLimits, record: Path) -> None:
    """A cgroup for the tree of this record, for who starts below it. Raises `InvalidRequest`, `OSError`."""
    wanted = _controllers(limits)
    if not wanted:
        return
    try:
        parent = own_cgroup()
    except CannotFreeze as exc:
        raise _refusal(wanted, str(exc)) from None
    enabled = (parent / "cgroup.subtree_control").read_text().split()
    try:
        for each in wanted:
            if each not in enabled:
                (parent / "cgroup.subtree_control").write_text(f"+{each}")
    except OSError as exc:  # EBUSY: a cgroup with processes of its own, other than the topmost, can have none below
        raise _refusal(wanted, f"{parent} gives none to cgroups below it: {exc.strerror}") from None
    path = parent / f"{_PREFIX}{record.name}"
    write_json(str(record), "cgroup.json", {"path": str(path)})
    path.mkdir()
    for name, value in controls(limits).items():
        (path / name).write_text(value)


def verify(limits: CgroupLimits, pid: int) -> None:
    """That the cgroup of this process has them. Raises `InvalidRequest`."""
    wrong = [name.partition(".")[0] for name, value in controls(limits).items() if not _has(pid, name, value)]
    if wrong:
        raise _refusal(wrong, "systemd does not enforce it for a scope")


def drop(record: Path) -> None:
    """The tree of this record is gone: so is its cgroup, unless something is in it."""
    if (path := shim.cgroup_of(str(record))) is not None:
        with contextlib.suppress(OSError):
            os.rmdir(path)


def _controllers(limits: CgroupLimits) -> list[str]:
    return [name.partition(".")[0] for name in controls(limits)]


def _has(pid: int, name: str, value: str) -> bool:
    """In its own cgroup, or one above it."""
    try:
        return any((each / name).read_text().strip() == value for each in _upwards(own_cgroup(pid)))
    except (CannotFreeze, OSError):
        return False


def _upwards(cgroup: Path) -> Iterator[Path]:
    while (cgroup / "cgroup.procs").exists():
        yield cgroup
        cgroup = cgroup.parent


def _top(cgroup: Path) -> Path:
    return list(_upwards(cgroup))[-1]


def _refusal(controllers: list[str], why: str) -> InvalidRequest:
    what = " and ".join(controllers)
    return InvalidRequest(f"this node cannot limit {what}: {why}", remedy=_REMEDY)
