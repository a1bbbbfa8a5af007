"""The TCP connections of a network namespace, and which of them a tree holds: asked of the kernel by sock_diag."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from typing import Final, NamedTuple

_NETLINK_SOCK_DIAG: Final = 4
_BY_FAMILY: Final = 20
_REQUEST_DUMP: Final = 0x301
_ERROR, _DONE = 2, 3
_HEADER: Final = struct.Struct("=IHHII")
#: inet_diag_req_v2: family, protocol, extensions, padding, states; the rest is zero.
_QUESTION: Final = struct.Struct("=BBBxI48x")
#: inet_diag_msg: family, state, …, ports, addresses, interface, cookie, …, inode.
_ANSWER: Final = struct.Struct("=BBBB2s2s16s16sIQIIIII")
#: All but TIME_WAIT, CLOSE, LISTEN and NEW_SYN_RECV: those have no connection that somebody holds.
_CONNECTED: Final = 0xFFF & ~(1 << 6 | 1 << 7 | 1 << 10)
_MAPPED: Final = bytes(10) + b"\xff\xff"
_ANSWER_BYTES: Final = 1 << 18


class Connection(NamedTuple):
    """The two ends of a TCP connection as they are on the network: packed addresses (4 or 16 bytes), packed ports."""

    address: bytes
    port: bytes
    peer_address: bytes
    peer_port: bytes


def connections_of(pids: Iterable[int]) -> list[Connection]:
    """The connections that these processes hold, in the network namespace of this one. Raises `OSError`."""
    known = _all_connections()
    if not known:
        return []
    held = {connection for pid in pids for inode in _sockets(pid) if (connection := known.get(inode)) is not None}
    return sorted(held)


def _all_connections() -> dict[str, Connection]:
    """By the inode of the socket, as in /proc/PID/fd."""
    found: dict[str, Connection] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(5)
        for family in (socket.AF_INET, socket.AF_INET6):
            question = _QUESTION.pack(family, socket.IPPROTO_TCP, 0, _CONNECTED)
            netlink.send(_HEADER.pack(_HEADER.size + len(question), _BY_FAMILY, _REQUEST_DUMP, 0, 0) + question)
            while not _read(netlink.recv(_ANSWER_BYTES), found):
                pass
    return found


def _read(answer: bytes, found: dict[str, Connection]) -> bool:
    """Whether it was the last part. Raises OSError."""
    position = 0
    while position + _HEADER.size <= len(answer):
        length, kind, _flags, _sequence, _port = _HEADER.unpack_from(answer, position)
        if kind == _DONE:
            return True
        if kind == _ERROR:
            number = -struct.unpack_from("=i", answer, position + _HEADER.size)[0]
            raise OSError(number, f"the kernel does not tell of TCP connections: {os.strerror(number)}")
        fields = _ANSWER.unpack_from(answer, position + _HEADER.size)
        family, port, peer_port, address, peer_address, inode = fields[0], *fields[4:8], fields[-1]
        if family == socket.AF_INET:
            address, peer_address = address[:4], peer_address[:4]
        elif peer_address.startswith(_MAPPED):
            address, peer_address = address[12:], peer_address[12:]
        found[f"socket:[{inode}]"] = Connection(address, port, peer_address, peer_port)
        position += (length + 3) & ~3
    return False


def _sockets(pid: int) -> list[str]:
    """What the descriptors of a process lead to; empty if it has ended."""
    targets = []
    with suppress(FileNotFoundError, ProcessLookupError):
        directory = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in os.listdir(directory):
                with suppress(FileNotFoundError):
                    targets.append(os.readlink(name, dir_fd=directory))
        finally:
            os.close(directory)
    return targets
