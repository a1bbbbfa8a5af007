"""What there is in a node: taken before and after, it shows what was left behind."""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tests.nodes import Node


_PIDFD: Final = "anon_inode:[pidfd]"
REST_SECONDS: Final = 1.2  #: the real-time priority of who fills a tree ends after one


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """A node at one moment. Each counter says how many there are of a description."""

    processes: Counter[str]  #: command lines; "zombie NAME" for what nobody reaped
    descriptors: Counter[str]  #: phauld's, by kind: "anon_inode:[pidfd]", "socket"
    mounts: Counter[str]
    network_rules: Counter[str]  #: lines of nftables' rules
    files: Counter[str]  #: below /run/phaul
    daemon_memory_bytes: int  #: phauld's resident memory; 0 if it does not run
    pidfds: Counter[str] = field(default_factory=Counter)  #: whose they are; told, and not compared

    def more_than(self, before: Inventory) -> dict[str, list[str]]:
        """What there is now and was not before, memory left aside; empty if nothing."""
        kinds = ("processes", "descriptors", "mounts", "network_rules", "files")
        more = {kind: sorted((getattr(self, kind) - getattr(before, kind)).elements()) for kind in kinds}
        if _PIDFD in more["descriptors"]:
            more["descriptors"] += [f"{_PIDFD} of {whom}" for whom in sorted((self.pidfds - before.pidfds).elements())]
        return {kind: found for kind, found in more.items() if found}

    def counts(self) -> dict[str, int]:
        """How much of each kind there is, for a report."""
        return {
            "processes": self.processes.total(),
            "zombies": sum(count for name, count in self.processes.items() if name.startswith("zombie ")),
            "descriptors": self.descriptors.total(),
            "mounts": self.mounts.total(),
            "network_rules": self.network_rules.total(),
            "files": self.files.total(),
            "daemon_memory_bytes": self.daemon_memory_bytes,
        }


async def take_inventory(node: Node) -> Inventory:
    """Look at a node from outside; only the rules of nftables are asked for by a program inside."""
    daemon = node.daemon.process
    running = daemon.pid if daemon is not None and daemon.returncode is None else None
    rules = await node.run(["nft", "list", "ruleset"])
    pidfds: Counter[str] = Counter()
    return Inventory(
        processes=Counter(_anonymous(description) for _, description in processes(node)),
        descriptors=Counter(descriptors(running, pidfds) if running is not None else ()),
        mounts=Counter(_mounts(node.pid)),
        network_rules=Counter(line.strip() for line in rules.stdout.splitlines()),
        files=Counter(map(_anonymous, _files(node.root / "run/phaul"))),
        daemon_memory_bytes=_resident_bytes(running) if running is not None else 0,
        pidfds=pidfds,
    )


async def at_rest(node: Node) -> Inventory:
    """What there is once what a move leaves to be done beside the tree is done, and who watches the tree watches it."""
    found = await take_inventory(node)
    while True:
        await asyncio.sleep(REST_SECONDS)
        before, found = found, await take_inventory(node)
        if not (before.more_than(found) or found.more_than(before)):
            return found


def _anonymous(text: str) -> str:
    """Without what is another one each time: random names, numbers of descriptors."""
    return re.sub(r"\b(?=[0-9a-f]*[0-9])[0-9a-f]{8,}(-[0-9a-f]+)*\b|(?<= )[0-9]+(?= )", "*", text)


def processes(node: Node) -> Iterator[tuple[int, str]]:
    """Every process of a node with its PID there: its command line, or "zombie NAME"."""
    for directory in sorted((node.root / "proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            words = (directory / "cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
            name = (directory / "comm").read_text().strip()
            state = (directory / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        yield int(directory.name), f"zombie {name}" if state == "Z" else words or name


def descriptors(pid: int, pidfds: Counter[str]) -> Iterator[str]:
    """The kind of each; whom those of processes are for is counted beside it."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
            about = (link.parents[1] / "fdinfo" / link.name).read_text() if target == _PIDFD else ""
        except FileNotFoundError:
            continue
        if about:
            pidfds[_whom(int(about.rpartition("\nPid:")[2].split()[0]))] += 1
        yield target if target.startswith("anon_inode:") else target.partition(":[")[0]  # "socket:[1234]": a number


def _whom(pid: int) -> str:
    """What a process is by its command line; "gone" if somebody has reaped it."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
        return _anonymous(words) or "zombie " + Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


def _mounts(pid: int) -> Iterator[str]:
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        left, right = line.split(" - ")
        yield f"{right.split()[0]} on {left.split()[4]}"


def _files(directory: Path) -> Iterator[str]:
    for place, directories, files in os.walk(directory):  # rglob raises if one goes away meanwhile
        for name in (*directories, *files):
            yield str(Path(place, name).relative_to(directory))


def _resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0
