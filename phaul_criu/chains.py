"""The last images of a chain of rounds, made fit for a lazy restore (pure).

criu restores a page lazily only if its pagemap says so, and it says so only of pages of the last dump itself: all that
is "in the parent" is read before the tree runs (criu/mem.c, generate_iovs and restore_priv_vma_content). So after
rounds of pre-dump the pause would grow with memory again. `lazy_pagemap` marks those pages lazy by the very rule that
criu's dump has for its own: private anonymous mappings, but not the page that a stack pointer is in.

A page that is so marked, and not present in the last images, must be served to `criu lazy-pages` through its page
server socket: by itself it does not look into parents (criu/uffd.c, io_complete is the top's only).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

from phaul_criu.rpc import core_pb2, mm_pb2, pagemap_pb2

PAGE_BYTES: Final = 4096
_SIZE: Final = struct.Struct("<I")
MAGICS_BYTES: Final = 8
# criu/include/pagemap.h
_PE_PARENT: Final = 1 << 0
_PE_LAZY: Final = 1 << 1
# criu/include/vma.h, vma_entry_can_be_lazy
_NEEDED_FLAGS: Final = 0x20 | 0x02  # MAP_ANONYMOUS, MAP_PRIVATE
_BARRING_FLAGS: Final = 0x2000 | 0x40000  # MAP_LOCKED, MAP_HUGETLB
_BARRING_STATUS: Final = 1 << 2 | 1 << 3 | 1 << 12  # vsyscall, vdso, vvar

Range = tuple[int, int]


def lazy_pagemap(pagemap: bytes, mm: bytes, eager_pages: frozenset[int]) -> bytes:
    """`pagemap` of a process whose mappings are in `mm`, with what its parents hold marked lazy where that may be.

    `eager_pages` are addresses of pages that stay as they are. Raises ValueError if the bytes are no such images.
    """
    mappings = _lazy_mappings(mm)
    head, *entries = messages(pagemap)
    made = [pagemap[:MAGICS_BYTES], framed(head)]
    for content in entries:
        entry = pagemap_pb2.pagemap_entry.FromString(content)
        if not entry.flags & _PE_PARENT:
            made.append(framed(content))
            continue
        end = entry.vaddr + entry.nr_pages * PAGE_BYTES
        for (start, stop), lazy in _split(entry.vaddr, end, mappings, eager_pages):
            entry.vaddr, entry.nr_pages = start, (stop - start) // PAGE_BYTES
            entry.flags = _PE_LAZY if lazy else _PE_PARENT
            made.append(framed(entry.SerializeToString()))
    return b"".join(made)


def stack_page(core: bytes) -> int | None:
    """The address of the page that the stack pointer of a task is in; None for a task without registers."""
    (content,) = messages(core)
    task = core_pb2.core_entry.FromString(content)
    for field in ("thread_info", "ti_aarch64"):
        if task.HasField(field):
            pointer: int = getattr(task, field).gpregs.sp
            return pointer & ~(PAGE_BYTES - 1)
    return None


def _lazy_mappings(mm: bytes) -> list[Range]:
    (content,) = messages(mm)
    return [
        (each.start, each.end)
        for each in mm_pb2.mm_entry.FromString(content).vmas
        if each.flags & _NEEDED_FLAGS == _NEEDED_FLAGS
        and not each.flags & _BARRING_FLAGS
        and not each.status & _BARRING_STATUS
    ]


def _split(start: int, end: int, mappings: list[Range], eager_pages: frozenset[int]) -> Iterator[tuple[Range, bool]]:
    """The range in pieces, each with whether it may be lazy."""
    edges = {edge for mapping in mappings for edge in mapping if start < edge < end}
    for page in eager_pages:
        edges |= {edge for edge in (page, page + PAGE_BYTES) if start < edge < end}
    points = [start, *sorted(edges), end]
    for low, high in pairwise(points):
        lazy = low not in eager_pages and any(first <= low < last for first, last in mappings)
        yield (low, high), lazy


def messages(content: bytes) -> Iterator[bytes]:
    """The messages of an image. Raises ValueError if it is cut."""
    position = MAGICS_BYTES
    while position < len(content):
        if position + _SIZE.size > len(content):
            raise ValueError("the image is cut")
        (size,) = _SIZE.unpack_from(content, position)
        position += _SIZE.size
        if position + size > len(content):
            raise ValueError("the image is cut")
        yield content[position : position + size]
        position += size


def framed(content: bytes) -> bytes:
    """A message as it stands in an image."""
    return _SIZE.pack(len(content)) + content
