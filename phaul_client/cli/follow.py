"""Following a migration to its end, with Ctrl-C: the first one cancels it, the second one leaves it running."""

import asyncio
import signal
from collections.abc import Callable
from typing import Final

import grpc

from phaul.v1 import migrations_pb2
from phaul.v1.migrations_pb2 import Migration
from phaul_client.cli.connection import CALL_SECONDS, Daemon, DaemonUnreachable, persistently, translate
from phaul_client.cli.outcomes import Outcome, outcome_of
from phaul_client.cli.progress import Progress

_BROKEN_OFF: Final = "the stream ended before the migration did"


async def watch(daemon: Daemon, migration_id: str, on_change: Callable[[Migration], None]) -> Migration:
    """The migration as it ended, or as it is in doubt: a held one may stay so for ever. Raises `AioRpcError`."""
    call = daemon.migrations.WatchMigration(migrations_pb2.WatchMigrationRequest(migration_id=migration_id))
    last = Migration()
    try:
        async for snapshot in call:
            last = snapshot.migration
            on_change(last)
            # The figures of the end may follow the phase of the end.
            if last.HasField("finished_at") or outcome_of(last) is Outcome.IN_DOUBT:
                return last
    finally:
        call.cancel()
    if outcome_of(last) is not None:
        return last
    raise grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details=_BROKEN_OFF
    )


class Follower:
    """Watches one migration. The invariant: however this ends, the migration itself goes on in phauld."""

    def __init__(self, daemon: Daemon, migration_id: str, progress: Progress) -> None:
        self._daemon = daemon
        self._migration_id = migration_id
        self._progress = progress
        self._watching: asyncio.Task[Migration] | None = None
        self._cancelling: asyncio.Task[None] | None = None
        self._left = False

    async def run(self) -> Migration | None:
        """The migration as it ended, or `None` if it was left running. Raises `PhaulError`."""
        loop = asyncio.get_running_loop()
        self._watching = asyncio.create_task(persistently(self._watch, self._progress.tell))
        loop.add_signal_handler(signal.SIGINT, self._interrupted)
        try:
            return await self._watching
        except asyncio.CancelledError:
            if not self._left:
                raise
            return None
        except grpc.aio.AioRpcError as exc:
            error = translate(self._daemon.address, exc)
            if isinstance(error, DaemonUnreachable):
                error.remedy = (
                    f"the migration goes on by itself; when phauld is back: phaul status {self._migration_id}"
                )
            raise error from exc
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            for task in (self._watching, self._cancelling):
                if task is not None:
                    task.cancel()

    async def _watch(self) -> Migration:
        return await watch(self._daemon, self._migration_id, self._progress.update)

    def _interrupted(self) -> None:
        if self._cancelling is None:
            self._progress.tell("cancelling, and waiting for how it ends; Ctrl-C again leaves the migration running")
            self._cancelling = asyncio.create_task(self._cancel())
        elif self._watching is not None:
            self._left = True
            self._watching.cancel()

    async def _cancel(self) -> None:
        request = migrations_pb2.CancelMigrationRequest(migration_id=self._migration_id, reason="Ctrl-C")
        try:
            await self._daemon.migrations.CancelMigration(request, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as exc:
            error = translate(self._daemon.address, exc)
            why = "it is too late: it is committed, or over" if error.reason == "WRONG_PHASE" else error.message
            self._progress.tell(f"not cancelled: {why}")
