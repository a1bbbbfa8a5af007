"""Reads everything that the source's checks need about a process tree. Changes and stops nothing.

Blocking: run it in a thread. A process that ends meanwhile is left out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

from phaul_client.preflight.limits import hard_of
from phaul_client.preflight.mappings import BuildIds, read_mappings
from phaul_client.preflight.model import FileKind, MappedFile, OpenFile, OutsideEnd, Process, TreeFacts, UnixSocket
from phaul_client.preflight.open_files import read_open_files
from phaul_client.preflight.proc_files import holders, read_stat, try_text
from phaul_client.preflight.proc_text import parse_mount_ids
from phaul_client.preflight.processes import lineage, read_namespaces, read_processes
from phaul_client.preflight.sockets import read_sockets

#: How long the processes of the node are searched for the other ends of pipes and sockets.
_SEARCH_SECONDS = 0.1


def read_tree(root_pid: int) -> TreeFacts:
    """The tree as it stands; without processes if there is none."""
    started = time.monotonic()
    processes = read_processes(root_pid)
    own = read_namespaces("/proc/self")
    if not processes or processes[0].is_kernel_thread:
        return TreeFacts(root_pid=root_pid, processes=processes, reader_namespaces=own)
    open_files = tuple(file for process in processes for file in read_open_files(process.pid))
    mapped, special = _read_all_mappings(processes)
    networks = {process.pid: process.namespaces.get("net", 0) for process in processes}
    sockets = read_sockets(open_files, networks, own.get("net", 0))
    outside = _read_outside_ends(processes, open_files, sockets.unix)
    return TreeFacts(
        root_pid=root_pid,
        processes=processes,
        open_files=open_files,
        mapped_files=mapped,
        special_mappings=special,
        inet_sockets=tuple(sockets.inet),
        unix_sockets=tuple(sockets.unix),
        other_sockets=tuple(sockets.other),
        outside_ends=tuple(outside),
        mount_ids=_mount_ids(processes),
        reader_lineage=lineage(os.getpid()),
        reader_namespaces=own,
        reader_ids=(os.getuid(), os.getgid()),
        hard_limits=tuple(sorted(hard_of([process.pid for process in processes]).items())),
        seconds=time.monotonic() - started,
    )


def _read_all_mappings(processes: Iterable[Process]) -> tuple[tuple[MappedFile, ...], tuple[tuple[int, str], ...]]:
    build_ids: BuildIds = {}
    files: list[MappedFile] = []
    special: list[tuple[int, str]] = []
    for process in processes:
        found, names = read_mappings(process.pid, build_ids)
        files += found
        special += [(process.pid, name) for name in names]
    return tuple(files), tuple(special)


def _mount_ids(processes: Iterable[Process]) -> frozenset[int]:
    # a process sees the mounts below its own root directory: those of phaul's namespace are read by phaul itself
    of_namespace = {process.namespaces.get("mnt", 0): str(process.pid) for process in reversed(tuple(processes))}
    own = read_namespaces("/proc/self").get("mnt", 0)
    readers = ("self" if namespace == own else pid for namespace, pid in of_namespace.items())
    return frozenset().union(*(parse_mount_ids(try_text(f"/proc/{reader}/mountinfo")) for reader in readers))


def _read_outside_ends(
    processes: tuple[Process, ...], open_files: tuple[OpenFile, ...], unix_sockets: Iterable[UnixSocket]
) -> Iterable[OutsideEnd]:
    targets = {*half_held(open_files), *_distant_peers(open_files, unix_sockets)}
    if not targets:
        return
    tree = frozenset(process.pid for process in processes)
    likely = lineage(processes[0].parent_pid)
    for target, pid in holders(targets, tree, likely, _SEARCH_SECONDS).items():
        stat = read_stat(pid)
        yield OutsideEnd(target=target, pid=pid, name=stat.name if stat else "")


def half_held(open_files: Iterable[OpenFile]) -> set[str]:
    """The pipes and fifos of which the tree has only one end."""
    readers, writers = set(), set()
    for file in open_files:
        if file.kind in (FileKind.PIPE, FileKind.FIFO):
            if file.readable:
                readers.add(file.path)
            if file.writable:
                writers.add(file.path)
    return readers ^ writers


def _distant_peers(open_files: Iterable[OpenFile], unix_sockets: Iterable[UnixSocket]) -> set[str]:
    held = {file.inode for file in open_files if file.kind is FileKind.SOCKET}
    ends = {end for unix in unix_sockets for end in (unix.peer_inode, unix.queued_at or 0, *unix.waiting)}
    return {f"socket:[{inode}]" for inode in ends - held if inode}
