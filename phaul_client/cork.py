"""Undoing criu's TCP_CORK from outside: the page socket is shared with criu.

criu corks it, and ends a stream with a small message and a wait for the answer, which the kernel then holds back for
200 ms (criu/page-xfer.c, connect_to_page_server and disconnect_from_page_server).
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from typing import Final

#: How long the end of a round may be held back.
INTERVAL_SECONDS: Final = 0.01


def uncork(descriptor: int) -> None:
    """Let the socket send what it has; nothing happens to one that is not TCP, or closed."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as page_socket:
        if page_socket.family in (socket.AF_INET, socket.AF_INET6):
            page_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            page_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)


@contextlib.asynccontextmanager
async def uncorked(descriptor: int) -> AsyncIterator[None]:
    """Uncork it again and again: a pre-dump does not say when it has corked."""

    async def repeat() -> None:
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            uncork(descriptor)

    task = asyncio.create_task(repeat(), name="uncork")
    try:
        yield
    finally:
        task.cancel()
