"""Removes the network lock that a successful dump leaves behind.

With the NFTABLES lock criu makes a table "inet CRIU-…" that drops the packets of the tree's TCP connections. It removes
it when the tree runs on, or when the tree is restored in the same network namespace; after a migration to another node
nobody does, and every further dump takes longer the more of these tables there are (measured: 60 ms → 250 ms with 88).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Final

from phaul_criu.inventory import lock_table_name

_NETLINK_NETFILTER: Final = 12
_SUBSYSTEM_NFTABLES: Final = 10
_BATCH_BEGIN: Final = 16
_BATCH_END: Final = 17
_DELETE_TABLE: Final = _SUBSYSTEM_NFTABLES << 8 | 2
_FAMILY_INET: Final = 1
_ATTRIBUTE_TABLE_NAME: Final = 1
_FLAG_REQUEST, _FLAG_ACK = 1, 4
_MESSAGE_ERROR: Final = 2
_HEADER: Final = struct.Struct("=IHHII")


def remove_network_lock(images_dir_fd: int) -> bool:
    """Remove the lock of the dump whose images lie in the directory; whether there was one.

    To be called in the network namespace of the tree (that of the dumping criu, unless the tree has its own), when the
    tree's addresses belong to the destination: from then on packets to this node are answered with a reset. Raises
    OSError if it may not be removed, or if the images have no inventory; ValueError if that is damaged.
    """
    with open(os.open("inventory.img", os.O_RDONLY | os.O_CLOEXEC, dir_fd=images_dir_fd), "rb") as file:
        name = lock_table_name(file.read())
    return name is not None and _delete_table(name)


def _delete_table(name: str) -> bool:
    attribute = struct.pack("=HH", 4 + len(name) + 1, _ATTRIBUTE_TABLE_NAME) + name.encode() + b"\0"
    attribute += bytes(-len(attribute) % 4)
    batch = (
        _message(_BATCH_BEGIN, _FLAG_REQUEST, _generic(0, _SUBSYSTEM_NFTABLES))
        + _message(_DELETE_TABLE, _FLAG_REQUEST | _FLAG_ACK, _generic(_FAMILY_INET, 0) + attribute)
        + _message(_BATCH_END, _FLAG_REQUEST, _generic(0, _SUBSYSTEM_NFTABLES))
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as netlink:
        netlink.settimeout(5)
        netlink.bind((0, 0))
        netlink.send(batch)
        number = _error_number(netlink.recv(8192))
    if number == errno.ENOENT:
        return False
    if number:
        raise OSError(number, f"cannot delete nftables table inet {name}: {os.strerror(number)}")
    return True


def _message(kind: int, flags: int, payload: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(payload), kind, flags, 1, 0) + payload


def _generic(family: int, resource: int) -> bytes:
    return struct.pack("=BBH", family, 0, socket.htons(resource))


def _error_number(answer: bytes) -> int:
    _length, kind, _flags, _sequence, _port = _HEADER.unpack_from(answer)
    if kind != _MESSAGE_ERROR:
        raise OSError(errno.EPROTO, "netlink did not answer")
    (negative,) = struct.unpack_from("=i", answer, _HEADER.size)
    return -int(negative)
