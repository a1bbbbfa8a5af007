"""What a dump has left in the tree, from its pagemap images; and images of it in which some of that is there (pure)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from phaul_criu.rpc import pagemap_pb2

PAGE_BYTES: Final = 4096
_SIZE: Final = struct.Struct("<I")
_MAGICS_BYTES: Final = 8
_PE_LAZY: Final = 1 << 1  # criu/include/pagemap.h
_PE_PRESENT: Final = 1 << 2


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages of a new image, in its order."""

    address: int
    count: int
    is_left: bool  #: in the tree, and not in the image that there was


@dataclass(frozen=True, slots=True)
class Pagemap:
    """A pagemap image, and which pages the image of pages beside it is to have."""

    content: bytes
    pages: tuple[Pages, ...]


def lazy_pages(content: bytes) -> int:
    """Pages of one pagemap image that were left in the tree. Raises ValueError if the bytes are no such image."""
    return sum(entry.nr_pages for entry in _entries(content) if _is_left(entry))


def left_behind(content: bytes) -> list[tuple[int, int]]:
    """Address and number of the pages that were left in the tree. Raises ValueError."""
    return [(entry.vaddr, entry.nr_pages) for entry in _entries(content) if _is_left(entry)]


def pages_image(content: bytes) -> str:
    """The name of the image of pages beside it. Raises ValueError."""
    head = pagemap_pb2.pagemap_head()
    try:
        head.ParseFromString(next(_messages(content), b""))
    except Exception as exc:  # protobuf's DecodeError; named in google.protobuf, which nothing else here needs
        raise ValueError(f"the head of a pagemap cannot be decoded: {exc}") from exc
    return f"pages-{head.pages_id}.img"


def with_pages(content: bytes, wanted: Callable[[int, int], Sequence[object]]) -> Pagemap:
    """The same with some of what was left in the tree; `wanted` says of each of so many pages from an address whether.

    Raises ValueError.
    """
    made, pages = [content[:_MAGICS_BYTES], _framed(next(_messages(content), b""))], []
    for entry in _entries(content):
        if not _is_left(entry):
            if entry.flags & _PE_PRESENT:
                pages.append(Pages(entry.vaddr, entry.nr_pages, is_left=False))
            made.append(_framed(entry.SerializeToString()))
            continue
        address = entry.vaddr
        for is_wanted, run in groupby(wanted(address, entry.nr_pages), key=bool):
            count = len(list(run))
            made.append(_framed(_part(entry, address, count, is_there=is_wanted)))
            if is_wanted:
                pages.append(Pages(address, count, is_left=True))
            address += count * PAGE_BYTES
    return Pagemap(b"".join(made), tuple(pages))


def _part(entry: Any, address: int, count: int, *, is_there: bool) -> bytes:
    part = pagemap_pb2.pagemap_entry()
    part.CopyFrom(entry)
    part.vaddr, part.nr_pages = address, count
    if "compat_nr_pages" in part.DESCRIPTOR.fields_by_name:  # since criu 4.2
        part.compat_nr_pages = count
    if is_there:
        part.flags = _PE_PRESENT
    return bytes(part.SerializeToString())


def _is_left(entry: Any) -> bool:
    return bool(entry.flags & _PE_LAZY and not entry.flags & _PE_PRESENT)


def _entries(content: bytes) -> Iterator[Any]:
    messages = _messages(content)
    next(messages, None)
    for message in messages:
        entry = pagemap_pb2.pagemap_entry()
        try:
            entry.ParseFromString(message)
        except Exception as exc:  # protobuf's DecodeError
            raise ValueError(f"a pagemap entry cannot be decoded: {exc}") from exc
        yield entry


def _messages(content: bytes) -> Iterator[bytes]:
    position = _MAGICS_BYTES
    while position < len(content):
        if len(content) < position + _SIZE.size:
            raise ValueError("the pagemap is cut")
        (size,) = _SIZE.unpack_from(content, position)
        position += _SIZE.size
        yield content[position : position + size]
        position += size


def _framed(message: bytes) -> bytes:
    return _SIZE.pack(len(message)) + message
