"""The name of the network lock's table comes from the inventory image, cut as criu cuts it."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from phaul_criu.inventory import lock_table_name
from phaul_criu.rpc import inventory_pb2


def image(run_id: str | None) -> bytes:
    entry = inventory_pb2.inventory_entry(img_version=2)
    if run_id is not None:
        entry.dump_criu_run_id = run_id
    content: bytes = entry.SerializeToString()
    return struct.pack("<II", 0x58313116, len(content)) + content


def test_the_name_is_cut_as_criu_cuts_it() -> None:
    # the run id and the table as criu 4.1.1 made them
    assert lock_table_name(image("22b2a85d-6dfe-49e3-9512-0c5d3b3f0a11")) == "CRIU-22b2a85d-6dfe-49e3-95"


def test_an_older_criu_wrote_none() -> None:
    assert lock_table_name(image(None)) is None


@given(st.binary(max_size=100))
def test_anything_else_is_refused(content: bytes) -> None:
    for candidate in (content, image("x")[:8] + content):
        try:
            lock_table_name(candidate)
        except ValueError:
            continue
        assert candidate.startswith(image("x")[:4])
