"""Looks up, on the destination, what a tree would need there. Sockets and inotifies are made for a moment, no more.

Blocking: run it in a thread.
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import re
import socket
import stat
import struct
from collections.abc import Iterable

from phaul_client.preflight import limits
from phaul_client.preflight.destination_model import DestinationFacts, FoundFile
from phaul_client.preflight.model import NodeFacts
from phaul_client.preflight.proc_files import build_id, holders, read_stat, tail_digest, try_stat, try_text
from phaul_client.preflight.proc_text import InetLine, parse_fields, parse_inet, plain_address
from phaul_client.preflight.requirements import RequiredFile, RequiredSocket, Requirements

_SEARCH_SECONDS = 0.1
_LIMITS = ("fs.inotify.max_user_instances", "fs.inotify.max_user_watches", "fs.epoll.max_user_watches", "fs.nr_open")
_LISTEN = 10
_OFD_GETLK = 36  # asm-generic/fcntl.h; never waits, and takes nothing
_LOCKS = frozenset({"FLOCK", "POSIX", "OFDLCK"})
_LOCK = re.compile(r"([A-Z]+) ([A-Z]+) (\d{1,18})-(\d{1,18}|EOF)")
_FLOCK = struct.Struct("hhqqi4x")  # struct flock


def look_up(needs: Requirements, node: NodeFacts) -> DestinationFacts:
    """Everything that the destination's checks ask about."""
    addresses, ports = _look_up_sockets(needs.sockets)
    memory = parse_fields(try_text("/proc/meminfo"))
    return DestinationFacts(
        node=node,
        files=_look_up_files(needs.files),
        missing_directories=tuple(path for path in needs.directories if not os.path.isdir(path)),
        taken_pids=_look_up_pids(needs.pids),
        pid_max=int(try_text("/proc/sys/kernel/pid_max") or 0),
        missing_addresses=addresses,
        taken_ports=ports,
        may_ping=not needs.pings or _may_ping(),
        absent_peers=_look_up_peers(needs.sockets),
        taken_terminals=_look_up_terminals(needs.terminals),
        limits={name: limits.setting(name.replace(".", "/")) for name in _LIMITS},
        lacks_inotify=not limits.has_instances(needs.inotify_instances),
        lower_limits=limits.exceeded(dict(needs.hard_limits)),
        huge_free_bytes=_number(memory.get("HugePages_Free")) * _number(memory.get("Hugepagesize")) * 1024,
    )


def _look_up_files(files: Iterable[RequiredFile]) -> dict[str, FoundFile]:
    found = {}
    for file in files:
        status = try_stat(file.path)
        if status is None:
            continue
        identity = build_id(file.path) if file.build_id is not None and stat.S_ISREG(status.st_mode) else None
        is_larger = stat.S_ISREG(status.st_mode) and status.st_size > file.size_bytes
        found[file.path] = FoundFile(
            size_bytes=status.st_size,
            mode=status.st_mode,
            build_id=identity,
            has_grown=is_larger
            and file.tail_sha256 is not None
            and tail_digest(file.path, file.size_bytes) == file.tail_sha256,
            is_locked=stat.S_ISREG(status.st_mode) and any(_is_locked(file.path, each) for each in file.locks),
        )
    return found


