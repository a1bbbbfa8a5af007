"""Finds what an epoll still watches although its process has closed it.

The kernel keeps watching a file until its last descriptor is closed, in whatever process; criu can restore it only if
the process itself still has the file open, under any number. kcmp(2) tells.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Collection, Iterator
from typing import Final

from phaul_client.preflight.proc_files import read_stat, try_text
from phaul_client.preflight.proc_text import parse_epoll

_KCMP_NUMBERS: Final = {"x86_64": 312, "aarch64": 272}
_KCMP_FILE: Final = 0
_KCMP_EPOLL_TARGET: Final = 7
_SAME: Final = 0
_LIBC: Final = ctypes.CDLL(None)


class _Slot(ctypes.Structure):
    _fields_ = (("epoll", ctypes.c_uint32), ("target", ctypes.c_uint32), ("offset", ctypes.c_uint32))


def watched_but_closed(pid: int, epoll: int, descriptors: Collection[int]) -> tuple[int, ...]:
    """What the epoll watches and none of the process's descriptors is; empty if the kernel cannot tell."""
    return tuple(_closed(pid, epoll, parse_epoll(try_text(f"/proc/{pid}/fdinfo/{epoll}")), descriptors))


def is_of_parent(pid: int, fd: int) -> bool:
    """Whether its parent has the same open file under the same number, as after a fork."""
    number, stat = _KCMP_NUMBERS.get(platform.machine()), read_stat(pid)
    if number is None or stat is None:
        return False
    return bool(_LIBC.syscall(number, pid, stat.parent_pid, _KCMP_FILE, fd, fd) == _SAME)


def _closed(pid: int, epoll: int, targets: tuple[int, ...], descriptors: Collection[int]) -> Iterator[int]:
    for target in dict.fromkeys(targets):
        slot = _Slot(epoll, target, 0)
        likely_first = (target, *descriptors) if target in descriptors else tuple(descriptors)
        answers = {_compare(pid, fd, slot) for fd in likely_first[:1]}
        if _SAME not in answers:
            answers |= {_compare(pid, fd, slot) for fd in likely_first[1:]}
        if _SAME not in answers and not any(answer < 0 for answer in answers):
            yield target


def _compare(pid: int, fd: int, slot: _Slot) -> int:
    """0: the same file; more: another one; -1: unknown."""
    number = _KCMP_NUMBERS.get(platform.machine())
    if number is None:
        return -1
    answer: int = _LIBC.syscall(number, pid, pid, _KCMP_EPOLL_TARGET, fd, ctypes.byref(slot))
    return answer
