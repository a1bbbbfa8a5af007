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

_INTERFACE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}")
_ETHERNET_ARP: Final = 0x0806
_BROADCAST: Final = b"\xff" * 6
_NEIGHBOUR_ADVERTISEMENT: Final = 136
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


def mute_rules(table: str, addresses: tuple[Address, ...]) -> str:
    """For `nft -f`: nobody is answered under these addresses, neither for them. Loaded again, it changes nothing."""
    lines = []
    for family, rule in (("inet", _mute_inet), ("arp", _mute_arp)):
        rules = [text for each in addresses for text in rule(each)]
        lines += [f"table {family} {table}", f"delete table {family} {table}", f"table {family} {table} {{"]
        lines += ["chain in {", f"type filter hook input priority {-300 if family == 'inet' else 0};", *rules, "}"]
        if family == "inet":
            says = [f"{'ip6' if each.is_six else 'ip'} saddr {each.ip} drop" for each in addresses]
            lines += ["chain out {", "type filter hook output priority -300;", *says, "}"]
        lines.append("}")
    return "\n".join(lines) + "\n"


def unmute_rules(table: str) -> str:
    """For `nft -f`: undo `mute_rules`, if they are there."""
    return "".join(f"table {family} {table}\ndelete table {family} {table}\n" for family in ("inet", "arp"))


def _mute_inet(address: Address) -> tuple[str, ...]:
    if not address.is_six:
        return (f"ip daddr {address.ip} drop",)
    target = ipaddress.IPv6Address(address.ip).packed.hex()
    return (f"ip6 daddr {address.ip} drop", f"icmpv6 type nd-neighbor-solicit @th,64,128 0x{target} drop")


def _mute_arp(address: Address) -> tuple[str, ...]:
    return () if address.is_six else (f"arp daddr ip {address.ip} drop",)


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