def _is_locked(path: str, lock: str) -> bool:
    """Whether such a lock would have to wait. One that is taken in order to see is given back at once."""
    found = _LOCK.fullmatch(lock)
    if found is None or found[1] not in _LOCKS:  # to open what has a lease would break it
        return False
    kind, access, first, last = found.groups()
    is_write = access == "WRITE"
    try:
        descriptor = os.open(path, (os.O_RDWR if is_write else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        if kind == "FLOCK":
            fcntl.flock(descriptor, (fcntl.LOCK_EX if is_write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        else:
            length = 0 if last == "EOF" else int(last) - int(first) + 1
            asked = _FLOCK.pack(fcntl.F_WRLCK if is_write else fcntl.F_RDLCK, os.SEEK_SET, int(first), length, 0)
            answer: tuple[int, ...] = _FLOCK.unpack(fcntl.fcntl(descriptor, _OFD_GETLK, asked))
            return answer[0] != fcntl.F_UNLCK
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _look_up_pids(pids: Iterable[int]) -> dict[int, str]:
    """Who has these ids; /proc also answers for those of threads."""
    taken = {}
    for pid in pids:
        if os.path.exists(f"/proc/{pid}"):
            found = read_stat(pid)
            taken[pid] = found.name if found else ""
    return taken


def _look_up_sockets(sockets: Iterable[RequiredSocket]) -> tuple[frozenset[str], dict[tuple[str, str, int], str]]:
    missing, taken = set(), []
    for each in sockets:
        if each.own_network_namespace or _is_link_local(each.local_address):
            continue
        bound = each.listening or each.protocol != "tcp"
        failure = _try_bind(each.protocol, each.local_address, each.local_port if bound else 0)
        if failure == errno.EADDRNOTAVAIL:
            missing.add(each.local_address)
        elif failure == errno.EADDRINUSE:
            taken.append((each.protocol, each.local_address, each.local_port))
    owners = _owners_of_ports() if taken else {}
    return frozenset(missing), {key: owners.get((key[0], key[2]), "another process") for key in taken}


def _try_bind(protocol: str, address: str, port: int) -> int:
    """0, or the errno. What is bound here is closed at once."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(family, kind) as probe:
        if protocol == "tcp":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and ipaddress.IPv6Address(address).ipv4_mapped is None:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind((address, port))
        except OSError as exc:
            return exc.errno or 0
    return 0


def _look_up_peers(sockets: Iterable[RequiredSocket]) -> frozenset[tuple[str, int, str, int]]:
    """Those of the connections that end in a process of the source, unless its network is this one."""
    wanted = {_ends(each): each for each in sockets if each.peer_stays}
    if wanted:
        for table in ("tcp", "tcp6"):
            for line in parse_inet(try_text(f"/proc/self/net/{table}")):
                wanted.pop((plain_address(line.remote_address), line.remote_port, *_local(line)), None)
    return frozenset(
        (each.local_address, each.local_port, each.remote_address, each.remote_port) for each in wanted.values()
    )


def _may_ping() -> bool:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).close()
    except PermissionError:
        return False
    except OSError:
        pass
    return True


def _ends(each: RequiredSocket) -> tuple[str, int, str, int]:
    return (plain_address(each.local_address), each.local_port, plain_address(each.remote_address), each.remote_port)


def _local(line: InetLine) -> tuple[str, int]:
    return plain_address(line.local_address), line.local_port


def _look_up_terminals(numbers: Iterable[int]) -> dict[int, str]:
    paths = {f"/dev/pts/{number}": number for number in numbers if os.path.exists(f"/dev/pts/{number}")}
    owners = holders(paths, frozenset(), (), _SEARCH_SECONDS) if paths else {}
    return {number: _name_of(owners[path]) if path in owners else "another process" for path, number in paths.items()}


def _name_of(pid: int) -> str:
    process = read_stat(pid)
    return f"pid {pid} ({process.name})" if process else f"pid {pid}"


def _owners_of_ports() -> dict[tuple[str, int], str]:
    """(protocol, port) → the process that has it; those that are not found in time are left out."""
    ports = {}
    for table in ("tcp", "tcp6", "udp", "udp6"):
        protocol = table.removesuffix("6")
        for line in parse_inet(try_text(f"/proc/self/net/{table}")):
            if protocol == "udp" or line.state == _LISTEN:
                ports[f"socket:[{line.inode}]"] = (protocol, line.local_port)
    found = holders(ports, frozenset(), (), _SEARCH_SECONDS)
    return {ports[target]: _name_of(pid) for target, pid in found.items()}


def _is_link_local(address: str) -> bool:
    return ipaddress.ip_address(address).is_link_local


def _number(text: str | None) -> int:
    return int(text.split()[0]) if text else 0
