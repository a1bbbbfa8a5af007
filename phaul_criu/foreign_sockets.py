"""Sockets of other processes, to ask them what no file in /proc tells. The standard library alone."""

from __future__ import annotations

import ctypes
import socket
from typing import Final

_PIDFD_GETFD: Final = 438  # the same on every architecture
_LIBC: Final = ctypes.CDLL(None)


def copy_of(pidfd: int, fd: int) -> socket.socket | None:
    """The very socket that is this descriptor of a process; None if it cannot be had."""
    copy = _LIBC.syscall(_PIDFD_GETFD, pidfd, fd, 0)
    return socket.socket(fileno=copy) if copy >= 0 else None
