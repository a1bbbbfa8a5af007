"""What happened when in the freeze, on both nodes, on the source's clock (pure).

The nodes' clocks are never compared. A call's answer says how long after its arrival each step was; the call itself
took that long plus the way there and back, which is taken to be the same both ways (as NTP does). The error is at
most half of what the two ways differ.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from google.protobuf import duration_pb2

from phaul.v1 import types_pb2


@dataclass(frozen=True, slots=True)
class Step:
    """A step; times in seconds on the source's monotonic clock."""

    name: str
    start: float
    end: float
    node: str = ""  #: the destination's name; empty for the source


def steps_since(arrival: float, marks: Iterable[tuple[str, float]], node: str) -> list[types_pb2.TimelineStep]:
    """Marks, each the end of the step that it names, as steps one after the other from `arrival` on."""
    steps, start = [], arrival
    for name, end in marks:
        steps.append(
            types_pb2.TimelineStep(
                name=name, node_name=node, start=_duration(start - arrival), end=_duration(end - arrival)
            )
        )
        start = end
    return steps


def aligned(steps: Iterable[types_pb2.TimelineStep], sent: float, received: float) -> list[Step]:
    """The destination's steps of a call that went out at `sent` and whose answer came at `received`.

    Whatever a destination says, no step of the call lies outside of it: a clock that jumped must not end a migration.
    """
    longest = max(0.0, received - sent)
    known = [(step, _within(step.start, longest), _within(step.end, longest)) for step in steps]
    arrival = sent + (longest - max((max(start, end) for _, start, end in known), default=0.0)) / 2
    return [Step(step.name, arrival + start, arrival + end, step.node_name) for step, start, end in known]


def messages(steps: Iterable[Step], origin: float, names: Mapping[str, str]) -> list[types_pb2.TimelineStep]:
    """Steps in order of their start, as durations from `origin`; `names` gives the name of a node."""
    return [
        types_pb2.TimelineStep(
            name=step.name,
            node_name=names.get(step.node, step.node),
            start=_duration(step.start - origin),
            end=_duration(step.end - origin),
        )
        for step in sorted(steps, key=lambda step: (step.start, -step.end))
    ]


def _duration(seconds: float) -> duration_pb2.Duration:
    message = duration_pb2.Duration()
    message.FromMicroseconds(round(seconds * 1e6))
    return message


def _within(message: duration_pb2.Duration, longest: float) -> float:
    return min(max(0.0, message.seconds + message.nanos / 1e9), longest)
