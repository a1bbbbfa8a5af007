"""The screen of `phaul top` in terminals of every width: no number is cut short."""

import re

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from phaul.v1 import types_pb2
from phaul.v1.migrations_pb2 import Migration
from phaul_client.cli import columns
from phaul_client.cli.top import Picture

LONG = "a-workload-with-quite-a-long-name-of-its-own"
NODE = types_pb2.NodeInfo(node_name="a", version="0.1.0")


def moving(name: str) -> Migration:
    return Migration(
        migration_id=f"{name}-0123456789",
        workload=name,
        destination_address="node-b.example.net:7707",
        phase=types_pb2.MIGRATION_PHASE_COPYING_IMAGES,
        mode=types_pb2.MODE_STOP_COPY,
        bytes_sent=1_234_567_890,
        bytes_total=2_345_678_901,
        rate_bytes_per_second=123_456_789,
        expected_pause=Duration(seconds=12),
        total=Duration(seconds=123),
    )


def drawn(migrations: list[Migration], width: int, height: int = 40) -> list[str]:
    console = Console(force_terminal=False, no_color=True, width=width, height=height)
    with console.capture() as capture:
        console.print(Picture(NODE, migrations), height=height)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_in_every_width_numbers_are_whole_and_lines_fit() -> None:
    for width in range(40, 200):
        lines = drawn([moving(LONG), moving("web")], width)
        assert all(len(line) <= width for line in lines), width
        (head, *rows) = lines[-3:]
        for title, value in (("SENT", "1.1 GiB"), ("RATE", "118 MiB/s"), ("PAUSE", "~12.0 s"), ("TIME", "2 min 3 s")):
            assert title not in head or all(value in row for row in rows), (width, rows)
        assert "WHAT" in head
        assert "PHASE" in head
        assert "copying-images" in rows[0]


def test_a_wide_terminal_has_it_all() -> None:
    head, row = drawn([moving(LONG)], 180)[-2:]
    assert head.split() == ["ID", "WHAT", "TO", "PHASE", "MODE", "PROGRESS", "SENT", "RATE", "ROUNDS", "PAUSE", "TIME"]
    assert LONG in row
    assert "node-b.example.net:7707" in row


def test_what_does_not_fit_below_is_counted() -> None:
    over = Migration(workload="web", finished_at=Timestamp(seconds=1), phase=types_pb2.MIGRATION_PHASE_DONE)
    lines = drawn([over] * 30, 120, height=16)
    assert len(lines) <= 16
    assert re.fullmatch(r"and \d+ more", lines[-1])
    assert int(lines[-1].split()[1]) + sum("moved" in line for line in lines) == 30


@given(st.dictionaries(st.sampled_from((*columns.LEFT_OUT, "WHAT", "PHASE")), st.integers(1, 40)), st.integers(20, 200))
def test_columns_keep_their_order_and_never_grow(widths: dict[str, int], available: int) -> None:
    fitting = columns.fit(widths, available)
    assert [each for each in widths if each in fitting] == list(fitting)
    assert all(1 <= width <= widths[each] for each, width in fitting.items())
