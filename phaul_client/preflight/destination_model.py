"""What was found on a destination, as values (pure)."""

from __future__ import annotations

from dataclasses import dataclass, field

from phaul_client.preflight.model import NodeFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """A file as it is on the destination."""

    size_bytes: int
    mode: int
    build_id: bytes | None = None
    #: It is larger than at the source, and what the source has is the beginning of it, as its last bytes say.
    has_grown: bool = False
    #: Somebody holds a lock on it that excludes one of the tree's.
    is_locked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationFacts:
    """What was found."""

    node: NodeFacts
    #: Path → the file; a path that does not exist is left out.
    files: dict[str, FoundFile] = field(default_factory=dict)
    missing_directories: tuple[str, ...] = ()
    #: PID → name of the process that has it.
    taken_pids: dict[int, str] = field(default_factory=dict)
    #: kernel.pid_max; 0: unknown.
    pid_max: int = 0
    missing_addresses: frozenset[str] = frozenset()
    #: (protocol, address, port) → who listens there.
    taken_ports: dict[tuple[str, str, int], str] = field(default_factory=dict)
    #: Connections, as (address, port, remote address, remote port), whose other end is not here.
    absent_peers: frozenset[tuple[str, int, str, int]] = frozenset()
    #: phaul may make ICMP sockets here (net.ipv4.ping_group_range).
    may_ping: bool = True
    huge_free_bytes: int = 0
    #: Number of a pseudo terminal that exists here → who has it open, if that was found in time.
    taken_terminals: dict[int, str] = field(default_factory=dict)
    #: By their names in sysctl: those of which the tree needs something.
    limits: dict[str, int] = field(default_factory=dict)
    #: So many inotify instances as the tree has cannot be made.
    lacks_inotify: bool = False
    #: Our hard limits that are below the tree's.
    lower_limits: dict[str, int] = field(default_factory=dict)
