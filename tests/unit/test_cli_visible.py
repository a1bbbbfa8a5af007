"""Names from elsewhere do not command the terminal."""

import re

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from phaul.v1 import types_pb2
from phaul.v1.migrations_pb2 import Migration
from phaul_client.cli import render
from phaul_client.cli.live import drawing
from phaul_client.cli.top import Picture
from phaul_client.cli.visible import visible

ESCAPE = "\x1b]0;owned\x07[/bold]\x9b2J\u202e"


def test_what_is_shown() -> None:
    assert visible("plain, été →\n\tyes") == "plain, été →\n\tyes"
    assert visible("\x1b[2J\x00\x7f\r") == "\\x1b[2J\\x00\\x7f\\r"


@given(st.text())
def test_nothing_is_left(text: str) -> None:
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", visible(text))
    assert visible(visible(text)) == visible(text)


def test_screens() -> None:
    """On a terminal that shows no styles, no control character is left, and what looks like markup is text."""
    node = types_pb2.NodeInfo(node_name=ESCAPE, version=ESCAPE)
    moving = Migration(migration_id="1234", workload=ESCAPE, status_text=ESCAPE, destination_address=ESCAPE)
    for shown in (drawing(moving), Picture(node, [moving], ESCAPE)):
        console = Console(force_terminal=False, no_color=True, width=400)
        with console.capture() as capture:
            console.print(shown)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", capture.get())
        assert "[/bold]" in capture.get()


def test_tables() -> None:
    moving = Migration(migration_id="1234", process_name=ESCAPE, pid=7, destination_address=ESCAPE)
    assert "\x1b" not in render.subject(moving) + render.destination(moving)
