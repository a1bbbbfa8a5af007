"""`phaul top`: a live view of what leaves a node."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import click
from google.protobuf.duration_pb2 import Duration

from phaul.v1 import migrations_pb2, node_pb2, types_pb2
from phaul.v1.migrations_pb2 import Migration
from phaul_client.cli import columns, parameters, render
from phaul_client.cli.connection import CALL_SECONDS, Daemon, persistently
from phaul_client.cli.json_output import migration_json, to_line
from phaul_client.cli.outcomes import Outcome, outcome_of
from phaul_client.cli.session import Session, command
from phaul_client.cli.text import duration, shorten
from phaul_client.cli.units import format_bytes, format_rate
from phaul_client.cli.visible import visible

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

SHOWN: Final = 100
ENDED_SHOWN: Final = 10
BAR_WIDTH: Final = 16
FRAME_LINES: Final = 6  #: of the screen, that are no migrations
_NUMBERS: Final = ("SENT", "RATE", "ROUNDS", "PAUSE", "TIME")
_STYLES: Final = {Outcome.MOVED: "green", Outcome.FAILED: "bold red", Outcome.IN_DOUBT: "bold red"}


@command("top", "phaul top", "phaul top --interval 200ms", "phaul top --once --json | jq .migrations")
@click.option("--interval", type=parameters.DURATION, default=1.0, metavar="TIME", help="Time between two looks: 1s.")
@click.option("--once", is_flag=True, help="Look once and end, as it does where the output is no terminal.")
async def top(session: Session, interval: float, once: bool) -> None:
    """Watch the migrations of a node.

    What leaves it is above, with its progress; what left it last is below. Ctrl-C ends it, and nothing else. With
    --json every look is a line.
    """
    async with session.connect() as daemon:
        node, migrations = await look(daemon)
        if once or (not session.json and not sys.stdout.isatty()):
            shown = as_json(node, migrations)
            session.show(shown, f"{heading(node, migrations)}\n{render.migration_table(migrations, time.time())}")
            return
        if session.json:
            await _lines(daemon, interval)
        else:
            await _screen(daemon, interval, node, migrations)


async def look(daemon: Daemon) -> tuple[types_pb2.NodeInfo, list[Migration]]:
    """The node, and its migrations: newest first, those under way before the others."""
    info = (await daemon.node.GetInfo(node_pb2.GetInfoRequest(), timeout=CALL_SECONDS)).node
    under_way = migrations_pb2.ListMigrationsRequest(unfinished_only=True, page_size=SHOWN)
    newest = migrations_pb2.ListMigrationsRequest(page_size=SHOWN)
    first = list((await daemon.migrations.ListMigrations(under_way, timeout=CALL_SECONDS)).migrations)
    every = (await daemon.migrations.ListMigrations(newest, timeout=CALL_SECONDS)).migrations
    known = {each.migration_id for each in first}
    ended = [each for each in every if each.migration_id not in known and each.HasField("finished_at")]
    return info, [*first, *ended[:ENDED_SHOWN]]


def as_json(node: types_pb2.NodeInfo, migrations: list[Migration]) -> dict[str, Any]:
    """One look, for programs."""
    return {"node": node.node_name, "migrations": [migration_json(each) for each in migrations]}


def heading(node: types_pb2.NodeInfo, migrations: list[Migration]) -> str:
    """The line about the node."""
    moving = sum(not each.HasField("finished_at") for each in migrations)
    doubt = sum(each.in_doubt for each in migrations)
    return ", ".join(
        [
            f"{node.node_name}: {moving} of {node.capacity.outgoing_limit} moving away",
            f"{node.capacity.incoming} of {node.capacity.incoming_limit} arriving",
            *([f"{doubt} in doubt"] if doubt else []),
            f"{format_bytes(node.capacity.memory_available_bytes)} memory available",
            f"phaul {node.version}, criu {node.criu.version_text}",
            *(["insecure"] if node.insecure else []),
        ]
    )


async def _lines(daemon: Daemon, interval: float) -> None:
    while True:
        click.echo(to_line(as_json(*await persistently(lambda: look(daemon), lambda _: None))))
        await asyncio.sleep(interval)


async def _screen(daemon: Daemon, interval: float, node: types_pb2.NodeInfo, migrations: list[Migration]) -> None:
    from rich.live import Live  # 50 ms, which only a person who watches should pay

    away = ""

    def note(text: str) -> None:
        nonlocal away
        away = text

    with Live(Picture(node, migrations, away), screen=True, auto_refresh=False) as live:
        while True:
            looking = asyncio.create_task(persistently(lambda: look(daemon), note))
            while not (await asyncio.wait([looking], timeout=interval))[0]:
                live.update(Picture(node, migrations, away), refresh=True)
            (node, migrations), away = looking.result(), ""
            live.update(Picture(node, migrations, away), refresh=True)
            await asyncio.sleep(interval)


@dataclass(frozen=True, slots=True)
class Picture:
    """The whole screen, in whatever size the terminal has when it is drawn."""

    node: types_pb2.NodeInfo
    migrations: list[Migration]
    away: str = ""  #: why the daemon does not answer

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield Text(visible(heading(self.node, self.migrations)), style="bold")
        if self.away:
            yield Text(visible(self.away), style="bold red")
        yield Text("")
        if not self.migrations:
            yield Text("nothing has left this node yet", style="dim")
            return
        room = max((options.height or console.height) - FRAME_LINES, 1)
        yield _table(self.migrations[:room], options.max_width)
        if len(self.migrations) > room:
            yield Text(f"and {len(self.migrations) - room} more", style="dim")


def _table(migrations: list[Migration], available: int) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    ids = render.short_ids([each.migration_id for each in migrations])
    rows = [_row(short_id, each) for short_id, each in zip(ids, migrations, strict=True)]
    natural = {title: max(len(title), *(len(row[title]) for row in rows)) for title in rows[0]}
    widths = columns.fit(natural | {"PROGRESS": BAR_WIDTH}, available)
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, columns.GAP, 0, 0))
    for title, width in widths.items():
        justify: Literal["left", "right"] = "right" if title in _NUMBERS else "left"
        made.add_column(title, justify=justify, no_wrap=True, width=width)
    for row, each in zip(rows, migrations, strict=True):
        over = each.HasField("finished_at")
        outcome = outcome_of(each)
        total = max(each.bytes_total, 1)
        bar = ProgressBar(
            total=total, completed=min(each.bytes_sent, total), complete_style="cyan", finished_style="green"
        )
        cells: dict[str, RenderableType] = {title: Text(shorten(row[title], widths[title])) for title in widths}
        if "PROGRESS" in cells and not over:
            cells["PROGRESS"] = bar
        if "PHASE" in cells:
            cells["PHASE"] = Text(row["PHASE"], style=_STYLES.get(outcome, "yellow") if outcome else "cyan")
        made.add_row(*cells.values(), style="dim" if over else "")
    return made


def _row(short_id: str, migration: Migration) -> dict[str, str]:
    """Each column's text; the bar of PROGRESS has none."""
    outcome = outcome_of(migration)
    over = migration.HasField("finished_at")
    rate = migration.rate_bytes_per_second
    return {
        "ID": short_id,
        "WHAT": render.subject(migration),
        "TO": render.destination(migration),
        "PHASE": "in doubt"
        if migration.in_doubt
        else str(outcome)
        if over and outcome
        else render.phase_word(migration),
        "MODE": render.mode_word(migration.mode),
        "PROGRESS": "",
        "SENT": format_bytes(migration.bytes_sent),
        "RATE": format_rate(rate) if rate and not over else "-",
        "ROUNDS": str(len(migration.rounds) or "-"),
        "PAUSE": _pause(migration),
        "TIME": duration(migration.total) if migration.HasField("total") else "-",
    }


def _pause(migration: Migration) -> str:
    if migration.HasField("pause"):
        return duration(migration.pause)
    expected: Duration = migration.expected_pause
    return f"~{duration(expected)}" if migration.HasField("expected_pause") else "-"
