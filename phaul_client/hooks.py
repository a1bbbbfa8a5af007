"""Hooks: what somebody else has to do when a tree moves; how they are named and what they are told (pure).

Each node calls its own hooks, in three phases. In `prepare`, while the tree runs, a failure ends the migration. In
`commit` a failure undoes nothing: the call is repeated later. `abort` undoes the other two. Every call may come more
than once, for a restarted phauld cannot know which were answered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from phaul_client.errors import InvalidRequest

GRPC: Final = "grpc:"
_HOST_PORT: Final = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})")
_UNIX: Final = re.compile(r"unix:(/\S+)")


class HookPhase(StrEnum):
    """Why a hook is called."""

    PREPARE = "prepare"
    COMMIT = "commit"
    ABORT = "abort"


class Side(StrEnum):
    """Which half of the migration calls it."""

    SOURCE = "source"
    DESTINATION = "destination"


@dataclass(frozen=True, slots=True)
class Hook:
    """A program, or a server of `phaul.v1.Hooks`."""

    target: str  #: a path; or what gRPC dials
    is_grpc: bool = False

    def __str__(self) -> str:
        return f"{GRPC}{self.target}" if self.is_grpc else self.target

    @property
    def is_local(self) -> bool:
        """Whether it cannot be reached from elsewhere."""
        return not self.is_grpc or self.target.startswith("unix:")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What every call of one migration says."""

    migration_id: str
    side: Side
    node_name: str
    peer: str
    workload: str = ""
    addresses: tuple[str, ...] = ()


def parse_hook(text: str) -> Hook:
    """An absolute path, grpc:unix:/PATH or grpc:HOST:PORT. Raises `InvalidRequest`."""
    if not text.startswith(GRPC):
        if not text.startswith("/") or "\0" in text:
            raise InvalidRequest(f"hook {text!r} is neither an absolute path nor grpc:unix:/PATH nor grpc:HOST:PORT")
        return Hook(text)
    target = text.removeprefix(GRPC)
    found = _HOST_PORT.fullmatch(target)
    if not _UNIX.fullmatch(target) and (found is None or not 0 < int(found["port"]) < 65536):
        raise InvalidRequest(f"hook {text!r} is neither grpc:unix:/PATH nor grpc:HOST:PORT")
    return Hook(target, is_grpc=True)


def environment(facts: Facts, phase: HookPhase, pid: int, attempt: int) -> Mapping[str, str]:
    """What a program is told, beside where it finds others."""
    return {
        "PHAUL_PHASE": phase,
        "PHAUL_SIDE": facts.side,
        "PHAUL_MIGRATION_ID": facts.migration_id,
        "PHAUL_NODE": facts.node_name,
        "PHAUL_PEER": facts.peer,
        "PHAUL_WORKLOAD": facts.workload,
        "PHAUL_PID": str(pid or ""),
        "PHAUL_ADDRESSES": " ".join(facts.addresses),
        "PHAUL_ATTEMPT": str(attempt),
    }


def is_hidden(name: str) -> bool:
    """Whether a file of hooks_dir is no hook: an editor's, a package manager's, or switched off by its name."""
    return name.startswith(".") or name.endswith(("~", ".off", ".dpkg-new", ".dpkg-old", ".dpkg-dist"))
