"""Messages of nf_tables, the kernel's packet filter (pure): what `nft` would send, without a program to start.

A batch is one transaction: the kernel takes it as a whole or not at all.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

#: Of the packets with which criu makes half closed connections (soccr/soccr.h).
CRIU_MARK: Final = 0xC114
_SUBSYSTEM: Final = 10 << 8  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN: Final = 16
_BATCH_END: Final = 17
_NEW_TABLE, _DELETE_TABLE, _NEW_CHAIN, _NEW_RULE, _NEW_SET, _NEW_ELEMENTS, _DELETE_ELEMENTS = (
    _SUBSYSTEM | n for n in (0, 2, 3, 6, 9, 12, 14)
)
_REQUEST, _ACK, _EXCLUSIVE, _CREATE, _APPEND = 0x1, 0x4, 0x200, 0x400, 0x800
_MESSAGE_ERROR: Final = 2
_NESTED: Final = 0x8000
_HEADER: Final = struct.Struct("=IHHII")
#: Families of tables.
INET, ARP = 1, 3
_OWNER: Final = 2  # NFT_TABLE_F_OWNER
_LIST_ELEMENT: Final = 1
_PRIORITY: Final = {INET: -300, ARP: 0}  # of IP packets: before connection tracking, and before whoever rejects
#: Where a chain of the family INET sees packets, and one of ARP.
HOOK_INPUT, HOOK_OUTPUT, HOOK_ARP_INPUT = 1, 3, 0
DROP, ACCEPT = 0, 1
#: Network protocols (NFPROTO_*).
IPV4, IPV6 = 2, 10
_META_MARK, _META_NFPROTO, _META_L4PROTO = 3, 15, 16
_NETWORK, _TRANSPORT = 1, 2
_REGISTER: Final = 8  # the first of sixteen of 32 bits
_ELEMENTS_A_MESSAGE: Final = 1000  # the length of an attribute has 16 bits


def new_owned_table(table: str) -> bytes:
    """Make a table that goes with the last descriptor of the socket that this is sent on; nobody else can change it."""
    return _message(_NEW_TABLE, _CREATE | _EXCLUSIVE, _text(1, table) + _number(2, _OWNER))


def new_table(table: str, family: int = INET) -> bytes:
    """Make a table, unless there is one of this name."""
    return _message(_NEW_TABLE, _CREATE, _text(1, table), family)


def delete_table(table: str, family: int = INET) -> bytes:
    """Delete a table with all that is in it."""
    return _message(_DELETE_TABLE, 0, _text(1, table), family)


def new_chain(table: str, chain: str, hook: int, family: int = INET) -> bytes:
    """A chain that sees the packets of a hook first."""
    hooked = _nested(4, _number(1, hook) + _number(2, _PRIORITY[family] & 0xFFFFFFFF))
    return _message(_NEW_CHAIN, _CREATE, _text(1, table) + _text(3, chain) + hooked + _text(7, "filter"), family)


def new_set(table: str, name: str, identity: int, key_type: int, key_bytes: int) -> bytes:
    """A set of keys of that length. `key_type` is for who lists it: six bits for each part of the key."""
    numbers = _number(3, 0) + _number(4, key_type) + _number(5, key_bytes) + _number(10, identity)
    return _message(_NEW_SET, _CREATE, _text(1, table) + _text(2, name) + numbers)


def new_elements(table: str, name: str, keys: Iterable[bytes]) -> list[bytes]:
    """Messages that put these keys into a set."""
    return _elements(_NEW_ELEMENTS, _CREATE, table, name, keys)


def delete_elements(table: str, name: str, keys: Iterable[bytes]) -> list[bytes]:
    """Messages that take these keys, which are in it, out of a set."""
    return _elements(_DELETE_ELEMENTS, 0, table, name, keys)


def new_rule(table: str, chain: str, *expressions: bytes, family: int = INET) -> bytes:
    """A rule at the end of a chain."""
    listed = b"".join(_nested(_LIST_ELEMENT, each) for each in expressions)
    return _message(_NEW_RULE, _CREATE | _APPEND, _text(1, table) + _text(2, chain) + _nested(4, listed), family)


def mark_is(mark: int) -> tuple[bytes, ...]:
    """The packet has this mark."""
    return _meta_is(_META_MARK, struct.pack("=I", mark))


def network_is(protocol: int) -> tuple[bytes, ...]:
    """The packet is of this network protocol (`IPV4`, `IPV6`)."""
    return _meta_is(_META_NFPROTO, bytes([protocol]))


def transport_is(protocol: int) -> tuple[bytes, ...]:
    """And of this one on top of it (IPPROTO_*)."""
    return _meta_is(_META_L4PROTO, bytes([protocol]))


def part_is(of_transport: bool, offset: int, value: bytes) -> tuple[bytes, ...]:
    """This stands there in the packet's header."""
    return _load(_REGISTER, of_transport, offset, len(value)), _equals(value)


