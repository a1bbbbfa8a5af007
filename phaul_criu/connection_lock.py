"""Keeps packets from the TCP connections of a frozen tree: all of them locked in one transaction of the kernel.

criu's own lock does the same with two transactions for each connection. This one is asked for when criu holds the tree
and has not looked at a socket yet. The invariant: the kernel removes the lock with the last descriptor of its socket,
so it never outlives both of those who hold one, phauld and criu; a tree that criu lets run on is never left locked.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, Self

from phaul_criu import nft_messages
from phaul_criu.connections import Connection, connections_of
from phaul_criu.nft_messages import ACCEPT, CRIU_MARK, DROP, HOOK_INPUT, HOOK_OUTPUT, IPV4, IPV6
from phaul_criu.nftables import open_netfilter, transact

_TYPE_PORT: Final = 13  # nft's number of the type inet_service


_RESETS: Final = (b"\x04", b"\x14")  #: The flags of a segment: RST, RST and ACK.


class _Part(NamedTuple):
    """The address in a key of a set."""

    network: int
    source: int  #: where that of the sender is in a packet's header; that of the receiver follows
    length: int
    type: int  #: nft's number


_SETS: Final = {"ipv4": _Part(IPV4, 12, 4, 7), "ipv6": _Part(IPV6, 8, 16, 8)}


class ConnectionLock:
    """A lock that locks nothing yet. Its descriptor is to be passed on to criu; close it, or `release` it."""

    def __init__(self, table: str, netlink: socket.socket) -> None:
        self._table = table
        self._netlink = netlink
        self._keys: set[tuple[str, bytes]] = set()  # with the set that each is in

    @classmethod
    def open(cls, table: str) -> Self:
        """Make the table in the network namespace of this process. Raises `OSError`, on kernels before 5.12 as well."""
        netlink = open_netfilter()
        try:
            lock = cls(table, netlink)
            lock._send([nft_messages.new_owned_table(table), *_sets(table)])
        except BaseException:
            netlink.close()
            raise
        return lock

    def fileno(self) -> int:
        """Of the socket that it lives from."""
        return self._netlink.fileno()

    def foresee(self, pids: Iterable[int]) -> None:
        """Note the connections that they hold now: that is most of what `lock` would do. Raises `OSError`."""
        self._send(self._update(pids))

    def lock(self, pids: Iterable[int]) -> int:
        """Lock every connection that these processes hold; how many. They must stand still. Raises `OSError`."""
        self._send([*self._update(pids), *_rules(self._table)])
        return len(self._keys)

    def hold_resets(self, connections: Iterable[Connection]) -> None:
        """Drop the resets that this node sends in these, of which one end may not be there yet. Raises `OSError`."""
        keys = {_key(each) for each in connections}
        elements = [
            message
            for name in _SETS
            for message in nft_messages.new_elements(self._table, name, [key for where, key in keys if where == name])
        ]
        self._send([*elements, *_reset_rules(self._table)])

    def _update(self, pids: Iterable[int]) -> list[bytes]:
        """What is to be told of the connections that they hold now."""
        keys = {_key(each) for each in connections_of(pids)}
        messages = []
        for name in _SETS:
            for act, changed in (
                (nft_messages.new_elements, keys - self._keys),
                (nft_messages.delete_elements, self._keys - keys),
            ):
                messages += act(self._table, name, [key for where, key in changed if where == name])
        self._keys = keys
        return messages

    def release(self) -> None:
        """Remove it now, whoever else holds its socket. Raises `OSError`."""
        with self._netlink:
            self._send([nft_messages.delete_table(self._table)])

    def close(self) -> None:
        """Let go of it: it ends with whoever else holds its socket."""
        self._netlink.close()

    def _send(self, messages: Sequence[bytes]) -> None:
        if messages:
            transact(self._netlink, messages, f"nftables table inet {self._table}")


def _key(connection: Connection) -> tuple[str, bytes]:
    address, port, peer_address, peer_port = connection
    return ("ipv4" if len(address) == 4 else "ipv6", address + port + b"\0\0" + peer_address + peer_port + b"\0\0")


def _sets(table: str) -> list[bytes]:
    """Of connections, the tree's end first."""
    messages = []
    for number, (name, part) in enumerate(_SETS.items(), start=1):
        key_type = part.type << 18 | _TYPE_PORT << 12 | part.type << 6 | _TYPE_PORT
        messages.append(nft_messages.new_set(table, name, number, key_type, 2 * (part.length + 4)))
    return messages


def _reset_rules(table: str) -> list[bytes]:
    """Resets of the connections in the sets are dropped on their way out."""
    messages = [nft_messages.new_chain(table, "out", HOOK_OUTPUT)]
    for name, part in _SETS.items():
        sender = ((False, part.source, part.length), (True, 0, 2))
        receiver = ((False, part.source + part.length, part.length), (True, 2, 2))
        protocols = (*nft_messages.network_is(part.network), *nft_messages.transport_is(socket.IPPROTO_TCP))
        for flags in _RESETS:
            resets = (*protocols, *nft_messages.part_is(True, 13, flags))
            matches = (*resets, *nft_messages.parts_in_set(name, (*sender, *receiver)))
            messages.append(nft_messages.new_rule(table, "out", *matches, nft_messages.verdict(DROP)))
    return messages


def _rules(table: str) -> list[bytes]:
    """Packets of the connections in the sets are dropped, but for criu's own."""
    messages = []
    accept, drop = nft_messages.verdict(ACCEPT), nft_messages.verdict(DROP)
    for chain, hook in (("in", HOOK_INPUT), ("out", HOOK_OUTPUT)):
        messages.append(nft_messages.new_chain(table, chain, hook))
        messages.append(nft_messages.new_rule(table, chain, *nft_messages.mark_is(CRIU_MARK), accept))
        for name, part in _SETS.items():
            sender = ((False, part.source, part.length), (True, 0, 2))
            receiver = ((False, part.source + part.length, part.length), (True, 2, 2))
            ends = (*receiver, *sender) if hook == HOOK_INPUT else (*sender, *receiver)
            protocols = (*nft_messages.network_is(part.network), *nft_messages.transport_is(socket.IPPROTO_TCP))
            matches = (*protocols, *nft_messages.parts_in_set(name, ends))
            messages.append(nft_messages.new_rule(table, chain, *matches, drop))
    return messages
