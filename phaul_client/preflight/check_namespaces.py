"""Checks of namespaces, shared memory of System V, and clocks (pure)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from phaul_client.preflight.capabilities import mask
from phaul_client.preflight.model import FileKind, Process, TreeFacts
from phaul_client.preflight.problems import Problem, error, info, warning

#: Kinds of which criu restores several if the root has one of its own; of the others the whole tree must share one.
_MAY_DIFFER: Final = frozenset({"mnt", "net"})
_NAMES: Final = {
    "cgroup": "cgroup",
    "ipc": "IPC",
    "mnt": "mount",
    "net": "network",
    "pid": "PID",
    "time": "time",
    "user": "user",
    "uts": "UTS",
}


def check_namespaces(tree: TreeFacts) -> Iterator[Problem]:
    """Namespaces of the tree that criu cannot restore, or that differ from phauld's."""
    root = tree.root
    assert root is not None
    if len(root.namespace_pids) > 1 and root.own_pid != 1:
        message = "lives in a PID namespace whose init is outside the tree"
        yield error("pid-namespace-part", str(root), message, "move the namespace's init (with all of it)")
    yield from _nested(tree, root)
    yield from _proc(tree, root)
    yield from _own(tree, root)
    yield from _cgroups(tree, root)
    yield from _shared_memory(tree, root)
    yield from _open_namespaces(tree)
    if root.namespaces.get("time") == tree.reader_namespaces.get("time"):
        message = "CLOCK_MONOTONIC and CLOCK_BOOTTIME jump to the other node's"
        yield warning("clock-jump", str(root), message, "start it in a time namespace of its own (`phaul run`)")


def _nested(tree: TreeFacts, root: Process) -> Iterator[Problem]:
    may_differ = {kind for kind in _MAY_DIFFER if root.namespaces.get(kind) != tree.reader_namespaces.get(kind)}
    for process in tree.processes[1:]:
        for kind, inode in process.namespaces.items():
            if kind not in may_differ and inode != root.namespaces.get(kind, inode):
                message = f"has a {_NAMES[kind]} namespace of its own inside the tree, which criu cannot restore"
                yield error("nested-namespace", str(process), message, "move that process by itself")
    for process in tree.processes:
        pid_namespace = process.namespaces.get("pid")
        if process.pid_namespace_for_children not in (0, pid_namespace):
            message = "its children get another PID namespace than its own"
            yield error("nested-namespace", str(process), message, "move its children instead, or its parent")
        if process.time_namespace_for_children not in (0, process.namespaces.get("time")):
            message = "its children get another time namespace than its own, which criu cannot dump"
            yield error("nested-namespace", str(process), message, "move its children instead, or its parent")


def _proc(tree: TreeFacts, root: Process) -> Iterator[Problem]:
    """criu lets the init of a PID namespace that has no /proc of its own mount one, in its working directory."""
    readers = tree.reader_namespaces
    has_own = root.namespaces.get("mnt") != readers.get("mnt") or root.root_directory != "/"
    if root.own_pid != 1 or root.namespaces.get("pid") == readers.get("pid") or has_own:
        return
    message = "is the init of a PID namespace without a /proc of its own, and cannot mount one, as criu lets it do: "
    if not root.capabilities & mask("SYS_ADMIN"):
        message += "it lacks CAP_SYS_ADMIN"
        yield error("no-proc", str(root), message, "an init of root's: `phaul run --user` starts the program below one")
    if not root.working_directory_writable:
        message += f"nothing can be made in its working directory {root.working_directory}"
        yield error("no-proc", str(root), message, "start it in another directory (`phaul run --cwd`)")


def _cgroups(tree: TreeFacts, root: Process) -> Iterator[Problem]:
    """criu is told to leave cgroups alone: all of the tree will be in that of phaul's workloads."""
    remedy = "make them again there, or start the program as a container of its own"
    if len({process.cgroups for process in tree.processes if process.state not in ("Z", "X")} - {""}) > 1:
        message = "the processes of the tree are in several cgroups, and will be in one"
        yield warning("cgroups", str(root), message, remedy)
    elif root.namespaces.get("cgroup") != tree.reader_namespaces.get("cgroup"):
        message = "has a cgroup namespace of its own, which is not made again"
        yield info("cgroups", str(root), message, remedy)


def _own(tree: TreeFacts, root: Process) -> Iterator[Problem]:
    own = sorted(
        kind
        for kind, inode in root.namespaces.items()
        if kind != "cgroup" and inode != tree.reader_namespaces.get(kind, inode)
    )
    if "mnt" in own:
        message = "has a mount namespace of its own, which criu restores only under a root directory of its own"
        remedy = "move it as a container, or start it in the node's mount namespace (`phaul run`)"
        yield error("mount-namespace", str(root), message, remedy)
    elif "user" in own:
        message = "has a user namespace of its own without a /proc of its own, which criu cannot restore"
        yield error("user-namespace", str(root), message, "move it as a container, or start it without")
    elif own:
        names = ", ".join(_NAMES[kind] for kind in own)
        yield info("own-namespaces", names, f"{root} has namespaces of its own, which move along", "nothing to do")


def _open_namespaces(tree: TreeFacts) -> Iterator[Problem]:
    inhabited = {inode for process in tree.processes for inode in process.namespaces.values()}
    for file in tree.open_files:
        if file.kind is FileKind.NAMESPACE and file.inode not in inhabited:
            message = f"{file} keeps a namespace in which no process of the tree lives"
            yield error("namespace-file", file.path, message, "the program must close it first")


def _shared_memory(tree: TreeFacts, root: Process) -> Iterator[Problem]:
    if root.namespaces.get("ipc") != tree.reader_namespaces.get("ipc"):
        return
    named = set()
    for mapped in tree.mapped_files:
        if mapped.path.startswith("/SYSV") and mapped.path not in named:
            named.add(mapped.path)
            message = f"{tree.process(mapped.pid)} uses System V shared memory of the node's IPC namespace"
            remedy = "start it in an IPC namespace of its own (`phaul run`), or let it use POSIX shared memory"
            yield error("sysv-shared-memory", mapped.path, message, remedy)
