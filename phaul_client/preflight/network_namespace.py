"""Runs a function in another process's network namespace, in a thread of its own."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from phaul_client.tree import shares_namespace

_Result = TypeVar("_Result")
_CLONE_NEWNET = 0x40000000


def in_network_namespace_of(pid: int, function: Callable[[], _Result]) -> _Result:
    """What the function returns or raises. Raises OSError if the namespace cannot be entered (root may)."""
    if shares_namespace(pid, "net"):
        return function()
    outcome: list[_Result | BaseException] = []

    def run() -> None:
        try:
            _enter(pid)
            outcome.append(function())
        except BaseException as exc:
            outcome.append(exc)

    # a namespace belongs to a thread: this one ends with it
    thread = threading.Thread(target=run, name="preflight-netns")
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _enter(pid: int) -> None:
    descriptor = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot enter the network namespace of {pid}: {os.strerror(number)}")
    finally:
        os.close(descriptor)
