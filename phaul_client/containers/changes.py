"""What has changed in a root file system between two looks at it (pure)."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias


class Entry(NamedTuple):
    """A file, as far as a change of it or of what is in it shows. The kernel sets the ctime, nobody else can."""

    inode: int
    mode: int
    size: int
    mtime_ns: int
    ctime_ns: int


#: By path relative to the root.
Look: TypeAlias = Mapping[str, Entry]


class Changes(NamedTuple):
    """What the destination has to do: remove, in this order, then take anew."""

    deleted: tuple[str, ...]
    changed: tuple[str, ...]


def changes(before: Look, now: Look) -> Changes:
    """From one look to another. What has become another kind of file is removed first."""
    deleted = [path for path, entry in before.items() if path not in now or _kind(entry) != _kind(now[path])]
    changed = [path for path, entry in now.items() if before.get(path) != entry]
    return Changes(tuple(sorted(deleted, reverse=True)), tuple(sorted(changed)))


def _kind(entry: Entry) -> int:
    return stat.S_IFMT(entry.mode)