def parts_in_set(name: str, parts: Iterable[tuple[bool, int, int]]) -> tuple[bytes, ...]:
    """The parts of a packet (of its transport header?, offset, length), one after the other, are a key of the set.

    Each part takes whole registers, so as a part of a key it is filled up to a multiple of four bytes.
    """
    loads, register = [], _REGISTER
    for of_transport, offset, length in parts:
        loads.append(_load(register, of_transport, offset, length))
        register += (length + 3) // 4
    return (*loads, _expression("lookup", _text(1, name) + _number(2, _REGISTER)))


def verdict(code: int) -> bytes:
    """What becomes of the packet."""
    return _expression("immediate", _number(1, 0) + _nested(2, _nested(2, _number(1, code))))


def batch(messages: Iterable[bytes]) -> bytes:
    """One transaction. Each message is answered, unless one fails: then that may be the only answer."""
    begin, end = (
        _HEADER.pack(_HEADER.size + 4, kind, _REQUEST, 0, 0) + _generic(0, 10) for kind in (_BATCH_BEGIN, _BATCH_END)
    )
    return begin + b"".join(messages) + end


def errors(answer: bytes) -> list[int]:
    """The error numbers in what the kernel answered, 0 for what it did. Raises ValueError if it is no answer."""
    found, position = [], 0
    while position + _HEADER.size <= len(answer):
        length, kind, _flags, _sequence, _port = _HEADER.unpack_from(answer, position)
        if kind != _MESSAGE_ERROR or length < _HEADER.size + 4:
            raise ValueError("netlink gave another answer than whether it was done")
        found.append(-struct.unpack_from("=i", answer, position + _HEADER.size)[0])
        position += (length + 3) & ~3
    return found


def _meta_is(key: int, value: bytes) -> tuple[bytes, bytes]:
    return _expression("meta", _number(1, _REGISTER) + _number(2, key)), _equals(value)


def _load(register: int, of_transport: bool, offset: int, length: int) -> bytes:
    base = _TRANSPORT if of_transport else _NETWORK
    return _expression("payload", _number(1, register) + _number(2, base) + _number(3, offset) + _number(4, length))


def _equals(value: bytes) -> bytes:
    return _expression("cmp", _number(1, _REGISTER) + _number(2, 0) + _nested(3, _attribute(1, value)))


def _elements(kind: int, flags: int, table: str, name: str, keys: Iterable[bytes]) -> list[bytes]:
    elements = [_nested(_LIST_ELEMENT, _nested(1, _attribute(1, key))) for key in keys]
    chunks = range(0, len(elements), _ELEMENTS_A_MESSAGE)
    names = _text(1, table) + _text(2, name)
    return [
        _message(kind, flags, names + _nested(3, b"".join(elements[at : at + _ELEMENTS_A_MESSAGE]))) for at in chunks
    ]


def _expression(name: str, attributes: bytes) -> bytes:
    return _text(1, name) + _nested(2, attributes)


def _message(kind: int, flags: int, attributes: bytes, family: int = INET) -> bytes:
    payload = _generic(family, 0) + attributes
    return _HEADER.pack(_HEADER.size + len(payload), kind, flags | _REQUEST | _ACK, 0, 0) + payload


def _generic(family: int, resource: int) -> bytes:
    return struct.pack("!BBH", family, 0, resource)


def _attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def _nested(kind: int, attributes: bytes) -> bytes:
    return _attribute(kind | _NESTED, attributes)


def _text(kind: int, text: str) -> bytes:
    return _attribute(kind, text.encode() + b"\0")


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("!I", value))
