"""A migration under way on a terminal."""

from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from phaul.v1.migrations_pb2 import Migration
from phaul_client.cli.render import destination, phase_word, subject
from phaul_client.cli.text import duration
from phaul_client.cli.units import format_bytes, format_rate
from phaul_client.cli.visible import visible

ROUNDS_SHOWN = 6


class Live:
    """A `Progress` that is drawn in place on stderr and leaves nothing behind."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._screen = Screen(console=self._console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        self._screen.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._screen.__exit__(kind, error, traceback)

    def update(self, migration: Migration) -> None:
        """A new snapshot."""
        self._screen.update(drawing(migration))

    def tell(self, message: str) -> None:
        """Something about the watching itself."""
        self._console.print(visible(f"phaul: {message}"), markup=False, highlight=False)


def drawing(migration: Migration) -> Group:
    """A snapshot as rich draws it."""
    headline = Text.assemble((f"{subject(migration)} → {destination(migration)}", "bold"), f"  {phase_word(migration)}")
    if migration.in_doubt:
        headline.append("  in doubt", style="bold red")
    facts = [f"{format_bytes(migration.bytes_sent)} of {format_bytes(migration.bytes_total)}"]
    if migration.rate_bytes_per_second:
        facts.append(format_rate(migration.rate_bytes_per_second))
    if migration.HasField("total"):
        facts.append(duration(migration.total))
    if migration.HasField("pause"):
        facts.append(f"pause {duration(migration.pause)}")
    elif migration.HasField("expected_pause"):
        facts.append(f"expected pause {duration(migration.expected_pause)}")
    bar = ProgressBar(total=max(migration.bytes_total, 1), completed=migration.bytes_sent, width=40)
    line = Table.grid(padding=(0, 2))
    line.add_row(bar, ", ".join(facts))
    parts: list[RenderableType] = [headline, line]
    if migration.status_text:
        parts.append(Text(visible(migration.status_text), style="dim"))
    return Group(*parts, *([_rounds(migration)] if migration.rounds else []))


def _rounds(migration: Migration) -> Table:
    made = Table(box=None, pad_edge=False)
    for title in ("round", "sent", "took", "dirtied", "expected pause"):
        made.add_column(title, justify="right", style="dim")
    for each in migration.rounds[-ROUNDS_SHOWN:]:
        made.add_row(
            f"{each.index}",
            format_bytes(each.bytes_sent),
            duration(each.duration),
            format_rate(each.dirty_rate_bytes_per_second) if each.dirty_rate_bytes_per_second else "-",
            duration(each.expected_pause) if each.HasField("expected_pause") else "-",
        )
    return made
