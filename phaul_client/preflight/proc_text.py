"""Parsers of the texts in /proc (pure). A line that is not understood is skipped, never guessed at."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_KERNEL_THREAD_FLAG: Final = 0x00200000
_DELETED: Final = " (deleted)"


@dataclass(frozen=True, slots=True)
class Stat:
    """The fields of /proc/PID/stat that matter."""

    name: str
    state: str
    parent_pid: int
    group: int
    session: int
    terminal: int
    #: The process group that the terminal has in its foreground.
    foreground: int
    is_kernel_thread: bool
    resident_pages: int


@dataclass(frozen=True, slots=True)
class MapsLine:
    """One mapping of /proc/PID/maps."""

    start: int
    end: int
    permissions: str
    inode: int
    path: str


@dataclass(frozen=True, slots=True)
class InetLine:
    """One socket of /proc/PID/net/{tcp,udp,raw,…}."""

    inode: int
    state: int
    local_address: str
    local_port: int
    remote_address: str
    remote_port: int
    waiting: int


def parse_stat(text: str) -> Stat:
    """Raises ValueError."""
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    return Stat(
        name=head.partition("(")[2],
        state=fields[0],
        parent_pid=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        terminal=int(fields[4]),
        foreground=int(fields[5]),
        is_kernel_thread=bool(int(fields[6]) & _KERNEL_THREAD_FLAG),
        resident_pages=int(fields[21]),
    )


def parse_fields(text: str) -> dict[str, str]:
    """Lines "Name:<tab>value", as in /proc/PID/status and in fdinfo; of a repeated name the last."""
    return {name: value.strip() for name, colon, value in (line.partition(":") for line in text.splitlines()) if colon}


def numbers(value: str | None) -> tuple[int, ...]:
    """Whitespace separated numbers; none for None."""
    return tuple(int(word) for word in value.split()) if value else ()


def parse_maps(text: str) -> Iterator[MapsLine]:
    """The mappings that have a name."""
    for line in text.splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6:
            start, _, end = fields[0].partition("-")
            yield MapsLine(int(start, 16), int(end, 16), fields[1], int(fields[4]), fields[5])


def strip_deleted(path: str) -> tuple[str, bool]:
    """A path without the kernel's " (deleted)", and whether it was there."""
    return (path[: -len(_DELETED)], True) if path.endswith(_DELETED) else (path, False)


def parse_mount_ids(mountinfo: str) -> frozenset[int]:
    """The ids of the mounts of /proc/PID/mountinfo."""
    return frozenset(int(line.split(None, 1)[0]) for line in mountinfo.splitlines() if line)


def parse_locks(fdinfo: str) -> tuple[str, ...]:
    """The locks that a descriptor holds: as "FLOCK WRITE 0-EOF": kind, access, first and last byte. The kind of a
    lease that another process waits for is LEASE-BREAKING.
    """
    return tuple(
        f"{fields[2]}{'-BREAKING' if fields[3] == 'BREAKING' else ''} {fields[4]} {fields[7]}-{fields[8]}"
        for fields in (line.split() for line in fdinfo.splitlines())
        if len(fields) > 8 and fields[0] == "lock:"
    )


def parse_epoll(fdinfo: str) -> tuple[int, ...]:
    """The descriptors that an epoll watches, by the numbers that they had when they were added."""
    return tuple(int(line.split(None, 2)[1]) for line in fdinfo.splitlines() if line.startswith("tfd:"))


def plain_address(address: str) -> str:
    """The same address in the form that both ends of a connection have it in: no IPv4 address within an IPv6 one."""
    parsed = ipaddress.ip_address(address)
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


def parse_inet(text: str) -> Iterator[InetLine]:
    """The sockets of a table of /proc/net."""
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 10:
            continue
        local, remote, queues = fields[1], fields[2], fields[4]
        local_address, local_port = _endpoint(local)
        remote_address, remote_port = _endpoint(remote)
        yield InetLine(
            inode=int(fields[9]),
            state=int(fields[3], 16),
            local_address=local_address,
            local_port=local_port,
            remote_address=remote_address,
            remote_port=remote_port,
            waiting=int(queues.partition(":")[2], 16),
        )


def parse_socket_inodes(text: str, inode_column: int, waiting_column: int) -> dict[int, int]:
    """Inode → bytes that wait to be read, from /proc/net/netlink or /proc/net/packet."""
    rows = (line.split() for line in text.splitlines()[1:])
    return {int(row[inode_column]): int(row[waiting_column]) for row in rows if len(row) > inode_column}


def parse_cpu_flags(cpuinfo: str) -> frozenset[str]:
    """The flags that every CPU has."""
    common: frozenset[str] | None = None
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags = frozenset(value.split())
            common = flags if common is None else common & flags
    return common or frozenset()


def build_id_in_notes(notes: bytes) -> bytes | None:
    """The GNU build-id in the bytes of an ELF note segment."""
    offset = 0
    while offset + 12 <= len(notes):
        name_size, value_size, kind = struct.unpack_from("<III", notes, offset)
        name = notes[offset + 12 : offset + 12 + name_size]
        value_offset = offset + 12 + (name_size + 3 & ~3)
        if kind == 3 and name == b"GNU\0":
            return notes[value_offset : value_offset + value_size]
        offset = value_offset + (value_size + 3 & ~3)
    return None


def note_segments(header: bytes) -> Iterator[tuple[int, int]]:
    """(offset, size) of the note segments of a little-endian 64-bit ELF file, from its first bytes."""
    if header[:6] != b"\x7fELF\x02\x01" or len(header) < 64:
        return
    (table,) = struct.unpack_from("<Q", header, 32)
    entry_size, count = struct.unpack_from("<HH", header, 54)
    for index in range(count):
        at = table + index * entry_size
        if at + 56 > len(header):
            return
        (kind,) = struct.unpack_from("<I", header, at)
        if kind == 4:
            offset, size = struct.unpack_from("<Q", header, at + 8)[0], struct.unpack_from("<Q", header, at + 32)[0]
            yield offset, size


def _endpoint(text: str) -> tuple[str, int]:
    """An address and port as /proc/net writes them: every 32-bit word in the byte order of the machine."""
    address, _, port = text.partition(":")
    words = [int(address[start : start + 8], 16) for start in range(0, len(address), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    if len(packed) == 4:
        return str(ipaddress.IPv4Address(packed)), int(port, 16)
    six = ipaddress.IPv6Address(packed)
    return f"::ffff:{six.ipv4_mapped}" if six.ipv4_mapped else str(six), int(port, 16)
