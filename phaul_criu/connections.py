"""Which TCP connections a tree holds: asked of the kernel by sock_diag."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from typing import Final, NamedTuple

_NETLINK_SOCK_DIAG: Final = 4
#: Of all families: asked by family, the kernel walks through all of its connections once for each.
_GET_TCP_SOCKETS: Final = 18
_REQUEST_DUMP: Final = 0x301
_ERROR, _DONE = 2, 3
_HEADER: Final = struct.Struct("=IHHII")
#: inet_diag_req; what matters is the states.
_QUESTION: Final = struct.Struct("=52xI4x")
#: A header and inet_diag_msg: length, kind, …, family, state, …, ports, addresses, …, inode.
_ANSWER: Final = struct.Struct("=IH10xBxxx2s2s16s16s28xI")
#: All but TIME_WAIT, CLOSE, LISTEN and NEW_SYN_RECV: those have no connection that somebody holds.
_CONNECTED: Final = 0xFFF & ~(1 << 6 | 1 << 7 | 1 << 10)
_MAPPED: Final = bytes(10) + b"\xff\xff"
_ANSWER_BYTES: Final = 1 << 18
_SOCKET: Final = "socket:["


class Connection(NamedTuple):
    """The two ends of a TCP connection as they are on the network: packed addresses (4 or 16 bytes), packed ports."""

    address: bytes
    port: bytes
    peer_address: bytes
    peer_port: bytes


def connections_of(pids: Iterable[int]) -> set[Connection]:
    """The connections that these processes hold, in the network namespace of this one. Raises `OSError`."""
    inodes = {inode for pid in pids for inode in _sockets(pid)}
    found: set[Connection] = set()
    if not inodes:
        return found
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(5)
        question = _QUESTION.pack(_CONNECTED)
        netlink.send(_HEADER.pack(_HEADER.size + len(question), _GET_TCP_SOCKETS, _REQUEST_DUMP, 0, 0) + question)
        while not _read(netlink.recv(_ANSWER_BYTES), inodes, found):
            pass
    return found


def _read(answer: bytes, inodes: set[int], found: set[Connection]) -> bool:
    """Whether it was the last part. Raises OSError."""
    position = 0
    while position + _HEADER.size <= len(answer):
        length, kind, _flags, _sequence, _port = _HEADER.unpack_from(answer, position)
        if kind == _DONE:
            return True
        if kind == _ERROR:
            number = -struct.unpack_from("=i", answer, position + _HEADER.size)[0]
            raise OSError(number, f"the kernel does not tell of TCP connections: {os.strerror(number)}")
        _, _, family, port, peer_port, address, peer_address, inode = _ANSWER.unpack_from(answer, position)
        position += (length + 3) & ~3
        if inode not in inodes:
            continue
        if family == socket.AF_INET:
            address, peer_address = address[:4], peer_address[:4]
        elif peer_address.startswith(_MAPPED):
            address, peer_address = address[12:], peer_address[12:]
        found.add(Connection(address, port, peer_address, peer_port))
    return False


def _sockets(pid: int) -> list[int]:
    """The inodes of the sockets of a process; empty if it has ended."""
    inodes = []
    with suppress(FileNotFoundError, ProcessLookupError):
        directory = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in os.listdir(directory):
                with suppress(FileNotFoundError):
                    target = os.readlink(name, dir_fd=directory)
                    if target.startswith(_SOCKET):
                        inodes.append(int(target[len(_SOCKET) : -1]))
        finally:
            os.close(directory)
    return inodes
