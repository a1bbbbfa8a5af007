"""What a tree needs of its destination: the part of its facts that travels there, as `phaul.v1.TreeFacts` (pure)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Final

from phaul_client.preflight import capabilities
from phaul_client.preflight.check_terminals import masters
from phaul_client.preflight.cpu_flags import program_flags
from phaul_client.preflight.model import FileKind, NodeFacts, TreeFacts
from phaul_client.preflight.options import LISTEN, is_connected
from phaul_client.rsync import is_below

#: Trees below which the kernel makes the files.
_KERNEL_MADE: Final = ("/proc/", "/sys/", "/dev/pts/")
_NAMED: Final = frozenset({FileKind.REGULAR, FileKind.CHARACTER_DEVICE, FileKind.FIFO})


@dataclass(frozen=True, slots=True, kw_only=True)
class RequiredFile:
    """A file that must be there, the same."""

    path: str
    size_bytes: int
    mode: int
    build_id: bytes | None = None
    writable: bool = False
    mapped: bool = False
    #: phaul brings it along.
    carried: bool = False
    #: What the tree has locked in it, as "FLOCK WRITE 0-EOF".
    locks: tuple[str, ...] = ()
    #: Of the last bytes, if the tree may be writing to it.
    tail_sha256: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequiredSocket:
    """An address that must be there, and for a listening socket a port that must be free."""

    protocol: str
    pid: int
    listening: bool
    local_address: str
    local_port: int
    remote_address: str = ""
    remote_port: int = 0
    own_network_namespace: bool = False
    #: The other end is a socket of the source, of a process that is not of the tree.
    peer_stays: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RequiredProcess:
    """One process, for messages."""

    pid: int
    namespace_pid: int
    parent_pid: int
    threads: int
    name: str
    executable: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What a destination must have."""

    root_pid: int
    processes: tuple[RequiredProcess, ...] = ()
    files: tuple[RequiredFile, ...] = ()
    sockets: tuple[RequiredSocket, ...] = ()
    #: Must be free in phauld's PID namespace.
    pids: tuple[int, ...] = ()
    directories: tuple[str, ...] = ()
    memory_bytes: int = 0
    #: CPU flags that programs can see, as in /proc/cpuinfo.
    cpu_flags: frozenset[str] = frozenset()
    #: What its tasks have, as bits.
    capabilities: int = 0
    #: Bytes of huge pages.
    huge_bytes: int = 0
    #: It has ICMP sockets of the node's network (those of ping, not raw ones).
    pings: bool = False
    #: Numbers N of pseudo terminals whose masters it has: as /dev/pts/N they must be free.
    terminals: tuple[int, ...] = ()
    inotify_instances: int = 0
    inotify_watches: int = 0
    epoll_watches: int = 0
    #: The largest hard limit of each kind (those of setrlimit).
    hard_limits: tuple[tuple[str, int], ...] = ()


def requirements(tree: TreeFacts, node: NodeFacts) -> Requirements:
    """What the tree needs, and the CPU of the node it was started on."""
    return Requirements(
        root_pid=tree.root_pid,
        processes=tuple(
            RequiredProcess(
                pid=process.pid,
                namespace_pid=process.own_pid,
                parent_pid=process.parent_pid,
                threads=max(1, len(process.threads)),
                name=process.name,
                executable=process.executable,
            )
            for process in tree.processes
        ),
        files=tuple(_files(tree)) if not _own_mounts(tree) else (),
        sockets=tuple(_sockets(tree)),
        pids=() if tree.own_pid_namespace else _pids(tree),
        directories=_directories(tree) if not _own_mounts(tree) else (),
        memory_bytes=sum(process.memory_bytes for process in tree.processes),
        cpu_flags=program_flags(node.cpu_flags),
        capabilities=capabilities.needed(tree),
        huge_bytes=sum(file.length_bytes for file in tree.mapped_files if file.path.startswith("/anon_hugepage")),
        terminals=tuple(sorted(masters(tree))) if not _own_mounts(tree) else (),
        inotify_instances=len(_watchers(tree, "inotify")),
        inotify_watches=sum(_watchers(tree, "inotify")),
        epoll_watches=sum(_watchers(tree, "[eventpoll]")),
        hard_limits=tree.hard_limits,
        pings=any(inet.protocol == "icmp" and not inet.own_network_namespace for inet in tree.inet_sockets),
    )


