"""Another node's steps on this node's clock, whatever that node says."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from phaul.v1 import types_pb2
from phaul_client.timeline import aligned, messages, steps_since

DURATIONS = st.builds(
    Duration,
    seconds=st.integers(min_value=-(2**63), max_value=2**63 - 1),
    nanos=st.integers(min_value=-(2**31), max_value=2**31 - 1),
)
STEP = st.builds(types_pb2.TimelineStep, name=st.text(), node_name=st.text(), start=DURATIONS, end=DURATIONS)
STEPS = st.lists(STEP, max_size=4)


@given(STEPS, st.floats(min_value=-1, max_value=3600))
def test_no_answer_of_a_peer_can_raise_or_leave_its_call(steps: list[types_pb2.TimelineStep], took: float) -> None:
    found = aligned(steps, 1000.0, 1000.0 + took)
    assert len(found) == len(steps)
    for step in found:
        assert 999.999 <= step.start <= 1000.001 + max(0.0, took)
        assert 999.999 <= step.end <= 1000.001 + max(0.0, took)
    messages(found, 1000.0, {})


def test_the_way_there_and_the_way_back_are_taken_to_be_the_same() -> None:
    steps = steps_since(50.0, [("unpack", 51.0), ("restore", 53.0)], "node-b")
    unpack, restore = aligned(steps, 10.0, 15.0)
    assert (unpack.name, unpack.start, unpack.end) == ("unpack", 11.0, 12.0)
    assert (restore.name, restore.start, restore.end, restore.node) == ("restore", 12.0, 14.0, "node-b")
