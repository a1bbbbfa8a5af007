"""Reads what the sockets of a tree are connected to. Reads a table only if the tree has such sockets."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from phaul_client.preflight.model import FileKind, InetSocket, OpenFile, OtherSocket, UnixSocket
from phaul_client.preflight.network_namespace import in_network_namespace_of
from phaul_client.preflight.proc_files import try_text
from phaul_client.preflight.proc_text import InetLine, parse_inet, parse_socket_inodes, plain_address
from phaul_client.preflight.udp_cork import is_corked
from phaul_client.preflight.unix_diag import UnixDiag, read_unix_sockets

#: File in /proc/PID/net → protocol.
_INET_TABLES = {
    "tcp": "tcp",
    "tcp6": "tcp",
    "udp": "udp",
    "udp6": "udp",
    "udplite": "udplite",
    "udplite6": "udplite",
    "icmp": "icmp",
    "icmp6": "icmp",
    "raw": "raw",
    "raw6": "raw",
}
#: Sockets that no table lists while they are neither bound nor connected, and that criu makes anew.
_PINGS = frozenset({"PING", "PINGv6"})
_UNBOUND = _PINGS | frozenset({"TCP", "TCPv6", "UDP", "UDPv6", "UDP-Lite", "UDPLITEv6", "RAW", "RAWv6", "UNIX"})
#: Of a connection: its own and the other's address and port.
_Ends = tuple[tuple[str, int], tuple[str, int]]


@dataclass(slots=True)
class Sockets:
    """The sockets of a tree."""

    inet: list[InetSocket] = field(default_factory=list)
    unix: list[UnixSocket] = field(default_factory=list)
    other: list[OtherSocket] = field(default_factory=list)


def read_sockets(open_files: Iterable[OpenFile], namespaces: dict[int, int], own_namespace: int) -> Sockets:
    """The sockets among the open files. `namespaces`: PID → network namespace; `own_namespace`: the reader's."""
    by_namespace: dict[int, dict[int, OpenFile]] = {}
    for file in open_files:
        if file.kind is FileKind.SOCKET:
            by_namespace.setdefault(namespaces.get(file.pid, 0), {}).setdefault(file.inode, file)
    sockets = Sockets()
    for namespace, files in by_namespace.items():
        _read_namespace(files, namespace != own_namespace, sockets)
    return sockets


def _read_namespace(files: dict[int, OpenFile], foreign: bool, sockets: Sockets) -> None:
    """Sockets seen through the process that has the first of them open."""
    pid = next(iter(files.values())).pid
    protocols = {inode: _protocol(file) for inode, file in files.items()}
    if any(protocol.startswith("UNIX") for protocol in protocols.values()):
        sockets.unix.extend(_unix(files, protocols, pid))
    tables = _inet_tables(pid) if any(_is_inet(protocol) for protocol in protocols.values()) else {}
    netlink = parse_socket_inodes(try_text(f"/proc/{pid}/net/netlink"), 9, 4) if "NETLINK" in protocols.values() else {}
    strangers = _strangers(tables, files)
    for inode, file in files.items():
        protocol = protocols[inode]
        if inode in tables and protocol != "MPTCP":
            inet = _inet(tables[inode], file, foreign)
            sockets.inet.append(replace(inet, peer_outside=_ends(inet)[::-1] in strangers))
        elif protocol in _PINGS:
            sockets.inet.append(InetSocket(protocol="icmp", inode=inode, pid=file.pid, own_network_namespace=foreign))
        elif protocol not in _UNBOUND and not protocol.startswith("UNIX"):
            waiting = netlink.get(inode, 0)
            sockets.other.append(OtherSocket(inode=inode, pid=file.pid, fd=file.fd, protocol=protocol, waiting=waiting))


def _inet_tables(pid: int) -> dict[int, tuple[str, InetLine]]:
    return {
        line.inode: (protocol, line)
        for table, protocol in _INET_TABLES.items()
        for line in parse_inet(try_text(f"/proc/{pid}/net/{table}"))
        if line.inode
    }


def _inet(found: tuple[str, InetLine], file: OpenFile, foreign: bool) -> InetSocket:
    protocol, line = found
    return InetSocket(
        corked=protocol in ("udp", "udplite") and is_corked(file.pid, file.fd),
        protocol=protocol,
        inode=line.inode,
        pid=file.pid,
        state=line.state,
        local_address=line.local_address,
        local_port=line.local_port,
        remote_address=line.remote_address,
        remote_port=line.remote_port,
        waiting=line.waiting,
        own_network_namespace=foreign,
    )


def _strangers(tables: dict[int, tuple[str, InetLine]], files: dict[int, OpenFile]) -> set[_Ends]:
    """The other ends of the tree's TCP connections that are sockets of others, in the same network namespace."""
    ours = (line for inode, (protocol, line) in tables.items() if protocol == "tcp" and inode in files)
    ports = {(line.remote_port, line.local_port) for line in ours if line.remote_port}
    return {
        _ends(line)
        for inode, (protocol, line) in tables.items()
        if (line.local_port, line.remote_port) in ports and protocol == "tcp" and inode not in files
    }


def _ends(each: InetLine | InetSocket) -> _Ends:
    return (plain_address(each.local_address), each.local_port), (plain_address(each.remote_address), each.remote_port)


def _unix(files: dict[int, OpenFile], protocols: dict[int, str], pid: int) -> Iterable[UnixSocket]:
    try:
        known = in_network_namespace_of(pid, read_unix_sockets)
    except OSError:
        return
    queued_at = {waiting: each.inode for each in known.values() for waiting in each.waiting}
    for inode, file in files.items():
        if protocols[inode].startswith("UNIX") and inode in known:
            yield _unix_socket(known[inode], known, file, queued_at.get(inode))


def _unix_socket(found: UnixDiag, known: dict[int, UnixDiag], file: OpenFile, queued_at: int | None) -> UnixSocket:
    peer = known.get(found.peer_inode)
    return UnixSocket(
        inode=found.inode,
        pid=file.pid,
        type=found.type,
        listening=found.listening,
        name=found.name,
        peer_inode=found.peer_inode,
        peer_name=peer.name if peer else "",
        waiting=found.waiting if found.listening else (),
        queued_at=queued_at,
        unread_bytes=found.unread_bytes,
    )


def _is_inet(protocol: str) -> bool:
    return protocol.startswith(("TCP", "UDP", "RAW", "PING"))


def _protocol(file: OpenFile) -> str:
    try:
        name = os.getxattr(f"/proc/{file.pid}/fd/{file.fd}", "system.sockprotoname")
    except OSError:
        return ""
    return name.rstrip(b"\0").decode(errors="replace")
