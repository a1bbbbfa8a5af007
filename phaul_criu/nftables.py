"""Transactions with nf_tables, the kernel's packet filter, in the network namespace of this process."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from typing import Final

from phaul_criu import nft_messages

_NETLINK_NETFILTER: Final = 12
_SO_SNDBUFFORCE: Final = 32
_SEND_BYTES: Final = 64 << 20  # a transaction is one message, however long; nothing is reserved
_ANSWER_BYTES: Final = 1 << 16
_SECONDS: Final = 5.0


def open_netfilter() -> socket.socket:
    """A socket for `transact`. Raises OSError."""
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    try:
        netlink.settimeout(_SECONDS)
        netlink.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BYTES)
        netlink.bind((0, 0))
    except BaseException:
        netlink.close()
        raise
    return netlink


def transact(netlink: socket.socket, messages: Sequence[bytes], what: str) -> None:
    """Do all of it or nothing. Raises OSError, after which the socket is good for nothing but to be closed."""
    netlink.send(nft_messages.batch(messages))
    answered = 0
    while answered < len(messages):
        try:
            answers = nft_messages.errors(netlink.recv(_ANSWER_BYTES))
        except ValueError as exc:
            raise OSError(errno.EPROTO, f"{what}: {exc}") from exc
        for number in answers:
            if number:
                raise OSError(number, f"{what}: {os.strerror(number)}")
            answered += 1
