"""The statistics that criu writes into its work directory: bytes in, frozen dataclasses out."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

from phaul_criu.rpc import stats_pb2

DUMP_STATS_FILE: Final = "stats-dump"
RESTORE_STATS_FILE: Final = "stats-restore"

#: Service images begin with two magic numbers and the size of one protobuf message (criu/include/magic.h).
_HEADER: Final = struct.Struct("<III")
_SERVICE_MAGIC: Final = 0x55105940
_STATS_MAGIC: Final = 0x57093306


class StatsError(ValueError):
    """The bytes are not statistics of criu."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpStats:
    """Statistics of a dump or of a pre-dump. Pages are the machine's pages."""

    #: Time to bring the tree to a halt.
    freezing_microseconds: int
    #: Time during which the tree stood still (for a dump: until it was killed or let go).
    frozen_microseconds: int
    #: Time to find and collect the pages.
    memdump_microseconds: int
    #: Time to write the pages to files or to the page server.
    memwrite_microseconds: int
    pages_scanned: int
    #: Pages that did not change since the previous round.
    pages_skipped_parent: int
    pages_written: int
    #: Pages left in the tree, to be served later.
    pages_lazy: int
    shpages_scanned: int
    shpages_skipped_parent: int
    shpages_written: int


#: Of a dump with lazy pages: the page server that criu becomes then starts its statistics anew and garbles the times
#: (criu/page-xfer.c, cr_page_server).
NO_DUMP_STATS: Final = DumpStats(
    freezing_microseconds=0,
    frozen_microseconds=0,
    memdump_microseconds=0,
    memwrite_microseconds=0,
    pages_scanned=0,
    pages_skipped_parent=0,
    pages_written=0,
    pages_lazy=0,
    shpages_scanned=0,
    shpages_skipped_parent=0,
    shpages_written=0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreStats:
    """Statistics of a restore."""

    forking_microseconds: int
    restore_microseconds: int
    pages_compared: int
    pages_skipped_cow: int
    pages_restored: int


def parse_dump_stats(content: bytes) -> DumpStats:
    """Decode the content of `stats-dump`. Raises StatsError."""
    entry = _entry(content, "dump")
    return DumpStats(
        freezing_microseconds=entry.freezing_time,
        frozen_microseconds=entry.frozen_time,
        memdump_microseconds=entry.memdump_time,
        memwrite_microseconds=entry.memwrite_time,
        pages_scanned=entry.pages_scanned,
        pages_skipped_parent=entry.pages_skipped_parent,
        pages_written=entry.pages_written,
        pages_lazy=entry.pages_lazy,
        shpages_scanned=entry.shpages_scanned,
        shpages_skipped_parent=entry.shpages_skipped_parent,
        shpages_written=entry.shpages_written,
    )


def parse_restore_stats(content: bytes) -> RestoreStats:
    """Decode the content of `stats-restore`. Raises StatsError."""
    entry = _entry(content, "restore")
    return RestoreStats(
        forking_microseconds=entry.forking_time,
        restore_microseconds=entry.restore_time,
        pages_compared=entry.pages_compared,
        pages_skipped_cow=entry.pages_skipped_cow,
        pages_restored=entry.pages_restored,
    )


def _entry(content: bytes, kind: str) -> Any:
    if len(content) < _HEADER.size:
        raise StatsError(f"statistics of {len(content)} bytes are too short")
    service_magic, stats_magic, size_bytes = _HEADER.unpack_from(content)
    if (service_magic, stats_magic) != (_SERVICE_MAGIC, _STATS_MAGIC):
        raise StatsError(f"not a statistics image: magic {service_magic:#x} {stats_magic:#x}")
    message = content[_HEADER.size :]
    if len(message) != size_bytes:
        raise StatsError(f"statistics hold {len(message)} bytes, the header says {size_bytes}")
    entry = stats_pb2.stats_entry()
    try:
        entry.ParseFromString(message)
    except Exception as exc:  # protobuf's DecodeError; named in google.protobuf, which nothing else here needs
        raise StatsError(f"statistics cannot be decoded: {exc}") from exc
    if not entry.HasField(kind):
        raise StatsError(f"statistics are not those of a {kind}")
    return getattr(entry, kind)
