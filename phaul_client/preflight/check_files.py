"""Checks of open and mapped files (pure)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from phaul_client.preflight.model import FileKind, MappedFile, OpenFile, TreeFacts
from phaul_client.preflight.options import ChosenOptions, ghosts, nameless_links
from phaul_client.preflight.problems import Problem, error, info, warning

_OF_A_PROCESS: Final = re.compile(r"/proc/(\d+)(?:/|$)")
#: Files of these kinds lie on a mount.
_MOUNTED = frozenset({FileKind.REGULAR, FileKind.DIRECTORY, FileKind.CHARACTER_DEVICE, FileKind.FIFO})


def check_files(tree: TreeFacts, chosen: ChosenOptions) -> Iterator[Problem]:
    """Deleted files, files without a usable name, locks, and what an epoll still watches."""
    yield from _ghosts(tree, chosen)
    yield from _links(tree)
    yield from _locks(tree, chosen)
    for file in _each_once(tree.open_files):
        yield from _mount(file, tree)
        yield from _name(file, tree)
        yield from _epoll(file)
        yield from _process_file(file, tree)
    for mapped in tree.mapped_files:
        yield from _mapping(mapped, tree, chosen)


def _ghosts(tree: TreeFacts, chosen: ChosenOptions) -> Iterator[Problem]:
    for file in ghosts(tree):
        size = f"{file.allocated_bytes} bytes"
        if file.allocated_bytes > chosen.ghost_limit_bytes:
            message = f"is deleted but open and takes {size}, more than {chosen.ghost_limit_bytes} may travel"
            yield error("ghost-file-too-large", file.path, message, f"set ghost_limit_bytes to {file.allocated_bytes}")
        else:
            yield info(
                "ghost-file", file.path, f"is deleted but open; its {size} travel inside the images", "nothing to do"
            )


def _links(tree: TreeFacts) -> Iterator[Problem]:
    for file in nameless_links(tree):
        message = f"lost its name; criu finds it by another hard link ({file.links} left), which stays on this node"
        remedy = "moves only within one shared file system (phaul sets link_remap); otherwise close the file"
        yield warning("link-remap", file.path, message, remedy)


def _locks(tree: TreeFacts, chosen: ChosenOptions) -> Iterator[Problem]:
    locked = {(file.path, kind) for file in tree.open_files for kind in file.locks}
    for path, kind in sorted(locked):
        if kind.startswith("LEASE-BREAKING "):
            message = "another process waits for its lease to end, and criu would tell the tree so a second time"
            yield error("file-lease", path, message, "try again when the program has answered")
        elif kind.startswith("LEASE WRITE "):
            message = "a write lease is held on it, which ends when criu opens the file, after 45 s in the freeze"
            yield error("file-lease", path, message, "the program must give it up, or take a read lease")
        elif chosen.file_locks:
            yield info(
                "file-lock", path, f"a lock ({kind}) is held on it and taken again there", "phaul sets file_locks"
            )
        else:
            yield error("file-lock", path, f"a lock ({kind}) is held on it", "allow file_locks")


def _mount(file: OpenFile, tree: TreeFacts) -> Iterator[Problem]:
    if file.kind in _MOUNTED and file.mount_id is not None and file.mount_id not in tree.mount_ids:
        message = f"{file} is on a mount that the process cannot see, so criu cannot name it"
        yield error("mount-outside", file.path, message, "start the process with files of its own mount namespace")


def _name(file: OpenFile, tree: TreeFacts) -> Iterator[Problem]:
    unnamed = file.kind in (FileKind.REGULAR, FileKind.DIRECTORY, FileKind.FIFO) and file.reachable is False
    if not unnamed or file.deleted or file.mount_id not in tree.mount_ids or file.path.startswith("/proc/"):
        return
    message = f"{file} is another file than the one that has this name now (replaced, or covered by a mount)"
    yield error("file-covered", file.path, message, "undo the mount, or let the program open the file again")


def _process_file(file: OpenFile, tree: TreeFacts) -> Iterator[Problem]:
    """In a PID namespace of its own a tree has other ids on each node, so other names in the /proc of the node."""
    found, root = _OF_A_PROCESS.match(file.path), tree.root
    if found is None or root is None or not tree.own_pid_namespace or int(found[1]) not in tree.pids:
        return
    if root.namespaces.get("mnt") != tree.reader_namespaces.get("mnt"):
        return  # it may have a /proc of its own
    message = f"{file} is open, and its process has another id in the /proc of the destination"
    yield error(
        "process-file", file.path, message, "try again if it is read now and then; else the program must close it"
    )


def _epoll(file: OpenFile) -> Iterator[Problem]:
    for fd in file.watches_closed:
        message = f"watches fd {fd}, which was closed there but lives on in another process"
        yield error("epoll-closed", f"epoll {file}", message, "the program must take it out of the epoll first")


def _mapping(mapped: MappedFile, tree: TreeFacts, chosen: ChosenOptions) -> Iterator[Problem]:
    where = tree.process(mapped.pid)
    if mapped.kind is not FileKind.REGULAR or not mapped.deleted or mapped.links > 0 or _is_shared_memory(mapped.path):
        return
    if mapped.allocated_bytes > chosen.ghost_limit_bytes:
        message = f"is deleted but mapped by {where} and takes {mapped.allocated_bytes} bytes"
        yield error("ghost-file-too-large", mapped.path, message, f"set ghost_limit_bytes to {mapped.allocated_bytes}")


def _is_shared_memory(path: str) -> bool:
    """Shared anonymous memory: the kernel shows it as a deleted file, criu knows better."""
    return path.startswith(("/dev/zero", "/SYSV", "/anon_hugepage", "/memfd:", "/[aio]"))


def _each_once(files: tuple[OpenFile, ...]) -> Iterator[OpenFile]:
    """A file that several descriptors share counts once, an epoll in every process that has it."""
    seen = set()
    for file in files:
        key = (file.path, file.inode, file.mount_id, file.pid if file.watches_closed else 0)
        if key not in seen:
            seen.add(key)
            yield file
