"""Words, numbers and tables as text for people, whatever they tell of. Pure."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from phaul_client.cli.units import format_seconds


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they must be; the last one as long as it is."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def plural(number: int, singular: str, ending: str = "s") -> str:
    """A number of things."""
    return f"{number} {singular}{'' if number == 1 else ending}"


def duration(value: Duration) -> str:
    """A duration for people."""
    return format_seconds(value.ToNanoseconds() / 1e9)


def local_time(stamp: Timestamp) -> str:
    """A point in time on this machine's clock, to the second."""
    return datetime.fromtimestamp(stamp.seconds).strftime("%Y-%m-%d %H:%M:%S") if stamp.seconds else "-"


def format_age(seconds: float) -> str:
    """How long ago, roughly: "12s", "5m", "3h", "2d"."""
    whole = max(0, int(seconds))
    for unit_seconds, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if whole >= 2 * unit_seconds:
            return f"{whole // unit_seconds}{unit}"
    return f"{whole}s"


def shorten(text: str, width: int) -> str:
    """At most `width` characters."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def fact_lines(facts: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each fact that there is."""
    return [f"  {name:<9} {text}" for name, text in facts if text]


def with_reason(word: str, reason: str) -> str:
    """A word that was chosen, and why; "" for none."""
    if word == "-":
        return ""
    return f"{word}: {reason}" if reason else word
