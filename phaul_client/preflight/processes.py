"""Reads the processes of a tree."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Final

from phaul_client.preflight.address_space import read_address_space
from phaul_client.preflight.model import NAMESPACES, Process
from phaul_client.preflight.proc_files import GONE, read_stat, read_text, try_link, try_text
from phaul_client.preflight.proc_text import Stat, numbers, parse_fields, strip_deleted
from phaul_client.tree import descendants

#: A thread that waits for a disk leaves state D within this time.
_STUCK_SECONDS: Final = 0.05
_TRAP: Final = 1 << signal.SIGTRAP - 1
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def read_processes(root_pid: int) -> tuple[Process, ...]:
    """The tree as it stands, its root first; empty if there is no such process."""
    pids = descendants(root_pid)
    return tuple(process for process in map(read_process, pids) if process is not None)


def read_process(pid: int) -> Process | None:
    """One process; None if it is gone."""
    stat = read_stat(pid)
    if stat is None:
        return None
    directory = f"/proc/{pid}"
    status = parse_fields(try_text(f"{directory}/status"))
    threads = tuple(_threads(pid))
    return Process(
        pid=pid,
        parent_pid=stat.parent_pid,
        name=stat.name,
        state=stat.state,
        namespace_pids=numbers(status.get("NSpid")),
        group=stat.group,
        session=stat.session,
        namespace_session=(numbers(status.get("NSsid")) or (stat.session,))[-1],
        terminal=stat.terminal,
        foreground=stat.foreground,
        is_kernel_thread=stat.is_kernel_thread,
        tracer_pid=int(status.get("TracerPid", "0")),
        threads=threads,
        stuck_threads=tuple(_stuck(pid, threads)),
        user_ids=numbers(status.get("Uid"))[:3],
        group_ids=numbers(status.get("Gid"))[:3],
        capabilities=int(status.get("CapPrm", "0"), 16) | int(status.get("CapInh", "0"), 16),
        namespaces=read_namespaces(directory),
        pid_namespace_for_children=_namespace(f"{directory}/ns/pid_for_children"),
        time_namespace_for_children=_namespace(f"{directory}/ns/time_for_children"),
        cgroups=try_text(f"{directory}/cgroup"),
        trap_waits=any(int(status.get(name, "0"), 16) & _TRAP for name in ("SigPnd", "ShdPnd")),
        executable=strip_deleted(try_link(f"{directory}/exe"))[0],
        working_directory=try_link(f"{directory}/cwd"),
        working_directory_writable=_is_writable(f"{directory}/cwd"),
        root_directory=try_link(f"{directory}/root"),
        memory_bytes=_memory_bytes(stat),
        address_space=read_address_space(pid),
    )


def read_namespaces(directory: str) -> dict[str, int]:
    """Kind → inode; a kind that cannot be read is left out."""
    found = {kind: _namespace(f"{directory}/ns/{kind}") for kind in NAMESPACES}
    return {kind: inode for kind, inode in found.items() if inode}


def lineage(pid: int) -> tuple[int, ...]:
    """A process and its ancestors, nearest first."""
    found = []
    while pid > 0 and (stat := read_stat(pid)) is not None:
        found.append(pid)
        pid = stat.parent_pid
    return tuple(found)


def _is_writable(directory: str) -> bool:
    """Whether it still has a name, on a mount that is not read-only; of one that is gone: as good as any."""
    try:
        return os.stat(directory).st_nlink > 0 and not os.statvfs(directory).f_flag & os.ST_RDONLY
    except OSError:
        return True


def _memory_bytes(stat: Stat) -> int:
    return stat.resident_pages * _PAGE_BYTES


def _namespace(path: str) -> int:
    return int(try_link(path).partition("[")[2].rstrip("]") or 0)


def _threads(pid: int) -> Iterator[int]:
    with contextlib.suppress(*GONE):
        yield from sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))


def _stuck(pid: int, threads: tuple[int, ...]) -> Iterator[int]:
    """Threads in uninterruptible sleep that do not leave it: criu cannot stop them."""
    suspects = [tid for tid in threads if _thread_state(pid, tid) == "D"]
    deadline = time.monotonic() + _STUCK_SECONDS
    while suspects and time.monotonic() < deadline:
        time.sleep(_STUCK_SECONDS / 10)
        suspects = [tid for tid in suspects if _thread_state(pid, tid) == "D"]
    yield from suspects


def _thread_state(pid: int, tid: int) -> str:
    try:
        return read_text(f"/proc/{pid}/task/{tid}/stat").rpartition(")")[2].split(None, 1)[0]
    except (*GONE, IndexError):
        return ""
