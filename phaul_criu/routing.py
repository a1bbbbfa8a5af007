"""Gives an address to an interface and takes it away: what `ip address` does, without a program to start."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from typing import Final

_NETLINK_ROUTE: Final = 0
_NEW_ADDRESS, _DELETE_ADDRESS = 20, 21
_REQUEST, _ACK, _EXCLUSIVE, _CREATE = 0x1, 0x4, 0x200, 0x400
_ERROR: Final = 2
_HEADER: Final = struct.Struct("=IHHII")
_ADDRESS, _LOCAL = 1, 2
_NO_DETECTION: Final = 0x02  # IFA_F_NODAD
_SECONDS: Final = 5.0
_ANSWER_BYTES: Final = 1 << 16


def add_address(ip: str, prefix: int, interface: str) -> None:
    """Raises OSError. One of IPv6 is good at once: whether another node has it is not looked for."""
    _change(_NEW_ADDRESS, _CREATE | _EXCLUSIVE, ip, prefix, interface)


def delete_address(ip: str, prefix: int, interface: str) -> None:
    """Raises OSError."""
    _change(_DELETE_ADDRESS, 0, ip, prefix, interface)


def _change(kind: int, flags: int, ip: str, prefix: int, interface: str) -> None:
    parsed = ipaddress.ip_address(ip)
    is_six = parsed.version == 6
    message = struct.pack(
        "=BBBBI",
        socket.AF_INET6 if is_six else socket.AF_INET,
        prefix,
        _NO_DETECTION if is_six and kind == _NEW_ADDRESS else 0,
        0,
        socket.if_nametoindex(interface),
    )
    for attribute in (_LOCAL, _ADDRESS):
        message += struct.pack("=HH", 4 + len(parsed.packed), attribute) + parsed.packed
    head = _HEADER.pack(_HEADER.size + len(message), kind, flags | _REQUEST | _ACK, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE) as netlink:
        netlink.settimeout(_SECONDS)
        netlink.send(head + message)
        answer = netlink.recv(_ANSWER_BYTES)
    if len(answer) < _HEADER.size + 4 or _HEADER.unpack_from(answer)[1] != _ERROR:
        raise OSError(errno.EPROTO, "netlink gave another answer than whether it was done")
    if number := -struct.unpack_from("=i", answer, _HEADER.size)[0]:
        raise OSError(number, f"{ip}/{prefix} at {interface}: {os.strerror(number)}")
