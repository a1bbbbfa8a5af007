"""criu's statistics are decoded, and everything else is refused."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul_criu.rpc import stats_pb2
from phaul_criu.stats import DumpStats, RestoreStats, StatsError, parse_dump_stats, parse_restore_stats

#: stats-dump as criu 4.1.1 wrote it for a small process.
REAL_DUMP = bytes.fromhex(
    "4059105506330957250000000a2308b70110e5b80218dc7520d75628cd2e300038db2d40004800500e580e600068007000"
)


def image(entry: bytes, *, service_magic: int = 0x55105940, magic: int = 0x57093306) -> bytes:
    return struct.pack("<III", service_magic, magic, len(entry)) + entry


def dump_entry(**values: int) -> bytes:
    names = ["freezing_time", "frozen_time", "memdump_time", "memwrite_time"]
    names += ["pages_scanned", "pages_skipped_parent", "pages_written", "pages_lazy"]
    required = dict.fromkeys(names, 0)
    content: bytes = stats_pb2.stats_entry(dump=stats_pb2.dump_stats_entry(**(required | values))).SerializeToString()
    return content


def test_a_real_file() -> None:
    assert parse_dump_stats(REAL_DUMP) == DumpStats(
        freezing_microseconds=183,
        frozen_microseconds=40037,
        memdump_microseconds=15068,
        memwrite_microseconds=11095,
        pages_scanned=5965,
        pages_skipped_parent=0,
        pages_written=5851,
        pages_lazy=0,
        shpages_scanned=0,
        shpages_skipped_parent=0,
        shpages_written=0,
    )


def test_each_field_goes_to_its_place() -> None:
    stats = parse_dump_stats(
        image(
            dump_entry(
                freezing_time=1,
                frozen_time=2,
                memdump_time=3,
                memwrite_time=4,
                pages_scanned=5,
                pages_skipped_parent=6,
                pages_written=7,
                pages_lazy=8,
                shpages_scanned=9,
                shpages_skipped_parent=10,
                shpages_written=11,
            )
        )
    )
    assert [getattr(stats, name) for name in DumpStats.__slots__] == list(range(1, 12))


def test_restore_statistics() -> None:
    entry = stats_pb2.restore_stats_entry(
        forking_time=1, restore_time=2, pages_compared=3, pages_skipped_cow=4, pages_restored=5
    )
    content = image(stats_pb2.stats_entry(restore=entry).SerializeToString())
    stats = parse_restore_stats(content)
    assert [getattr(stats, name) for name in RestoreStats.__slots__] == [1, 2, 3, 4, 5]
    with pytest.raises(StatsError, match="not those of a dump"):
        parse_dump_stats(content)


@pytest.mark.parametrize("length", range(len(REAL_DUMP)))
def test_a_file_cut_short_anywhere_is_refused(length: int) -> None:
    with pytest.raises(StatsError):
        parse_dump_stats(REAL_DUMP[:length])


@pytest.mark.parametrize(
    "content",
    [
        image(dump_entry(), magic=1),
        image(dump_entry(), service_magic=2),
        image(dump_entry()) + b"x",
        image(b"\xff\xff"),
    ],
)
def test_what_is_no_statistics_is_refused(content: bytes) -> None:
    with pytest.raises(StatsError):
        parse_dump_stats(content)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(content: bytes) -> None:
    for candidate in (content, image(content)):
        with suppress(StatsError):
            parse_dump_stats(candidate)
