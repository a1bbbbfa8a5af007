"""Puts the memory of a tree into huge pages before its freeze, so that criu has 512 times fewer entries to walk.

criu reads smaps and pagemap and splices every page in the freeze of a post-copy, too: with small pages that is 0.2 s
for 2 GiB, and grows with memory. Collapsing them takes about as long as copying them, while the tree runs.

Only what is all there is collapsed: a hole would become memory. A program or a node that does not want huge pages
gets none. Nothing here is needed: whatever fails, the freeze is longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from phaul_client.tree import descendants

logger = logging.getLogger(__name__)

SETTINGS: Final = Path("/sys/kernel/mm/transparent_hugepage")
SYS_PROCESS_MADVISE: Final = 440  # the same on every architecture
MADV_COLLAPSE: Final = 25
LEAST_BYTES: Final = 8 << 20  #: smaller mappings cost the freeze nothing
CHUNK_BYTES: Final = 32 << 20  #: at a time; a cancel waits for it
FULL: Final = 0.98  #: the part of a mapping that must be there
LIMIT_SECONDS: Final = 15.0
#: Flags of smaps: no huge pages wanted, of another size, special, or watched by a userfaultfd.
_NOT_THESE: Final = frozenset({"nh", "ht", "io", "pf", "um", "uw", "sh"})


@dataclass(slots=True)
class Mapping:
    """What smaps says of one."""

    start: int
    end: int
    anonymous: bool
    kib: dict[str, int] = field(default_factory=dict)
    flags: frozenset[str] = frozenset()

    @property
    def gains(self) -> bool:
        """Whether it is large, full, private, and of small pages."""
        size_kib = (self.end - self.start) >> 10
        return (
            self.anonymous
            and self.end - self.start >= LEAST_BYTES
            and self.kib.get("Private_Dirty", 0) >= FULL * size_kib
            and self.kib.get("AnonHugePages", 0) < FULL / 2 * size_kib
            and not self.flags & _NOT_THESE
        )


def parse_smaps(lines: Iterable[str]) -> Iterator[Mapping]:
    """The mappings of a process."""
    mapping: Mapping | None = None
    for line in lines:
        words = line.split()
        if not words[0].endswith(":"):
            start, _, end = words[0].partition("-")
            mapping = Mapping(int(start, 16), int(end, 16), anonymous=words[4] == "0" and "w" in words[1])
        elif mapping is not None and words[0] == "VmFlags:":
            mapping.flags = frozenset(words[1:])
            yield mapping
        elif mapping is not None and len(words) == 3:
            mapping.kib[words[0].removesuffix(":")] = int(words[1])


def chunks(mapping: Mapping, huge_bytes: int) -> list[tuple[int, int]]:
    """(address, bytes) of the whole huge pages in it, not too many at a time."""
    start = -(-mapping.start // huge_bytes) * huge_bytes
    end = mapping.end // huge_bytes * huge_bytes
    return [(each, min(CHUNK_BYTES, end - each)) for each in range(start, end, CHUNK_BYTES)]


async def collapse_tree(root: int) -> int:
    """Collapse what there is to gain from in every process; the bytes. It ends when it takes too long."""
    try:
        if "[never]" in (SETTINGS / "enabled").read_text():
            return 0
        huge_bytes = int((SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):  # a kernel without them
        return 0
    done, started = 0, time.monotonic()
    for pid in list(descendants(root)):
        with contextlib.suppress(OSError):
            done += await _collapse(pid, huge_bytes, started + LIMIT_SECONDS)
    if done:
        logger.info("huge pages pid=%d bytes=%d seconds=%.1f", root, done, time.monotonic() - started)
    return done


async def _collapse(pid: int, huge_bytes: int, deadline: float) -> int:
    done, pidfd = 0, os.pidfd_open(pid)
    try:
        for mapping in await asyncio.to_thread(_mappings, pid):
            for address, length in chunks(mapping, huge_bytes):
                if time.monotonic() > deadline:
                    return done
                done += await asyncio.to_thread(_advise, pidfd, address, length)
        return done
    finally:
        os.close(pidfd)


def _mappings(pid: int) -> list[Mapping]:
    with Path(f"/proc/{pid}/smaps").open(encoding="utf-8", errors="replace") as lines:
        return [each for each in parse_smaps(lines) if each.gains]


class _Range(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _advise(pidfd: int, address: int, length: int) -> int:
    """The bytes that were collapsed. Raises `OSError`: no memory, no such mapping any more."""
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    where = _Range(address, length)
    done: int = library.syscall(SYS_PROCESS_MADVISE, pidfd, ctypes.byref(where), ctypes.c_size_t(1), MADV_COLLAPSE, 0)
    if done < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return done
