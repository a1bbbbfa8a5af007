"""Takes an address from an interface and gives it to one, mute or announced. Every act can be repeated.

In the network namespace of phauld; a tree with a network of its own carries its addresses itself. The tree stands still
meanwhile, so the kernel is told by netlink: to start `ip` or `nft` takes longer than all that they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from phaul_client.addresses import (
    Address,
    arp_announcements,
    mute_messages,
    mute_table,
    neighbour_advertisement,
    unmute_messages,
)
from phaul_client.errors import PhaulError
from phaul_criu import child
from phaul_criu.nftables import open_netfilter, transact
from phaul_criu.routing import add_address, delete_address

logger = logging.getLogger(__name__)

COMMAND_SECONDS: Final = 5.0
_ALL_NODES: Final = "ff02::1"
_SIOCGIFHWADDR: Final = 0x8927  # linux/sockios.h
_ARPHRD_ETHER: Final = 1


class Link(NamedTuple):
    """An interface and the addresses that it has."""

    name: str
    addresses: tuple[Address, ...]


async def links() -> tuple[Link, ...]:
    """The interfaces of this node. Raises `PhaulError`."""
    found = json.loads(await _run(["ip", "-json", "address", "show"]) or "[]")
    return tuple(
        Link(
            each["ifname"],
            tuple(
                Address(info["local"], info["prefixlen"], each["ifname"])
                for info in each.get("addr_info", ())
                if "local" in info
            ),
        )
        for each in found
        if "ifname" in each
    )


async def find(ip: str) -> Address | None:
    """Where this node has the address. Raises `PhaulError`."""
    return next((has for link in await links() for has in link.addresses if has.ip == ip), None)


class Addresses:
    """The addresses of one migration at this node; `Addresses()` has none and does nothing."""

    def __init__(self, addresses: Sequence[Address] = (), migration_id: str = "") -> None:
        self.addresses = tuple(addresses)
        self._table = mute_table(migration_id)

    async def withdraw(self) -> None:
        """Take them away: this node answers for them no more. Raises `PhaulError`."""
        for each in self.addresses:
            with _secondaries_stay(each.interface):
                await _unless(each, False, delete_address)
            logger.info("address withdrawn address=%s", each)

    async def put_back(self) -> None:
        """Have them again, and say so. Raises `PhaulError`."""
        for each in self.addresses:
            await _add(each)
            logger.info("address put back address=%s", each)
            announce(each)

    async def hold(self) -> None:
        """Have them without answering for them. Raises `PhaulError`; what was begun is left to `drop`."""
        await self.mute()
        for each in self.addresses:
            await _add(each)

    async def mute(self) -> None:
        """Neither answer for them nor say anything from them. Raises `PhaulError`."""
        if self.addresses:
            self._tell(mute_messages(self._table, self.addresses))

    async def show(self) -> None:
        """Answer for them from now on, and say so. Raises `PhaulError`."""
        if self.addresses:
            self._tell(unmute_messages(self._table))
        for each in self.addresses:
            announce(each)
            logger.info("address announced address=%s", each)

    async def drop(self) -> None:
        """Undo `hold`. Raises `PhaulError`."""
        await self.withdraw()
        if self.addresses:
            self._tell(unmute_messages(self._table))

    def _tell(self, messages: Sequence[bytes]) -> None:
        try:
            with closed_soon(open_netfilter()) as netlink:
                transact(netlink, messages, f"nftables table {self._table}")
        except OSError as exc:
            raise PhaulError(str(exc), remedy="the kernel's nf_tables, and CAP_NET_ADMIN") from exc


def announce(address: Address) -> None:
    """Tell the neighbours where it is now. What fails is logged: they find out by asking."""
    try:
        mac = _mac_of(address.interface)
        if mac is None:
            return
        if address.is_six:
            with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as raw:
                index = socket.if_nametoindex(address.interface)
                raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
                raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
                raw.sendto(neighbour_advertisement(address.ip, mac), (_ALL_NODES, 0, 0, index))
        else:
            with closed_soon(socket.socket(socket.AF_PACKET, socket.SOCK_RAW)) as raw:
                raw.bind((address.interface, 0))
                for frame in arp_announcements(address.ip, mac):
                    raw.send(frame)
    except (OSError, ValueError) as exc:
        logger.warning("address not announced address=%s error=%s", address, exc)


def _mac_of(interface: str) -> bytes | None:
    """Its hardware address; `None` if it has none of Ethernet's. Raises `OSError`.

    Asked of a socket: /sys shows the interfaces of the network namespace that it was mounted in.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        answer = fcntl.ioctl(asking, _SIOCGIFHWADDR, struct.pack("16s24x", interface.encode()))
    kind: int
    kind, mac = struct.unpack_from("H6s", answer, 16)
    return mac if kind == _ARPHRD_ETHER else None


@contextlib.contextmanager
def closed_soon(sock: socket.socket) -> Iterator[socket.socket]:
    """Close it beside: the kernel waits for all processors then, for 5 to 16 ms, and all has been done before."""
    try:
        yield sock
    finally:
        threading.Thread(target=sock.close, name="close", daemon=True).start()


async def _add(address: Address) -> None:
    await _unless(address, True, add_address)


async def _unless(address: Address, is_here: bool, act: Callable[[str, int, str], None]) -> None:
    """Do it; that it fails is no error if the address is here, or not here, as wanted. Looking first takes longer."""
    try:
        prefix = int(address.network.partition("/")[2])
        act(address.ip, prefix, address.interface)
    except OSError as exc:
        if (await find(address.ip) is not None) is not is_here:
            raise PhaulError(f"{address}: {exc}") from exc


class _secondaries_stay(contextlib.AbstractContextManager[None]):
    """Taking the first address of a network from an interface takes the others along, unless this is set."""

    def __init__(self, interface: str) -> None:
        self._setting = Path(f"/proc/sys/net/ipv4/conf/{interface}/promote_secondaries")
        self._before = ""

    def __enter__(self) -> None:
        with contextlib.suppress(OSError):
            self._before = self._setting.read_text()
            self._setting.write_text("1")

    def __exit__(self, *_exc: object) -> None:
        with contextlib.suppress(OSError):
            self._setting.write_text(self._before)


async def _run(argv: Sequence[str]) -> str:
    output = os.memfd_create("output", os.MFD_CLOEXEC)
    try:
        async with (
            asyncio.timeout(COMMAND_SECONDS),
            await child.spawn(argv, stdout=output) as running,
        ):
            status = await running.wait()
        if status != 0:
            raise PhaulError(f"{' '.join(argv)}: {running.stderr_tail or f'status {status}'}")
        return os.pread(output, os.fstat(output).st_size, 0).decode()
    except (OSError, TimeoutError) as exc:
        raise PhaulError(
            f"{' '.join(argv)}: {str(exc) or 'no answer in time'}", remedy="apt-get install iproute2"
        ) from exc
    finally:
        os.close(output)
