"""Capabilities: what a tree has, and what a phauld may give to it (pure).

criu gives a task its capabilities back after the commit, when nothing can be rolled back any more; what would fail then
has to be refused beforehand. A tree is restored below phauld, and gets no more than phauld itself has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from phaul_client.preflight.model import TreeFacts

#: Their order is that of the bits (linux/capability.h).
# fmt: off
NAMES: Final = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)
# fmt: on
KNOWN: Final = (1 << len(NAMES)) - 1


def mask(*names: str) -> int:
    """The bits of these."""
    return sum(1 << NAMES.index(name) for name in names)


#: Whatever the tree has: criu itself needs these when it gives tasks their users, capabilities and root back.
_TO_RESTORE: Final = mask("SETPCAP", "SETUID", "SETGID", "SYS_ADMIN", "SYS_PTRACE", "SYS_CHROOT")
#: From this version on also for what it sets at sockets of its own (seen with 4.2.1, and not with 4.1.1).
_NET_ADMIN_CRIU: Final = 40200
#: For the clocks of a time namespace.
_TIME_NAMESPACE: Final = mask("SYS_TIME")


def to_restore(criu_version: int) -> int:
    """What criu itself needs at the destination."""
    return _TO_RESTORE | (mask("NET_ADMIN") if criu_version >= _NET_ADMIN_CRIU else 0)


def names_of(bits: int) -> Iterator[str]:
    """CAP_KILL and so on."""
    return (f"CAP_{name}" for number, name in enumerate(NAMES) if bits >> number & 1)


def needed(tree: TreeFacts) -> int:
    """What all its tasks have together, those aside that are in a user namespace of their own; and its clocks need."""
    users = tree.reader_namespaces.get("user")
    root = tree.root
    has_clocks = root is not None and root.namespaces.get("time") != tree.reader_namespaces.get("time")
    bits = _TIME_NAMESPACE if has_clocks else 0
    for process in tree.processes:
        if users is None or process.namespaces.get("user", users) == users:
            bits |= process.capabilities
    return bits & KNOWN
