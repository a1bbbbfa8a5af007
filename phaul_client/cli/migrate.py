"""`phaul migrate`."""

import asyncio
from typing import Any

import click
import grpc

from phaul.v1 import migrations_pb2, types_pb2
from phaul.v1.migrations_pb2 import Migration
from phaul_client.cli import parameters, progress, render
from phaul_client.cli.attempts import DEFAULT_ATTEMPTS, PAUSE_SECONDS, is_over_soon
from phaul_client.cli.connection import LONG_CALL_SECONDS, Daemon, translate
from phaul_client.cli.errors import tell_failure
from phaul_client.cli.follow import Follower
from phaul_client.cli.json_output import failure_json, migration_json, report_json, to_line
from phaul_client.cli.outcomes import ExitCode, exit_code_of, failure_of, is_refusal
from phaul_client.cli.requests import build_options, migration_options, target_field
from phaul_client.cli.session import Session, command
from phaul_client.cli.visible import visible
from phaul_client.errors import PhaulError


@command(
    "migrate",
    "phaul migrate redis-server --to node-b",
    "phaul migrate 4242 --to node-b:7707 --downtime 100ms --deadline 5m",
    "phaul migrate web --to 10.0.0.2 --mode pre-copy --bandwidth 100M --throttle",
    "phaul migrate web --to node-b --json | tail -n 1 | jq .pause_ms",
    "phaul migrate web --to node-b --detach   # then: phaul status, phaul cancel ID",
)
@parameters.target_argument
@migration_options
@click.option("--detach", is_flag=True, help="Print the migration's id and do not wait for its end.")
@click.option(
    "--attempts",
    metavar="N",
    type=click.IntRange(1, 100),
    default=DEFAULT_ATTEMPTS,
    show_default=True,
    help="How often to try while the program just looks at itself in /proc, which cannot move; not with --detach.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
async def migrate(
    session: Session, target: int | str, destination: str, detach: bool, attempts: int, quiet: bool, **options: Any
) -> ExitCode:
    """Move a process tree to another node.

    It is named by the PID of its root, by the name of a workload, or as a container: runc:NAME, crun:NAME, podman:NAME.
    Exactly one copy is alive whatever fails.

    Progress goes to stderr, the result to stdout. Ctrl-C cancels the migration and waits for how it ends; a second
    Ctrl-C leaves it running in phauld, as --detach does.

    With --json: a line {"event": "progress", …} for each snapshot, and at last {"event": "report", "outcome": "moved",
    "rolled-back", "refused", "cancelled", "in-doubt" or "failed", …}.
    """
    request = migrations_pb2.StartMigrationRequest(
        **target_field(target), destination=destination, options=build_options(options)
    )
    async with session.connect() as daemon:
        migration = await _start(daemon, request)
        if detach and not migration.HasField("error"):
            shown = {"event": "started", **migration_json(migration)}
            session.show(shown, migration.migration_id)
            return ExitCode.OK
        ended = await _follow(daemon, migration, progress.choose(json=session.json, quiet=quiet))
        for attempt in range(2, attempts + 1):
            if ended is None or not is_over_soon(ended):
                break
            _tell_of(ended, attempt, attempts, as_json=session.json)
            await asyncio.sleep(PAUSE_SECONDS)
            migration = await _start(daemon, request)
            ended = await _follow(daemon, migration, progress.choose(json=session.json, quiet=quiet))
    if ended is None:
        shown = {"event": "detached", "migration_id": migration.migration_id}
        session.show(shown, f"left running: phaul status {migration.migration_id}")
        return ExitCode.INTERRUPTED
    session.show(report_json(ended), render.summary(ended))
    if not session.json:
        tell_failure(ended)
    return exit_code_of(ended)


def _tell_of(ended: Migration, attempt: int, attempts: int, *, as_json: bool) -> None:
    """It is tried again."""
    failure = failure_of(ended)
    assert failure is not None
    if as_json:
        told = {"migration_id": ended.migration_id, "attempt": attempt, "attempts": attempts}
        click.echo(to_line({"event": "retry", **told, "error": failure_json(failure)}))
    else:
        click.echo(visible(f"phaul: {failure.message}; attempt {attempt} of {attempts}"), err=True)


async def _start(daemon: Daemon, request: migrations_pb2.StartMigrationRequest) -> Migration:
    """The migration as it begins; one that was refused at once looks like one that was refused later."""
    try:
        return (await daemon.migrations.StartMigration(request, timeout=LONG_CALL_SECONDS)).migration
    except grpc.aio.AioRpcError as exc:
        error = translate(daemon.address, exc)
        if not is_refusal(error):
            raise
        return refused(request, error)


def refused(request: migrations_pb2.StartMigrationRequest, error: PhaulError) -> Migration:
    """The record of a migration that never began."""
    name = f"ERROR_REASON_{error.reason}"
    known = name in types_pb2.ErrorReason.keys()  # noqa: SIM118 - not a dict, it only has keys()
    return Migration(
        phase=types_pb2.MIGRATION_PHASE_REFUSED,
        pid=request.pid,
        workload=request.workload,
        destination_address=request.destination,
        options=request.options,
        error=types_pb2.Failure(
            reason=types_pb2.ErrorReason.Value(name) if known else types_pb2.ERROR_REASON_INTERNAL,
            message=error.message,
            remedy=error.remedy,
        ),
    )


async def _follow(daemon: Daemon, migration: Migration, shown: progress.Progress) -> Migration | None:
    if not migration.migration_id:
        return migration
    with shown:
        shown.update(migration)
        return await Follower(daemon, migration.migration_id, shown).run()
