"""A tree that is to move, and what its copies say: each beats in a file of its node, and writes a log."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tests.daemon import LOG_DIR


@dataclass(slots=True, kw_only=True)
class Victim:
    """A tree that is to move. Its files have the same path on every node."""

    name: str
    processes: int = 1
    threads: int = 0
    outside_pid: int | None = None  #: on node a, of a process that phaul did not start

    @property
    def file(self) -> Path:
        return Path("/run") / f"{self.name}.beats"

    @property
    def log(self) -> Path:
        return LOG_DIR / f"{self.name}.log"

    @property
    def slots(self) -> int:
        return self.processes + self.processes * self.threads


@dataclass(slots=True)
class Beats:
    """What a node's copy of the victim's file says."""

    counts: list[int] = field(default_factory=list)
    checks: list[int] = field(default_factory=list)
    failures: int = 0


def gaps(lines: list[str]) -> list[str]:
    """Where the beats of a process do not follow one another."""
    last: dict[str, int] = {}
    found = []
    for line in lines:
        words = line.split()
        if len(words) != 2 or not words[1].isdigit():
            found.append(f"a strange line {line!r}")
            continue
        if int(words[1]) != last.get(words[0], 0) + 1:
            found.append(f"beat {words[1]} of process {words[0]} follows {last.get(words[0], 0)}")
        last[words[0]] = int(words[1])
    return found[:3]
