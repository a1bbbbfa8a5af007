"""Keeps packets from the TCP connections of a frozen tree: all of them locked in one transaction of the kernel.

criu's own lock does the same with two transactions for each connection. This one is asked for when criu holds the tree
and has not looked at a socket yet. The invariant: the kernel removes the lock with the last descriptor of its socket,
so it never outlives both of those who hold one, phauld and criu; a tree that criu lets run on is never left locked.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from typing import Self

from phaul_criu import nft_messages
from phaul_criu.connections import connections_of
from phaul_criu.nft_messages import ACCEPT, CRIU_MARK, DROP, HOOK_INPUT, HOOK_OUTPUT, IPV4, IPV6
from phaul_criu.nftables import open_netfilter, transact

_TYPE_IPV4, _TYPE_IPV6, _TYPE_PORT = 7, 8, 13


class ConnectionLock:
    """A lock that locks nothing yet. Its descriptor is to be passed on to criu; close it, or `release` it."""

    def __init__(self, table: str, netlink: socket.socket) -> None:
        self._table = table
        self._netlink = netlink

    @classmethod
    def open(cls, table: str) -> Self:
        """Make the table in the network namespace of this process. Raises `OSError`, on kernels before 5.12 as well."""
        netlink = open_netfilter()
        try:
            lock = cls(table, netlink)
            lock._send([nft_messages.new_owned_table(table), *_rules(table)])
        except BaseException:
            netlink.close()
            raise
        return lock

    def fileno(self) -> int:
        return self._netlink.fileno()

    def lock(self, pids: Iterable[int]) -> int:
        """Lock every connection that these processes hold; how many. They must stand still. Raises `OSError`."""
        connections = connections_of(pids)
        keys: dict[str, list[bytes]] = {"ipv4": [], "ipv6": []}
        for each in connections:
            family = "ipv4" if len(each.address) == 4 else "ipv6"
            keys[family].append(each.address + each.port + b"\0\0" + each.peer_address + each.peer_port + b"\0\0")
        messages = [
            message for name, found in keys.items() for message in nft_messages.new_elements(self._table, name, found)
        ]
        if messages:
            self._send(messages)
        return len(connections)

    def release(self) -> None:
        """Remove it now, whoever else holds its socket. Raises `OSError`."""
        with self._netlink:
            self._send([nft_messages.delete_table(self._table)])

    def close(self) -> None:
        """Let go of it: it ends with whoever else holds its socket."""
        self._netlink.close()

    def _send(self, messages: Sequence[bytes]) -> None:
        transact(self._netlink, messages, f"nftables table inet {self._table}")


def _rules(table: str) -> list[bytes]:
    """Packets of the connections in the sets are dropped, but for criu's own."""
    messages = []
    for number, (name, address_type, address_bytes) in enumerate(
        (("ipv4", _TYPE_IPV4, 4), ("ipv6", _TYPE_IPV6, 16)), start=1
    ):
        key_type = address_type << 18 | _TYPE_PORT << 12 | address_type << 6 | _TYPE_PORT
        messages.append(nft_messages.new_set(table, name, number, key_type, 2 * (address_bytes + 4)))
    for chain, hook in (("in", HOOK_INPUT), ("out", HOOK_OUTPUT)):
        messages.append(nft_messages.new_chain(table, chain, hook))
        messages.append(
            nft_messages.new_rule(table, chain, *nft_messages.mark_is(CRIU_MARK), nft_messages.verdict(ACCEPT))
        )
        for name, network, source, length in (("ipv4", IPV4, 12, 4), ("ipv6", IPV6, 8, 16)):
            sender = ((False, source, length), (True, 0, 2))
            receiver = ((False, source + length, length), (True, 2, 2))
            own, peer = (receiver, sender) if hook == HOOK_INPUT else (sender, receiver)
            matches = (
                *nft_messages.network_is(network),
                *nft_messages.transport_is(socket.IPPROTO_TCP),
                *nft_messages.parts_in_set(name, (*own, *peer)),
            )
            messages.append(nft_messages.new_rule(table, chain, *matches, nft_messages.verdict(DROP)))
    return messages
