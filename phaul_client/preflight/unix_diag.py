"""Asks the kernel about unix sockets: /proc/net/unix does not tell who is connected to whom."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_FLAG_REQUEST_DUMP: Final = 0x301
_DONE, _ERROR = 3, 2
_SHOW_NAME, _SHOW_PEER, _SHOW_ICONS, _SHOW_QUEUES = 1, 4, 8, 16
_NAME, _PEER, _ICONS, _QUEUES = 0, 2, 3, 4
_LISTEN: Final = 10
_HEADER: Final = struct.Struct("=IHHII")
_REQUEST: Final = struct.Struct("=BBHIIIII")
_MESSAGE: Final = struct.Struct("=BBBxI8x")


@dataclass(frozen=True, slots=True)
class UnixDiag:
    """One unix socket of a network namespace."""

    inode: int
    type: int
    listening: bool
    #: Path, "@abstract", or empty.
    name: str
    #: 0: none.
    peer_inode: int
    #: Inodes of connections that wait to be accepted.
    waiting: tuple[int, ...]
    #: Bytes that it has sent and the other end has not read.
    unread_bytes: int = 0


def read_unix_sockets() -> dict[int, UnixDiag]:
    """Every unix socket of this thread's network namespace, by inode. Raises OSError."""
    show = _SHOW_NAME | _SHOW_PEER | _SHOW_ICONS | _SHOW_QUEUES
    request = _REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, show, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(5)
        header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _FLAG_REQUEST_DUMP, 1, 0)
        netlink.send(header + request)
        return {found.inode: found for found in _messages(netlink)}


def _messages(netlink: socket.socket) -> Iterator[UnixDiag]:
    while True:
        data = netlink.recv(1 << 18)
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, _flags, _sequence, _port = _HEADER.unpack_from(data, offset)
            payload = data[offset + _HEADER.size : offset + length]
            if kind == _DONE:
                return
            if kind == _ERROR:
                (number,) = struct.unpack_from("=i", payload)
                raise OSError(-number, "the kernel has no unix_diag")
            yield parse_unix_diag(payload)
            offset += length + 3 & ~3


def parse_unix_diag(payload: bytes) -> UnixDiag:
    """One message of the kernel's answer."""
    _family, kind, state, inode = _MESSAGE.unpack_from(payload)
    attributes = dict(_attributes(payload[_MESSAGE.size :]))
    icons = attributes.get(_ICONS, b"")
    return UnixDiag(
        inode=inode,
        type=kind,
        listening=state == _LISTEN,
        name=_name(attributes.get(_NAME, b"")),
        peer_inode=struct.unpack("=I", attributes[_PEER][:4])[0] if _PEER in attributes else 0,
        waiting=struct.unpack(f"={len(icons) // 4}I", icons),
        unread_bytes=struct.unpack("=II", attributes[_QUEUES][:8])[1] if _QUEUES in attributes else 0,
    )


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4:
            return
        yield kind, data[offset + 4 : offset + length]
        offset += length + 3 & ~3


def _name(raw: bytes) -> str:
    if raw[:1] == b"\0":
        return "@" + raw[1:].decode(errors="backslashreplace")
    return raw.rstrip(b"\0").decode(errors="backslashreplace")
