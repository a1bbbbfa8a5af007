"""The page of `phaul report --html`: complete, well formed, and in need of nothing else."""

from __future__ import annotations

import re
import xml.etree.ElementTree as xml

from google.protobuf.duration_pb2 import Duration

from phaul.v1 import types_pb2
from phaul.v1.migrations_pb2 import Migration
from phaul_client.cli.report import report_page

SVG = "{http://www.w3.org/2000/svg}"


def ms(milliseconds: int) -> Duration:
    made = Duration()
    made.FromMilliseconds(milliseconds)
    return made


def step(name: str, node: str, start: int, end: int | None) -> types_pb2.TimelineStep:
    return types_pb2.TimelineStep(name=name, node_name=node, start=ms(start), end=None if end is None else ms(end))


def picture(page: str) -> xml.Element:
    found = re.search(r"<svg.*</svg>", page, re.DOTALL)
    assert found is not None
    return xml.fromstring(found[0])


def test_every_step_is_a_bar_inside_of_the_picture() -> None:
    steps = [step("dump", "a", -2, 60), step("restore", "b", 60, 90), step("commit", "a", 90, None)]
    svg = picture(report_page(Migration(workload="redis", timeline=steps)))
    width = float(svg.attrib["viewBox"].split()[2])
    bars = [(float(bar.attrib["x"]), float(bar.attrib["width"])) for bar in svg.iter(f"{SVG}rect")]
    labels = [text.text for text in svg.iter(f"{SVG}text")]
    assert len(bars) == 3
    assert {"dump", "restore", "commit"} <= set(labels)
    assert all(x >= 100 and length > 0 and x + length <= width for x, length in bars), bars
    assert bars[0][0] < bars[1][0] < bars[2][0]


def test_what_a_peer_says_is_text() -> None:
    hostile = "<script>alert(1)</script>"
    migration = Migration(
        workload=hostile,
        destination_address=hostile,
        timeline=[step(hostile, hostile, 0, 5)],
        problems=[types_pb2.Problem(code="x", message=hostile, node_name=hostile)],
    )
    assert "<script" not in report_page(migration)


def test_a_page_needs_nothing_else() -> None:
    page = report_page(Migration(workload="redis", timeline=[step("dump", "a", 0, 5)]))
    assert not re.search(r"\b(src|href)=|@import|url\(", page)


def test_a_migration_that_never_froze() -> None:
    assert "It did not freeze" in report_page(Migration(workload="redis"))
