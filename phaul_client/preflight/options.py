"""What phaul tells criu about a tree by itself, and why (pure)."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from phaul_client.preflight.model import FileKind, InetSocket, OpenFile, TreeFacts, UnixSocket
from phaul_client.preflight.proc_text import plain_address
from phaul_client.preflight.wishes import GHOST_CEILING_BYTES, TcpPolicy, Wishes

LISTEN = 10
#: TCP states of a socket without a connection.
UNCONNECTED = frozenset({7, LISTEN})
#: criu's own limit of deleted files.
_CRIU_GHOST_BYTES = 1 << 20
_STREAM_LIKE = frozenset({1, 5})


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """One option and why it has its value."""

    option: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenOptions:
    """The options of criu's dump and restore that depend on the tree; names as in phaul_criu.requests."""

    shell_job: bool
    ext_unix_sk: bool
    file_locks: bool
    link_remap: bool
    ghost_limit_bytes: int
    tcp_established: bool
    tcp_close: bool
    tcp_skip_in_flight: bool
    evasive_devices: bool
    #: "nftables" or "skip".
    network_lock: str
    #: Why an option is not at its default.
    reasons: tuple[Reason, ...] = ()


def choose_options(tree: TreeFacts, wishes: Wishes) -> ChosenOptions:
    """What the user asked for, and otherwise what the tree needs."""
    reasons: list[Reason] = []

    def choose(option: str, wish: bool | None, cause: str) -> bool:
        value = bool(cause) if wish is None else wish
        if value:
            reasons.append(Reason(option=option, value="yes", reason=cause if wish is None else "asked for"))
        return value

    connected = [each for each in tree.inet_sockets if is_connected(each)]
    only_inner = bool(connected) and wishes.tcp is TcpPolicy.REFUSE and inner(tree).issuperset(connected)
    keep = only_inner or (bool(connected) and wishes.tcp is TcpPolicy.KEEP)
    return ChosenOptions(
        shell_job=choose("shell_job", wishes.shell_job, _session_cause(tree)),
        ext_unix_sk=choose("ext_unix_sk", wishes.ext_unix_sk, _unix_cause(tree)),
        file_locks=choose("file_locks", wishes.file_locks, _lock_cause(tree)),
        link_remap=choose("link_remap", None, _link_cause(tree)),
        ghost_limit_bytes=_ghost_limit(tree, wishes, reasons),
        tcp_established=choose(
            "tcp_established",
            None if only_inner else keep,
            "all its connections are to itself, over loopback" if only_inner else "",
        ),
        tcp_close=choose("tcp_close", wishes.tcp is TcpPolicy.CLOSE and bool(connected), ""),
        tcp_skip_in_flight=choose("tcp_skip_in_flight", None, _in_flight_cause(tree, wishes)),
        evasive_devices=choose("evasive_devices", None, _device_cause(tree)),
        network_lock="nftables" if keep else "skip",
        reasons=tuple(reasons),
    )


def is_connected(each: InetSocket) -> bool:
    """Whether it is a TCP socket with a connection, in whatever state."""
    return each.protocol == "tcp" and each.state not in UNCONNECTED


def inner(tree: TreeFacts) -> frozenset[InetSocket]:
    """The connections over loopback whose ends are both in the tree: they mean the same on every node."""
    connections = {
        (plain_address(each.local_address), each.local_port, plain_address(each.remote_address), each.remote_port): each
        for each in tree.inet_sockets
        if is_connected(each)
    }
    return frozenset(
        each
        for (local, port, remote, remote_port), each in connections.items()
        if (remote, remote_port, local, port) in connections and ipaddress.ip_address(remote).is_loopback
    )


def is_stream(unix: UnixSocket) -> bool:
    """Whether it has connections (stream or seqpacket)."""
    return unix.type in _STREAM_LIKE


def ghosts(tree: TreeFacts) -> tuple[OpenFile, ...]:
    """Deleted but open files without any name left, each once."""
    found = {
        file.inode: file
        for file in tree.open_files
        if file.deleted and file.kind is FileKind.REGULAR and file.links == 0
    }
    return tuple(found.values())


def nameless_links(tree: TreeFacts) -> tuple[OpenFile, ...]:
    """Open files that lost their name but have another hard link, each once."""
    found = {
        file.inode: file
        for file in tree.open_files
        if file.kind is FileKind.REGULAR and file.deleted and file.links > 0 and not file.path.startswith("/proc/")
    }
    return tuple(found.values())


def mismatched_devices(tree: TreeFacts) -> tuple[OpenFile, ...]:
    """Devices that are open under a path which is another file now, such as a container's /dev/null."""
    return tuple(
        file
        for file in tree.open_files
        if file.kind is FileKind.CHARACTER_DEVICE and file.reachable is False and file.path.startswith("/dev/")
    )


def _session_cause(tree: TreeFacts) -> str:
    root = tree.root
    if root is None or root.namespace_session == root.own_pid:
        return ""
    return f"its session {root.session} is led by a process outside the tree"


def _unix_cause(tree: TreeFacts) -> str:
    held = {file.inode for file in tree.open_files if file.kind is FileKind.SOCKET}
    outside = [
        unix.peer_name
        for unix in tree.unix_sockets
        if unix.peer_inode and unix.peer_inode not in held and not is_stream(unix) and unix.peer_name
    ]
    return f"datagram sockets send to {', '.join(sorted(set(outside)))}" if outside else ""


def _lock_cause(tree: TreeFacts) -> str:
    locked = sorted({file.path for file in tree.open_files if file.locks})
    return f"locks are held on {', '.join(locked)}" if locked else ""


def _link_cause(tree: TreeFacts) -> str:
    found = sorted(file.path for file in nameless_links(tree))
    return f"{', '.join(found)} lost its name but has another" if found else ""


def _device_cause(tree: TreeFacts) -> str:
    found = sorted({file.path for file in mismatched_devices(tree)})
    return f"{', '.join(found)} was opened under another mount" if found else ""


def _in_flight_cause(tree: TreeFacts, wishes: Wishes) -> str:
    listens = any(each.protocol == "tcp" and each.state == LISTEN for each in tree.inet_sockets)
    if not listens or wishes.tcp is TcpPolicy.REFUSE:
        return ""
    return "a connection that is not accepted yet must not stop the migration; its client tries again"


def _ghost_limit(tree: TreeFacts, wishes: Wishes, reasons: list[Reason]) -> int:
    if wishes.ghost_limit_bytes is not None:
        return wishes.ghost_limit_bytes
    largest = max((file.allocated_bytes for file in ghosts(tree)), default=0)
    limit = min(max(2 * largest, _CRIU_GHOST_BYTES), GHOST_CEILING_BYTES)  # it may grow until the freeze
    if limit > _CRIU_GHOST_BYTES:
        because = f"the largest deleted but open file takes {largest} bytes"
        reasons.append(Reason(option="ghost_limit_bytes", value=str(limit), reason=because))
    return limit
