"""Asks a UDP socket of another process whether it is corked: no file in /proc tells."""

from __future__ import annotations

import ctypes
import os
import socket
from typing import Final

_PIDFD_GETFD: Final = 438  # the same on every architecture
_UDP_CORK: Final = 1
_LIBC: Final = ctypes.CDLL(None)


def is_corked(pid: int, fd: int) -> bool:
    """Whether the socket holds back what is sent; False if it cannot be asked."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        copy = _LIBC.syscall(_PIDFD_GETFD, pidfd, fd, 0)
    finally:
        os.close(pidfd)
    if copy < 0:
        return False
    with socket.socket(fileno=copy) as asked:
        return asked.type == socket.SOCK_DGRAM and asked.getsockopt(socket.IPPROTO_UDP, _UDP_CORK) != 0
