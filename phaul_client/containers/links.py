"""What a container's node answers for: its links, beside the addresses of the node that move along.

The source takes the outer end of each veth down before it sends the commit, and up again before the container runs on;
so no two nodes ever answer for its addresses.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence

from phaul.v1 import types_pb2
from phaul_client.addresses import Address, arp_announcements
from phaul_client.containers.programs import command
from phaul_client.movers import Addresses

logger = logging.getLogger(__name__)


class Links(Addresses):
    """The addresses of one migration at its source, and the outer ends of its container's links."""

    def __init__(self, addresses: Sequence[Address], links: Sequence[str]) -> None:
        super().__init__(addresses)
        self._links = tuple(links)

    async def withdraw(self) -> None:
        """Answer for nothing any more. Raises `PhaulError`."""
        await self._set("down")
        await super().withdraw()

    async def put_back(self) -> None:
        """Answer again. Raises `PhaulError`."""
        await self._set("up")
        await super().put_back()

    async def _set(self, state: str) -> None:
        for link in self._links:
            if link in os.listdir("/sys/class/net"):  # else it ended with its container
                await command(["ip", "link", "set", "dev", link, state])


def announce(link: types_pb2.ContainerLink, address: str) -> None:
    """A gratuitous ARP from the bridge, in the container's name. What fails is logged: others find out by asking."""
    if not link.bridge or ":" in address:
        return
    try:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind((link.bridge, 0))
            for frame in arp_announcements(address.partition("/")[0], bytes.fromhex(link.mac.replace(":", ""))):
                raw.send(frame)
    except (OSError, ValueError) as exc:
        logger.warning("address not announced address=%s error=%s", address, exc)
