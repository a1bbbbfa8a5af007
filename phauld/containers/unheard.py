"""Keeps a network that is made beforehand from being heard: its addresses are still somebody else's."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncIterator, Iterable

from phaul_client.containers.programs import command


@contextlib.asynccontextmanager
async def unheard(table: str, macs: Iterable[str]) -> AsyncIterator[None]:
    """No bridge here takes a frame of these addresses from a port that is made meanwhile. Raises `PhaulError`.

    The container answers for them at its source. An announcement, or the reset of a connection that the network made
    here knows nothing of, would end its connections there.
    """
    known = ", ".join(json.dumps(each) for each in os.listdir("/sys/class/net"))
    macs = tuple(macs)
    if not macs:
        yield
        return
    rules = (f"add rule bridge {table} here iifname != {{ {known} }} ether saddr {mac} drop" for mac in macs)
    chain = f"add chain bridge {table} here {{ type filter hook prerouting priority -300; }}"
    await command(["nft", "\n".join((_gone(table), f"add table bridge {table}", chain, *rules))])
    try:
        yield
    finally:
        await let_speak(table)


async def let_speak(table: str) -> None:
    """The rules go, if there are any. Raises `PhaulError`."""
    await command(["nft", _gone(table)])


def _gone(table: str) -> str:
    return f"add table bridge {table}\ndelete table bridge {table}"
