"""Checks of sockets, pipes and fifos (pure)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from phaul_client.preflight.model import FileKind, InetSocket, OtherSocket, TreeFacts, UnixSocket
from phaul_client.preflight.options import LISTEN, ChosenOptions, inner, is_connected, is_stream
from phaul_client.preflight.problems import Problem, error, info, warning
from phaul_client.preflight.wishes import TcpPolicy, Wishes

_KNOWN_OTHER: Final = frozenset({"NETLINK", "PACKET"})
_TIME_WAIT, _SYN_RECEIVED = 6, 3


def check_sockets(tree: TreeFacts, chosen: ChosenOptions, wishes: Wishes) -> Iterator[Problem]:
    """Connections, sockets that criu does not know, and ends that stay behind."""
    own = inner(tree)
    for inet in tree.inet_sockets:
        policy = TcpPolicy.KEEP if inet in own and wishes.tcp is TcpPolicy.REFUSE else wishes.tcp
        yield from _inet(inet, tree, chosen, policy)
    for other in tree.other_sockets:
        yield from _other(other, tree)
    ends = {end.target: f"pid {end.pid} ({end.name})" for end in tree.outside_ends}
    held = {file.inode for file in tree.open_files if file.kind is FileKind.SOCKET}
    for unix in tree.unix_sockets:
        yield from _unix(unix, held, ends, tree, chosen)
    yield from _pipes(tree, ends)


def _inet(inet: InetSocket, tree: TreeFacts, chosen: ChosenOptions, policy: TcpPolicy) -> Iterator[Problem]:
    owner = tree.process(inet.pid)
    if inet.corked:
        message = f"a UDP socket of {owner} holds back what it sends (UDP_CORK), which criu cannot carry"
        yield error("udp-corked", inet.local, message, "try again when it has sent")
    elif is_connected(inet):
        yield _connection(inet, owner, policy)
    elif inet.protocol == "tcp" and inet.state == LISTEN and inet.waiting:
        many = f"{inet.waiting} connection(s) to {owner} wait to be accepted"
        if chosen.tcp_skip_in_flight:
            yield warning("tcp-in-flight", inet.local, f"{many} and are dropped", "nothing: clients connect again")
        else:
            yield error(
                "tcp-in-flight", inet.local, many, "try again when they are accepted, or allow them to be closed"
            )


def _connection(inet: InetSocket, owner: str, policy: TcpPolicy) -> Problem:
    subject = f"{inet.local} to {inet.remote}"
    if policy is TcpPolicy.REFUSE:
        remedy = "keep connections (the address must move too), or let them be closed"
        return error("tcp-established", subject, f"{owner} has an open TCP connection", remedy)
    if policy is TcpPolicy.CLOSE:
        return warning("tcp-closed", subject, f"the TCP connection of {owner} is closed by the move", "nothing to do")
    return info(
        "tcp-kept", subject, f"the TCP connection of {owner} moves along", "phaul locks it while the tree is frozen"
    )


def _other(other: OtherSocket, tree: TreeFacts) -> Iterator[Problem]:
    subject = f"fd {other.fd} of {tree.process(other.pid)}"
    if other.protocol == "NETLINK" and other.waiting:
        message = f"is a netlink socket with {other.waiting} unread bytes, which criu cannot carry"
        yield error("netlink-unread", subject, message, "try again when the program has read them")
    elif other.protocol == "MPTCP":
        remedy = "turn MPTCP off in the program (Go: GODEBUG=multipathtcp=0)"
        yield error("mptcp", subject, "is an MPTCP socket, which criu cannot carry", remedy)
    elif other.protocol not in _KNOWN_OTHER:
        name = other.protocol or "unknown"
        message = f"is a socket of a kind that criu cannot carry ({name})"
        yield error("unsupported-socket", subject, message, "the program must close it first")


def _unix(
    unix: UnixSocket, held: set[int], ends: dict[str, str], tree: TreeFacts, chosen: ChosenOptions
) -> Iterator[Problem]:
    owner = tree.process(unix.pid)
    subject = unix.name or unix.peer_name or f"unix socket of {owner}"
    if unix.queued_at is not None and unix.queued_at not in held:
        message = (
            f"{owner} waits to be accepted by {ends.get(f'socket:[{unix.queued_at}]', 'a process outside the tree')}"
        )
        yield error("unix-peer-outside", subject, message, "move both ends together, or close the connection")
    elif unix.queued_at is not None and unix.unread_bytes:
        message = f"{owner} waits to be accepted and has sent something already, which criu cannot carry"
        yield error("unix-in-flight", subject, message, "try again when it is accepted")
    for inode in unix.waiting:
        who = ends.get(f"socket:[{inode}]", "a process outside the tree")
        if not inode:
            message = f"a connection waits to be accepted by {owner}, and its client has gone already"
            yield error("unix-in-flight", subject, message, "try again when it is accepted")
        elif inode not in held:
            message = f"a connection of {who} waits to be accepted by {owner}, and is closed by the move"
            yield warning("unix-in-flight", subject, message, "nothing: clients connect again")
    if not unix.peer_inode or unix.peer_inode in held:
        return
    peer = ends.get(f"socket:[{unix.peer_inode}]", "a process outside the tree")
    if not is_stream(unix) and unix.peer_name and chosen.ext_unix_sk:
        message = f"{owner} sends to {peer}; at the destination it is connected to the socket of that name there"
        yield warning(
            "unix-datagram-outside", unix.peer_name, message, "phaul sets ext_unix_sk; the socket must exist there"
        )
    else:
        message = f"the other end of a unix socket of {owner} is held by {peer}"
        remedy = "move both ends together, close the connection, or start the program with `phaul run`"
        yield error("unix-peer-outside", subject, message, remedy)


def _pipes(tree: TreeFacts, ends: dict[str, str]) -> Iterator[Problem]:
    named = set()
    for file in tree.open_files:
        if file.packets and (file.path, "packets") not in named:
            named.add((file.path, "packets"))
            message = f"fd {file.fd} of {tree.process(file.pid)} is a pipe in packet mode (O_DIRECT), unknown to criu"
            yield error("pipe-packets", file.path, message, "the program must use an ordinary pipe")
        if file.kind in (FileKind.PIPE, FileKind.FIFO) and file.path in ends and (file.path, "ends") not in named:
            named.add((file.path, "ends"))
            message = (
                f"fd {file.fd} of {tree.process(file.pid)}: its other end is held by {ends[file.path]}, which stays"
            )
            remedy = "after the move reading gives end of file and writing fails: start it with its output in a file"
            yield warning("pipe-outside", file.path, message, remedy)
