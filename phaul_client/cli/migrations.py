"""`phaul status`, `cancel`, `resolve`: migrations that start on this node."""

import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Final, TypeVar

import click
import grpc

from phaul.v1 import migrations_pb2, node_pb2
from phaul.v1.migrations_pb2 import Migration
from phaul_client.cli import render
from phaul_client.cli.connection import CALL_SECONDS, Daemon, translate
from phaul_client.cli.errors import tell_failure
from phaul_client.cli.json_output import migration_json
from phaul_client.cli.outcomes import Outcome, outcome_of
from phaul_client.cli.parameters import complete_migrations
from phaul_client.cli.report import report_page
from phaul_client.cli.session import Session, command
from phaul_client.errors import InvalidRequest, MigrationNotFound, PhaulError

PAGE_SIZE: Final = 1000
SHOWN: Final = 100
_Function = TypeVar("_Function", bound=Callable[..., object])


def matching(ids: Iterable[str], prefix: str) -> str:
    """The one id that begins so. Raises `MigrationNotFound`, or `InvalidRequest` if several do."""
    found = sorted({each for each in ids if each.startswith(prefix)})
    if prefix in found:
        return prefix
    if not found:
        raise MigrationNotFound(prefix, remedy="phaul status lists them")
    if len(found) > 1:
        several = ", ".join(found[:4]) + (" …" if len(found) > 4 else "")
        raise InvalidRequest(f"{prefix!r} is the beginning of {len(found)} migrations", remedy=f"say more of {several}")
    return found[0]


async def all_migrations(daemon: Daemon) -> AsyncIterator[Migration]:
    """Every outgoing migration, newest first."""
    request = migrations_pb2.ListMigrationsRequest(page_size=PAGE_SIZE)
    while True:
        answer = await daemon.migrations.ListMigrations(request, timeout=CALL_SECONDS)
        for migration in answer.migrations:
            yield migration
        if not answer.next_page_token:
            return
        request.page_token = answer.next_page_token


async def find(daemon: Daemon, word: str, *, by_name: bool = True) -> Migration:
    """A migration by its id, the beginning of it, or the name of what moved last. Raises as `matching` does."""
    try:
        return await _get(daemon, word)
    except grpc.aio.AioRpcError as exc:
        if translate(daemon.address, exc).reason != "MIGRATION_NOT_FOUND":
            raise
    every = [each async for each in all_migrations(daemon)]
    if by_name and not any(each.migration_id.startswith(word) for each in every):
        for each in every:
            if each.workload == word:
                return await _get(daemon, each.migration_id)
    return await _get(daemon, matching([each.migration_id for each in every], word))


async def _get(daemon: Daemon, migration_id: str) -> Migration:
    request = migrations_pb2.GetMigrationRequest(migration_id=migration_id)
    return (await daemon.migrations.GetMigration(request, timeout=CALL_SECONDS)).migration


def id_argument(function: _Function) -> _Function:
    """The argument ID, which may be abbreviated, or the name of a workload: its last migration."""
    return click.argument("migration_id", metavar="ID|NAME", shell_complete=complete_migrations)(function)


@command("status", "phaul status", "phaul status 3f2a", "phaul status 3f2a --json | jq .timeline")
@click.argument("migration_id", metavar="[ID|NAME]", required=False, shell_complete=complete_migrations)
async def status(session: Session, migration_id: str | None) -> None:
    """List migrations from this node, or show one.

    The newest come first. The beginning of an ID is enough; the name of a workload is its last migration.
    """
    async with session.connect() as daemon:
        if migration_id:
            migration = await find(daemon, migration_id)
            session.show(migration_json(migration), render.migration_details(migration))
            if not session.json:
                tell_failure(migration)
            return
        request = migrations_pb2.ListMigrationsRequest(page_size=SHOWN)
        newest = (await daemon.migrations.ListMigrations(request, timeout=CALL_SECONDS)).migrations
        node = (await daemon.node.GetInfo(node_pb2.GetInfoRequest(), timeout=CALL_SECONDS)).node
    shown = {"migrations": [migration_json(each) for each in newest]}
    session.show(shown, render.migration_table(newest, time.time()))
    if node.insecure and not session.json:
        click.echo("phaul: this phauld is insecure: bytes may be in clear on the network", err=True)


@command("report", "phaul report 3f2a --html report.html", "phaul report 3f2a --json")
@id_argument
@click.option("--html", "file", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), help="Write a page.")
async def report(session: Session, migration_id: str, file: Path | None) -> None:
    """Report on one migration, with a picture of its freeze.

    The page that --html writes needs nothing but a browser.
    """
    async with session.connect() as daemon:
        migration = await find(daemon, migration_id)
    if file is not None:
        _write(file, report_page(migration))
    written = f"\n\nwritten to {file}" if file is not None else ""
    session.show(migration_json(migration), render.migration_details(migration) + written)


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise InvalidRequest(f"{file}: {exc.strerror}") from exc


@command("cancel", "phaul cancel 3f2a", "phaul cancel 3f2a --reason 'wrong node'")
@id_argument
@click.option("--reason", metavar="TEXT", default="", help="Why, for the record.")
async def cancel(session: Session, migration_id: str, reason: str) -> None:
    """Cancel a migration.

    The process runs on here, within a second. Not possible once the migration is committed.
    """
    async with session.connect() as daemon:
        found = await find(daemon, migration_id)
        request = migrations_pb2.CancelMigrationRequest(migration_id=found.migration_id, reason=reason)
        ended = (await daemon.migrations.CancelMigration(request, timeout=CALL_SECONDS)).migration
    if outcome_of(ended) is not Outcome.CANCELLED:
        headline = render.summary(ended).partition("\n")[0]
        raise PhaulError(f"too late to cancel: {headline}", reason="WRONG_PHASE")
    session.show(migration_json(ended), render.summary(ended))


@command(
    "resolve",
    "phaul resolve 3f2a --resume --reason 'node-b burnt down before it ran'",
    "phaul resolve 3f2a --kill   # seen alive at node-b, which cannot reach us any more",
)
@click.argument("migration_id", metavar="ID", shell_complete=complete_migrations)
@click.option(
    "--kill",
    is_flag=True,
    help="It lives at the destination: kill the stopped copy here. If it does not, it is lost.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="It never ran at the destination and never will: let the copy here run on. If it does, there are two.",
)
@click.option("--reason", metavar="TEXT", default="", help="Why, for the record.")
async def resolve(session: Session, migration_id: str, kill: bool, resume: bool, reason: str) -> None:
    """Decide about a process held in doubt.

    A migration is held when the destination fell silent in the one moment in which only it knows whether the process
    runs there. The copy here is stopped and phauld goes on asking, so if the destination can come back, wait: the
    answer ends the doubt by itself. If it is gone for good, look there and decide. phaul cannot check your word: a
    wrong --kill loses the process, a wrong --resume makes two of it.
    """
    if kill == resume:
        which = "both --kill and --resume were given" if kill else "say --kill or --resume"
        raise click.UsageError(f"{which}; phaul resolve --help explains what either means")
    async with session.connect() as daemon:
        found = await find(daemon, migration_id, by_name=False)  # the operator has to know of which he speaks
        request = migrations_pb2.ResolveRequest(
            migration_id=found.migration_id,
            resolution=migrations_pb2.RESOLUTION_KILL if kill else migrations_pb2.RESOLUTION_RESUME,
            reason=reason,
        )
        ended = (await daemon.migrations.Resolve(request, timeout=CALL_SECONDS)).migration
    session.show(migration_json(ended), render.summary(ended))
