"""Asks a UDP socket of another process whether it is corked: no file in /proc tells."""

from __future__ import annotations

import os
import socket
from typing import Final

from phaul_criu.foreign_sockets import copy_of

_UDP_CORK: Final = 1


def is_corked(pid: int, fd: int) -> bool:
    """Whether the socket holds back what is sent; False if it cannot be asked."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        asked = copy_of(pidfd, fd)
    finally:
        os.close(pidfd)
    if asked is None:
        return False
    with asked:
        return asked.type == socket.SOCK_DGRAM and asked.getsockopt(socket.IPPROTO_UDP, _UDP_CORK) != 0
