"""What phauld tells systemd: that it serves, that it stops, and that its event loop turns.

The protocol of sd_notify(3): datagrams to the socket that `NOTIFY_SOCKET` names. The invariant: nothing that goes wrong
here fails phauld; without systemd every call does nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Mapping
from typing import Final

logger = logging.getLogger(__name__)

#: Feeds in the time that systemd waits for one: two may come late.
FEEDS_IN_TIME: Final = 3


class Notifier:
    """Speaks to the socket at `address`; to nobody if it is empty. `watchdog_seconds` is how long systemd waits."""

    def __init__(self, address: str, watchdog_seconds: float | None) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self.watchdog_seconds = watchdog_seconds  #: `None`: no watchdog

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ, pid: int | None = None) -> Notifier:
        """The one that systemd's variables ask for; those meant for another process are ignored."""
        microseconds = environment.get("WATCHDOG_USEC", "")
        is_meant = environment.get("WATCHDOG_PID", "") in ("", str(os.getpid() if pid is None else pid))
        watches = microseconds.isdigit() and int(microseconds) > 0 and is_meant
        return cls(environment.get("NOTIFY_SOCKET", ""), int(microseconds) / 1_000_000 if watches else None)

    def ready(self, status: str) -> None:
        """phauld serves."""
        self._send("READY=1", status)

    def stopping(self, status: str) -> None:
        """phauld was told to stop, and brings to an end what it does."""
        self._send("STOPPING=1", status)

    async def feed_watchdog(self, status: Callable[[], str]) -> None:
        """Until cancelled: say that the event loop turns, and the status. It is said from the loop, so a stuck one
        does not say it.
        """
        if self.watchdog_seconds is None:
            return
        while True:
            self._send("WATCHDOG=1", status())
            await asyncio.sleep(self.watchdog_seconds / FEEDS_IN_TIME)

    def _send(self, state: str, status: str) -> None:
        if not self._address:
            return
        message = f"{state}\nSTATUS={' '.join(status.split())}".encode()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)  # a full queue of a busy systemd must not stop the loop
                with contextlib.suppress(BlockingIOError):
                    sock.sendto(message, self._address)
        except OSError as exc:
            logger.warning("systemd was not told %s error=%s", state, exc)
