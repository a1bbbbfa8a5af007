"""Pages that a process has for itself alone go with its images in post-copy, and are not left behind (I/O).

What processes share since a fork is what they do not write to; what one of them has for itself is what it works with,
and touches first when it runs again. Fetched from the source one by one, for each of many processes, these pages were
the longest part of the pause. A process that has much for itself has it for other reasons: nothing is done about it.

The tree stands still in criu's hands; what was left in it is read from /proc/PID/mem.
"""

from __future__ import annotations

import array
import contextlib
import os
from pathlib import Path
from typing import Final

from phaul_client.tree import descendants
from phaul_criu.pagemaps import PAGE_BYTES, Pagemap, left_behind, pages_image, with_pages

#: Of one process, and of a tree.
MOST_PAGES: Final = 256
MOST_OF_ALL_PAGES: Final = 65536
_ENTRY_BYTES: Final = 8
_EXCLUSIVE: Final = 1 << 56  # Documentation/admin-guide/mm/pagemap.rst


class OwnPages:
    """Of a tree that criu dumps into a directory."""

    def __init__(self, root: int, directory: Path) -> None:
        """Raises `OSError`."""
        self._directory = directory
        self._left = {_pid_inside(pid): pid for pid in descendants(root)}  # criu takes them in this order, mostly
        self._room = MOST_OF_ALL_PAGES

    def take(self, name: str) -> bytes:
        """What an image of pages is with the own pages of its process, whose pagemap is made anew; empty: as it is.

        The image is complete. Raises `OSError`, `ValueError`.
        """
        for pid_inside, pid in self._left.items():
            path = self._directory / f"pagemap-{pid_inside}.img"
            with contextlib.suppress(FileNotFoundError):
                content = path.read_bytes()
                if content and pages_image(content) == name:
                    del self._left[pid_inside]
                    return self._bring(pid, path, content, self._directory / name)
        return b""

    def _bring(self, pid: int, pagemap: Path, content: bytes, image: Path) -> bytes:
        own = _exclusive(pid, left_behind(content))
        count = sum(map(sum, own.values()))
        if not 0 < count <= min(MOST_PAGES, self._room):
            return b""
        self._room -= count
        made = with_pages(content, lambda address, _: own[address])
        pages = _pages(pid, made, image.read_bytes())
        pagemap.write_bytes(made.content)
        return pages


def _pid_inside(pid: int) -> int:
    """In its own PID namespace, as criu has it. Raises `OSError`."""
    with open(f"/proc/{pid}/status", "rb") as file:
        return next(int(line.split()[-1]) for line in file if line.startswith(b"NSpid:"))


def _exclusive(pid: int, left: list[tuple[int, int]]) -> dict[int, list[bool]]:
    """Of each page from these addresses on, whether nobody else maps it. Raises `OSError`."""
    found = {}
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        for address, count in left:
            entries = array.array(
                "Q", os.pread(file.fileno(), count * _ENTRY_BYTES, address // PAGE_BYTES * _ENTRY_BYTES)
            )
            found[address] = [bool(entry & _EXCLUSIVE) for entry in entries]
    return found


def _pages(pid: int, made: Pagemap, there: bytes) -> bytes:
    """The image of pages that belongs to it. Raises `OSError`, `ValueError`."""
    parts, position = [], 0
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for pages in made.pages:
            size = pages.count * PAGE_BYTES
            if pages.is_left:
                part = os.pread(memory.fileno(), size, pages.address)
            else:
                part, position = there[position : position + size], position + size
            if len(part) != size:
                raise ValueError(f"pages of {pid} at {pages.address:#x} cannot be read")
            parts.append(part)
    if position != len(there):
        raise ValueError(f"{len(there)} bytes of pages, not {position}")
    return b"".join(parts)
