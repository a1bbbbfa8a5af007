"""Cgroups of a container at its destination, wherever this node has its hierarchies mounted."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from phaul_client.containers.mounts import Mount, parse_mounts


def mounts() -> tuple[Mount, ...]:
    """What phauld sees."""
    return parse_mounts(Path("/proc/self/mountinfo").read_text(encoding="utf-8"))


def hierarchies() -> dict[str, Mount]:
    """Each hierarchy of cgroups, and where it is."""
    return {each.hierarchy: each for each in mounts() if each.kind in ("cgroup", "cgroup2")}


def cgroups_of(pid: int, *, every: bool) -> dict[str, str]:
    """Directory of each hierarchy in which the process has a cgroup other than ours, or of each (`every`)."""
    ours, theirs = (_names(each) for each in ("self", str(pid)))
    here = hierarchies()
    found = {}
    for hierarchy, path in theirs.items():
        mount = here.get(hierarchy)
        if mount is not None and (path != ours.get(hierarchy) or every):
            found[hierarchy] = os.path.normpath(f"{mount.point}/{os.path.relpath(path, mount.root)}")
    return found


def _names(process: str) -> dict[str, str]:
    """The cgroup of a process in each hierarchy."""
    found = {}
    for line in Path(f"/proc/{process}/cgroup").read_text(encoding="utf-8").splitlines():
        number, controllers, path = line.split(":", 2)
        found["cgroup2" if number == "0" else ",".join(sorted(controllers.split(",")))] = path
    return found


def join(cgroup: Path, pid: int) -> None:
    """Put a process into a cgroup. One of version 1 with a share of the processor takes none of a real-time class."""
    try:
        cgroup.write_text(str(pid))
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))
        cgroup.write_text(str(pid))
