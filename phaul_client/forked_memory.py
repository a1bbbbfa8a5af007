"""Memory that the processes of a tree share since a fork, told by the kernel (I/O).

A restore from images that is not lazy makes it shared again (criu compares each page with the parent's); a lazy one
fills it for each process by itself.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Final

from phaul_client.tree import descendants

_RESIDENT: Final = b"Anonymous:"
_SHARE: Final = b"Pss_Anon:"  # since Linux 5.4: each page divided by how many map it
_KIB: Final = 1024


@dataclass(frozen=True, slots=True)
class ForkedMemory:
    """Anonymous memory of a tree."""

    own_bytes: int = 0  #: with what is shared counted once
    shared_bytes: int = 0  #: how much more it would be if none was shared


def forked_memory(root: int) -> ForkedMemory:
    """Of a tree that runs: page tables are walked, some milliseconds for a GiB."""
    pids = list(descendants(root))
    if len(pids) < 2:
        return ForkedMemory()
    figures = [_figures(pid) for pid in pids]
    own_bytes = sum(each[_SHARE] for each in figures)
    return ForkedMemory(own_bytes, max(0, sum(each[_RESIDENT] for each in figures) - own_bytes) if own_bytes else 0)


def _figures(pid: int) -> dict[bytes, int]:
    """In bytes; 0 for one that is gone."""
    figures = {_RESIDENT: 0, _SHARE: 0}
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup", "rb") as lines:
        for line in lines:
            name, *words = line.split()
            if name in figures:
                figures[name] = int(words[0]) * _KIB
    return figures