def _watchers(tree: TreeFacts, kind: str) -> list[int]:
    """How much each of them watches."""
    return [file.entries for file in tree.open_files if file.path == f"anon_inode:{kind}" and file.entries >= 0]


def carried(needs: Requirements, paths: Collection[str]) -> Requirements:
    """The same, knowing that phaul brings these files along."""
    return replace(needs, files=tuple(replace(file, carried=file.path in paths) for file in needs.files))


def synced(needs: Requirements, directories: Collection[str], but: Collection[str]) -> Requirements:
    """The same, knowing that `--sync` makes these directories the same there, without the mounts in them."""

    def comes(path: str) -> bool:
        return any(is_below(path, each) for each in directories) and not any(is_below(path, each) for each in but)

    return replace(
        needs,
        files=tuple(replace(file, carried=file.carried or comes(file.path)) for file in needs.files),
        directories=tuple(path for path in needs.directories if not comes(path)),
    )


def _own_mounts(tree: TreeFacts) -> bool:
    """Paths of another mount namespace mean nothing in the destination's."""
    root = tree.root
    return root is not None and root.namespaces.get("mnt") != tree.reader_namespaces.get("mnt")


def _pids(tree: TreeFacts) -> tuple[int, ...]:
    """Ids that criu must be able to give: tasks, threads, and the groups and sessions that the tree leads."""
    return tuple(sorted({thread for process in tree.processes for thread in (process.pid, *process.threads)}))


def _directories(tree: TreeFacts) -> tuple[str, ...]:
    found = {process.working_directory for process in tree.processes}
    found |= {process.root_directory for process in tree.processes}
    found |= {file.path for file in tree.open_files if file.kind is FileKind.DIRECTORY and not file.deleted}
    return tuple(sorted(path for path in found if path.startswith("/") and not _unneeded(path)))


def _files(tree: TreeFacts) -> Iterator[RequiredFile]:
    found: dict[str, RequiredFile] = {}
    for mapped in tree.mapped_files:
        if mapped.kind is FileKind.REGULAR and not mapped.deleted and not _unneeded(mapped.path):
            found[mapped.path] = RequiredFile(
                path=mapped.path,
                size_bytes=mapped.size_bytes,
                mode=mapped.mode,
                build_id=mapped.build_id,
                writable=mapped.shared and mapped.writable,
                mapped=True,
            )
    for file in tree.open_files:
        if file.kind not in _NAMED or file.deleted or file.reachable is False or _unneeded(file.path):
            continue
        known = found.get(file.path)
        found[file.path] = RequiredFile(
            path=file.path,
            size_bytes=file.size_bytes if file.kind is FileKind.REGULAR else 0,
            mode=file.mode,
            build_id=known.build_id if known else None,
            writable=file.writable or (known is not None and known.writable),
            mapped=known is not None,
            locks=tuple(sorted({*file.locks, *(known.locks if known else ())})),
            tail_sha256=file.tail_sha256 or (known.tail_sha256 if known else None),
        )
    yield from found.values()


def _sockets(tree: TreeFacts) -> Iterator[RequiredSocket]:
    for inet in tree.inet_sockets:
        listening = inet.protocol == "tcp" and inet.state == LISTEN
        bound = inet.protocol in ("udp", "udplite") and inet.local_port
        if listening or bound or is_connected(inet):
            yield RequiredSocket(
                protocol=inet.protocol,
                pid=inet.pid,
                listening=listening,
                local_address=inet.local_address,
                local_port=inet.local_port,
                remote_address=inet.remote_address if is_connected(inet) else "",
                remote_port=inet.remote_port if is_connected(inet) else 0,
                own_network_namespace=inet.own_network_namespace,
                peer_stays=inet.peer_outside and not inet.own_network_namespace,
            )


def _unneeded(path: str) -> bool:
    return path.startswith(_KERNEL_MADE) or path.endswith(" (deleted)")
