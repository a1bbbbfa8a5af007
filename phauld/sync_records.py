"""What this node knows of directories that were synchronised: whether a further move may replace what is there.

One JSON file for each, in the state directory. The invariant: a directory whose content nobody else has is replaced
only when somebody says so.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from phaul_client import rsync
from phaul_client.preflight.problems import Problem, error, warning

OVERWRITE: Final = "--sync-overwrite, if what is there may be replaced and deleted"
#: Times of files are coarse.
_SLACK_SECONDS: Final = 0.1


class State(enum.StrEnum):
    """What is in a directory."""

    PARTIAL = "partial"  #: a copy that was begun here, and of which no tree has ever run
    ARRIVED = "arrived"  #: a tree came with it: it may be the only copy of what was written since
    LEFT = "left"  #: the tree has moved on with it: what is here is older than what is there


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A record."""

    state: State
    migration_id: str
    node: str  #: the other one
    at_seconds: float  #: since the epoch


class SyncRecords:
    """All of this node."""

    def __init__(self, directory: Path, roots: tuple[Path, ...]) -> None:
        self._directory = directory
        self._roots = roots
        self._claims: dict[str, str] = {}  # directory → the migration that brings it

    def get(self, directory: str) -> Known | None:
        """What is known. A record that cannot be read counts as none, which allows less."""
        try:
            found = json.loads(self._file(directory).read_text(encoding="utf-8"))
            found.pop("directory")
            return Known(**{**found, "state": State(found["state"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def put(self, directory: str, state: State, migration_id: str, node: str) -> None:
        """Write it down, durably. Raises `OSError`."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        file = self._file(directory)
        found = {"directory": directory, "state": state, "migration_id": migration_id, "node": node}
        part = file.with_suffix(".part")
        with part.open("w", encoding="utf-8") as stream:
            json.dump({**found, "at_seconds": time.time()}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        part.rename(file)

    def claim(self, directory: str, migration_id: str) -> bool:
        """Whether nobody else brings it, or something in or above it, at this time."""
        for other, owner in self._claims.items():
            if owner != migration_id and (rsync.is_below(directory, other) or rsync.is_below(other, directory)):
                return False
        self._claims[directory] = migration_id
        return True

    def release(self, migration_id: str) -> None:
        """Its migration is over."""
        self._claims = {each: owner for each, owner in self._claims.items() if owner != migration_id}

    def check_destination(self, directories: tuple[str, ...], *, overwrite: bool) -> Iterator[Problem]:
        """What stands in the way of bringing these here. Blocking."""
        if directories and shutil.which(rsync.PROGRAM) is None:
            yield missing_rsync()
        for each in directories:
            yield from self._check(each, overwrite)

    def check_source(self, directories: tuple[str, ...], *, overwrite: bool) -> Iterator[Problem]:
        """What stands in the way of sending these from here. Blocking."""
        if directories and shutil.which(rsync.PROGRAM) is None:
            yield missing_rsync()
        for each in directories:
            known = self.get(each)
            if os.path.realpath(each) != each or not os.path.isdir(each):
                message = "is no directory here" if not os.path.isdir(each) else "has a symbolic link in its path"
                yield error("sync-missing", each, message, "name the directory itself, as the program sees it")
            elif known is not None and known.state is State.LEFT and not overwrite:
                message = f"moved to {known.node} with migration {known.migration_id}: what is here is older"
                yield error("sync-stale", each, message, OVERWRITE)
        for mount in mounts_below(directories):
            message = "is another file system: --sync copies the one of its directory only"
            yield warning("sync-mount", mount, message, "name it with a --sync of its own, or mount it there, too")

    def _check(self, directory: str, overwrite: bool) -> Iterator[Problem]:
        real = os.path.realpath(directory)
        if real != directory or not any(rsync.is_below(directory, os.path.realpath(root)) for root in self._roots):
            allowed = ", ".join(map(str, self._roots)) or "none"
            message = f"this node allows nobody to write there (sync_roots: {allowed})"
            yield error("sync-not-allowed", directory, message, "sync_roots in phauld's configuration there")
            return
        if os.path.lexists(directory) and not os.path.isdir(directory):
            yield error("sync-not-empty", directory, "is no directory there", "take it away there")
            return
        if (user := _user_of(directory)) is not None:
            yield error("sync-in-use", directory, f"pid {user} uses a file in it there", "end that process first")
        elif not overwrite and (why := self._why_not(directory)):
            yield error("sync-not-empty", directory, why, OVERWRITE)

    def _why_not(self, directory: str) -> str:
        known = self.get(directory)
        if not os.path.isdir(directory) or not os.listdir(directory):
            return ""
        if known is None:
            return "is not empty there, and no move has left it behind"
        if known.state is State.ARRIVED:
            return f"came there with migration {known.migration_id}, and may be the only copy of what was written since"
        if known.state is State.LEFT and (changed := _changed_since(directory, known.at_seconds)):
            return f"was changed there after the tree had left with it: {changed}"
        return ""

    def _file(self, directory: str) -> Path:
        return self._directory / f"{hashlib.sha256(os.fsencode(directory)).hexdigest()[:32]}.json"


def mounts_below(directories: tuple[str, ...]) -> tuple[str, ...]:
    """File systems that are mounted inside of these."""
    found = set()
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        point = line.split(" ")[4].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
        if any(point != each and rsync.is_below(point, each) for each in directories):
            found.add(point)
    return tuple(sorted(found))


def missing_rsync() -> Problem:
    """There is no rsync on this node."""
    return error("sync-no-rsync", rsync.PROGRAM, "is not installed on this node, and --sync needs it",
                 rsync.PACKAGE_REMEDY)  # fmt: skip


def _user_of(directory: str) -> int | None:
    """A process that has a file or directory below it open, or lives there."""
    for each in os.listdir("/proc"):
        if not each.isdigit():
            continue
        names = [f"/proc/{each}/cwd", f"/proc/{each}/root"]
        with contextlib.suppress(OSError):
            names += [f"/proc/{each}/fd/{number}" for number in os.listdir(f"/proc/{each}/fd")]
        for name in names:
            try:
                target = os.readlink(name)
            except OSError:
                continue
            if target.startswith(directory) and rsync.is_below(target, directory):
                return int(each)
    return None


def _changed_since(directory: str, seconds: float) -> str:
    """A file or directory that was changed later than that; empty if there is none."""
    for place, _, names in os.walk(directory):
        for path in (place, *(os.path.join(place, name) for name in names)):
            try:
                if os.lstat(path).st_ctime > seconds + _SLACK_SECONDS:
                    return path
            except OSError:
                continue
    return ""
