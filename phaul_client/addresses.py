"""Addresses that move with a tree: how they are written, and the packets and rules that it takes (pure).

Both nodes have the address for a moment, since a restored connection needs it; but only one answers for it. The
source's has it until COMMITTED is in its journal. The destination's is mute, by a netfilter table, until COMMITTING
is in its own; before it kills a copy that it had begun to let go, it is mute again, so that no peer sees a reset.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from dataclasses import dataclass
from typing import Final

from phaul_client.errors import InvalidRequest
from phaul_criu import nft_messages as nft

_INTERFACE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}")
_ETHERNET_ARP: Final = 0x0806
_BROADCAST: Final = b"\xff" * 6
_ICMP6: Final = 58
_NEIGHBOUR_SOLICITATION, _NEIGHBOUR_ADVERTISEMENT = 135, 136
#: Ethernet, IPv4, and how long their addresses are: how such a message begins.
_ARP_OF_IPV4: Final = bytes.fromhex("0001 0800 06 04")
_INET_CHAINS: Final = (("in", nft.HOOK_INPUT), ("out", nft.HOOK_OUTPUT))
_ARP_CHAINS: Final = (("in", nft.HOOK_ARP_INPUT),)
_OVERRIDE: Final = 0x20000000


@dataclass(frozen=True, slots=True)
class Address:
    """One address. Without a length or an interface: as the source's."""

    ip: str
    prefix: int | None = None
    interface: str = ""

    @property
    def is_six(self) -> bool:
        return ":" in self.ip

    @property
    def network(self) -> str:
        """ADDRESS/LENGTH."""
        return f"{self.ip}/{self.prefix if self.prefix is not None else 128 if self.is_six else 32}"

    def __str__(self) -> str:
        length = f"/{self.prefix}" if self.prefix is not None else ""
        return f"{self.ip}{length}" + (f"@{self.interface}" if self.interface else "")


def parse_address(text: str) -> Address:
    """ADDRESS[/LENGTH][@INTERFACE]. Raises `InvalidRequest`."""
    written, at, interface = text.partition("@")
    ip, slash, length = written.partition("/")
    try:
        parsed = ipaddress.ip_address(ip)
    except ValueError:
        raise InvalidRequest(f"{text!r} is not ADDRESS[/LENGTH][@INTERFACE]") from None
    if getattr(parsed, "scope_id", None) or parsed.is_loopback or parsed.is_multicast or parsed.is_unspecified:
        raise InvalidRequest(f"{ip} is no address that can move")
    if slash and not (length.isdecimal() and int(length) <= parsed.max_prefixlen):
        raise InvalidRequest(f"{length!r} is no length of a prefix of {ip}")
    if at and not _INTERFACE.fullmatch(interface):
        raise InvalidRequest(f"{interface!r} is no name of an interface")
    return Address(str(parsed), int(length) if slash else None, interface)


def mute_table(migration_id: str) -> str:
    """The name of the tables that mute the addresses of a migration."""
    return "phaul_" + migration_id.replace("-", "_")


def mute_messages(table: str, addresses: tuple[Address, ...]) -> list[bytes]:
    """Nobody is answered under these addresses, neither for them. Sent again, it changes nothing.

    But criu is heard: it makes a half closed connection by sending to itself what its peer had sent.
    """
    by_criu = (*nft.mark_is(nft.CRIU_MARK), nft.verdict(nft.ACCEPT))
    drop = nft.verdict(nft.DROP)
    messages = []
    for family, chains in ((nft.INET, _INET_CHAINS), (nft.ARP, _ARP_CHAINS)):
        messages += [nft.new_table(table, family), nft.delete_table(table, family), nft.new_table(table, family)]
        for chain, hook in chains:
            messages.append(nft.new_chain(table, chain, hook, family))
            matches = [match for each in addresses for match in _muted(each, hook, family)]
            rules = [*([by_criu] if family == nft.INET else []), *((*match, drop) for match in matches)]
            messages += [nft.new_rule(table, chain, *rule, family=family) for rule in rules]
    return messages


def unmute_messages(table: str) -> list[bytes]:
    """Undo `mute_messages`, if that is to be undone."""
    return [make(table, family) for family in (nft.INET, nft.ARP) for make in (nft.new_table, nft.delete_table)]


def _muted(address: Address, hook: int, family: int) -> list[tuple[bytes, ...]]:
    """What packets are to be dropped there."""
    packed = ipaddress.ip_address(address.ip).packed
    if family == nft.ARP:
        return [] if address.is_six else [(*nft.part_is(False, 0, _ARP_OF_IPV4), *nft.part_is(False, 24, packed))]
    if not address.is_six:
        return [(*nft.network_is(nft.IPV4), *nft.part_is(False, 16 if hook == nft.HOOK_INPUT else 12, packed))]
    if hook == nft.HOOK_OUTPUT:
        return [(*nft.network_is(nft.IPV6), *nft.part_is(False, 8, packed))]
    return [
        (*nft.network_is(nft.IPV6), *nft.part_is(False, 24, packed)),
        (
            *nft.network_is(nft.IPV6),
            *nft.transport_is(_ICMP6),
            *nft.part_is(True, 0, bytes([_NEIGHBOUR_SOLICITATION])),
            *nft.part_is(True, 8, packed),
        ),
    ]


def arp_announcements(ip: str, mac: bytes) -> tuple[bytes, bytes]:
    """Ethernet frames of a gratuitous ARP, as a request and as a reply: peers heed one or the other (RFC 5944, 4.6)."""
    packed = ipaddress.IPv4Address(ip).packed
    header = _BROADCAST + mac + struct.pack("!H", _ETHERNET_ARP)
    request, reply = (
        header
        + struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation)
        + mac
        + packed
        + (bytes(6) if operation == 1 else mac)
        + packed
        for operation in (1, 2)
    )
    return request, reply


def neighbour_advertisement(ip: str, mac: bytes) -> bytes:
    """An unsolicited one (RFC 4861, 7.2.6) for ff02::1; the kernel fills in the checksum."""
    head = struct.pack("!BBHI", _NEIGHBOUR_ADVERTISEMENT, 0, 0, _OVERRIDE)
    return head + ipaddress.IPv6Address(ip).packed + b"\x02\x01" + mac
