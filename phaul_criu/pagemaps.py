"""How many pages of a dump are still in the tree: from its pagemap images (pure)."""

from __future__ import annotations

import struct
from typing import Final

from phaul_criu.rpc import pagemap_pb2

_SIZE: Final = struct.Struct("<I")
_MAGICS_BYTES: Final = 8
_PE_LAZY: Final = 1 << 1  # criu/include/pagemap.h
_PE_PRESENT: Final = 1 << 2


def lazy_pages(content: bytes) -> int:
    """Pages of one pagemap image that were left in the tree. Raises ValueError if the bytes are no such image."""
    total, position, is_head = 0, _MAGICS_BYTES, True
    while position < len(content):
        if len(content) < position + _SIZE.size:
            raise ValueError("the pagemap is cut")
        (size,) = _SIZE.unpack_from(content, position)
        position += _SIZE.size
        if not is_head:
            entry = pagemap_pb2.pagemap_entry()
            try:
                entry.ParseFromString(content[position : position + size])
            except Exception as exc:  # protobuf's DecodeError; named in google.protobuf, which nothing else here needs
                raise ValueError(f"a pagemap entry cannot be decoded: {exc}") from exc
            if entry.flags & _PE_LAZY and not entry.flags & _PE_PRESENT:
                total += entry.nr_pages
        is_head = False
        position += size
    return total
