"""TCP connections of which both ends are in the images (pure).

criu makes the ends one after the other. What one end has not sent yet it sends while it is restored, and where the
other end is not there yet, the kernel answers with a reset: "Can't restore not-sent send queue data: Broken pipe"
(soccr/soccr.c, send_queue; seen with criu 4.2). On the node where the tree was dumped criu's own lock would still hold
the reset back; elsewhere nothing does (`connection_lock.ConnectionLock.hold_resets`).
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import Any, Final

from google.protobuf.message import DecodeError

from phaul_criu.chains import messages
from phaul_criu.connections import Connection
from phaul_criu.rpc import fdinfo_pb2

_INETSK: Final = fdinfo_pb2.fd_types.Value("INETSK")


def inner_connections(files: bytes) -> set[Connection]:
    """Each of them twice, once from either end. Raises ValueError if the bytes are no `files.img`."""
    found: set[Connection] = set()
    for content in messages(files):
        try:
            entry = fdinfo_pb2.file_entry.FromString(content)
        except DecodeError as exc:
            raise ValueError("files.img is damaged") from exc
        if entry.type == _INETSK and entry.isk.proto == socket.IPPROTO_TCP and entry.isk.dst_port:
            found.add(_connection(entry.isk))
    return {each for each in found if Connection(*each[2:], *each[:2]) in found}


def _connection(entry: Any) -> Connection:
    return Connection(
        _address(entry.family, entry.src_addr),
        struct.pack("!H", entry.src_port),
        _address(entry.family, entry.dst_addr),
        struct.pack("!H", entry.dst_port),
    )


def _address(family: int, words: list[int]) -> bytes:
    packed = struct.pack(f"={len(words)}I", *words)
    if family == socket.AF_INET:
        return packed[:4]
    mapped = ipaddress.IPv6Address(packed).ipv4_mapped
    return mapped.packed if mapped else packed
