"""Connections of which both ends are in the images."""

from __future__ import annotations

import ipaddress
import struct

import pytest

from phaul_criu.chains import framed
from phaul_criu.inner_connections import inner_connections
from phaul_criu.rpc import fdinfo_pb2

MAGICS = b"\x54\x56\x43\x19magc"
TCP, UDP = 6, 17


def files(*sockets: tuple[str, int, str, int, int]) -> bytes:
    """An image with sockets of (address, port, remote address, remote port, protocol), and a pipe."""
    entries = [fdinfo_pb2.file_entry(type=fdinfo_pb2.fd_types.Value("PIPE"), id=7)]
    for address, port, remote, remote_port, protocol in sockets:
        packed = [ipaddress.ip_address(each).packed for each in (address, remote)]
        entry = fdinfo_pb2.file_entry(type=fdinfo_pb2.fd_types.Value("INETSK"), id=1)
        entry.isk.family, entry.isk.proto = 2 if len(packed[0]) == 4 else 10, protocol
        entry.isk.src_port, entry.isk.dst_port = port, remote_port
        entry.isk.src_addr.extend(struct.unpack(f"={len(packed[0]) // 4}I", packed[0]))
        entry.isk.dst_addr.extend(struct.unpack(f"={len(packed[1]) // 4}I", packed[1]))
        entries.append(entry)
    return MAGICS + b"".join(framed(entry.SerializePartialToString()) for entry in entries)


@pytest.mark.parametrize(
    ("ours", "theirs", "protocol", "found"),
    [
        ("127.0.0.1", "127.0.0.1", TCP, 2),
        ("::1", "::1", TCP, 2),
        ("127.0.0.1", "::ffff:127.0.0.1", TCP, 2),  # one end was made as an IPv6 socket
        ("127.0.0.1", "127.0.0.1", UDP, 0),
    ],
)
def test_both_ends(ours: str, theirs: str, protocol: int, found: int) -> None:
    assert len(inner_connections(files((ours, 1, ours, 2, protocol), (theirs, 2, theirs, 1, protocol)))) == found


def test_one_end_and_a_listener() -> None:
    assert inner_connections(files(("10.0.0.1", 1, "10.0.0.2", 2, TCP), ("0.0.0.0", 2, "0.0.0.0", 0, TCP))) == set()


def test_what_is_no_image() -> None:
    with pytest.raises(ValueError, match="damaged"):
        inner_connections(MAGICS + framed(b"\xff\xff"))
