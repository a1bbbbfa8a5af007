"""`phaul top`: a live view of what leaves a node."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import click
from google.protobuf.duration_pb2 import Duration

from phaul.v1 import migrations_pb2, node_pb2, types_pb2
from phaul.v1.migrations_pb2 import Migration
from phaul_client.cli import parameters, render
from phaul_client.cli.connection import CALL_SECONDS, Daemon, persistently
from phaul_client.cli.json_output import migration_json, to_line
from phaul_client.cli.outcomes import Outcome, outcome_of
from phaul_client.cli.session import Session, command
from phaul_client.cli.units import format_bytes, format_rate
from phaul_client.cli.visible import visible

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN: Final = 100
ENDED_SHOWN: Final = 10
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

    with Live(picture(node, migrations, away), screen=True, auto_refresh=False) as live:
        while True:
            looking = asyncio.create_task(persistently(lambda: look(daemon), note))
            while not (await asyncio.wait([looking], timeout=interval))[0]:
                live.update(picture(node, migrations, away), refresh=True)
            (node, migrations), away = looking.result(), ""
            live.update(picture(node, migrations, away), refresh=True)
            await asyncio.sleep(interval)


def picture(node: types_pb2.NodeInfo, migrations: list[Migration], away: str) -> RenderableType:
    """The whole screen."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, expand=True, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title, right in (("ID", 0), ("WHAT", 0), ("TO", 0), ("PHASE", 0), ("MODE", 0), ("PROGRESS", 0)):
        made.add_column(title, justify="right" if right else "left", no_wrap=True)
    for title in ("SENT", "RATE", "ROUNDS", "PAUSE", "TIME"):
        made.add_column(title, justify="right", no_wrap=True)
    ids = render.short_ids([each.migration_id for each in migrations])
    for short_id, each in zip(ids, migrations, strict=True):
        outcome = outcome_of(each)
        over = each.HasField("finished_at")
        total = max(each.bytes_total, 1)
        bar = Text("") if over else ProgressBar(total=total, completed=min(each.bytes_sent, total), width=16)
        phase = "in doubt" if each.in_doubt else str(outcome) if over and outcome else render.phase_word(each)
        made.add_row(
            Text(short_id, style="dim"),
            Text(render.shorten(render.subject(each), 24)),
            Text(render.shorten(render.destination(each), 20)),
            Text(phase, style=_STYLES.get(outcome, "yellow") if outcome else "cyan"),
            render.mode_word(each.mode),
            bar,
            format_bytes(each.bytes_sent),
            format_rate(each.rate_bytes_per_second) if each.rate_bytes_per_second and not over else "-",
            str(len(each.rounds) or "-"),
            _pause(each),
            render.duration(each.total) if each.HasField("total") else "-",
            style="dim" if over else "",
        )
    body: RenderableType = made if migrations else Text("nothing has left this node yet", style="dim")
    told = [Text(visible(away), style="bold red")] if away else []
    return Group(Text(visible(heading(node, migrations)), style="bold"), *told, Text(""), body)


def _pause(migration: Migration) -> str:
    if migration.HasField("pause"):
        return render.duration(migration.pause)
    expected: Duration = migration.expected_pause
    return f"~{render.duration(expected)}" if migration.HasField("expected_pause") else "-"
