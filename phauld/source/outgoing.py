"""One outgoing migration, attempt after attempt until it is over, and a record that can be watched.

What an attempt does is in `attempts.py`; here are those who start, change and stop it, and its end. The invariant:
whatever ends it, the record says where the process runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

from google.protobuf import json_format

from phaul.v1 import migrations_pb2, types_pb2
from phaul_client import commit
from phaul_client.commit import Event, Phase
from phaul_client.errors import PeerError, PhaulError
from phaul_client.local import CriuLocal
from phaul_client.status import reason_of
from phaul_criu.child import finish
from phauld.costs import CostBook
from phauld.journal import OutgoingEntry, OutgoingRecord
from phauld.node import Node
from phauld.observer import NOBODY, Observer
from phauld.source.attempts import Attempts
from phauld.source.endings import Attempt, ending
from phauld.source.report import Report
from phauld.source.target import Target

logger = logging.getLogger(__name__)

AGAIN_SECONDS: Final = 1.0
ANSWERED_SECONDS: Final = 3.0
RESOLUTIONS: Final = {
    migrations_pb2.RESOLUTION_KILL: Event.RESOLVED_KILL,
    migrations_pb2.RESOLUTION_RESUME: Event.RESOLVED_RESUME,
}


class Outgoing:
    """One migration from its start to its end. `start` or `resume` it once; `record` is what it is up to now."""

    def __init__(
        self,
        migration_id: str,
        target: Target,
        destination: str,
        options: types_pb2.Options,
        *,
        node: Node,
        directory: Path,
        journal: OutgoingRecord,
        costs: CostBook,
        observer: Observer = NOBODY,
    ) -> None:
        self._task: asyncio.Task[None] | None = None
        self._cancelled = False
        self._is_stopping = False
        self._is_left = False  # its end is a recovery's: soon, or when phauld is started again
        self._journal = journal
        self.record = migrations_pb2.Migration(
            migration_id=migration_id,
            pid=target.pid,
            workload=target.name,
            process_name=target.process_name,
            source=node.info(),
            destination_address=destination,
            options=options,
        )
        self._report = Report(self.record, observer)
        self._attempts = Attempts(
            self.record,
            target,
            node=node,
            directory=directory,
            journal=journal,
            costs=costs,
            observer=observer,
            report=self._report,
            on_lost=self._lose_destination,
        )

    @property
    def migration_id(self) -> str:
        return self.record.migration_id

    @property
    def is_over(self) -> bool:
        return self._report.is_over

    def start(self) -> None:
        """Move the process."""
        self._report.begun()
        self._task = asyncio.create_task(
            self._see_through(self._attempts.migrate()), name=f"migration-{self.migration_id}"
        )

    def resume(self, entry: OutgoingEntry) -> None:
        """Bring to its end what an earlier phauld left in the journal."""
        self._report.begun()
        self._task = asyncio.create_task(
            self._see_through(self._attempts.recover(entry)), name=f"recovery-{self.migration_id}"
        )

    async def check(self) -> types_pb2.TreeFacts | None:
        """Only the preflight: the tree; the record then has what else it found. Raises `PeerError`."""
        return await self._attempts.check()

    async def wait(self) -> None:
        """Wait until it is over."""
        assert self._task is not None
        await asyncio.wait([self._task])

    async def changed(self, timeout_seconds: float) -> None:
        """Wait for a change of the record, but no longer than that."""
        await self._report.changed(timeout_seconds)

    def cancel(self) -> bool:
        """Stop and let the process run on here; `False` when it is too late."""
        if self.is_over or self._task is None:
            return False
        local = self._attempts.coordinator
        if isinstance(local, CriuLocal) and local.is_dumping:
            return local.cancel()
        if local is not None and local.phase not in commit.CANCELLABLE:
            return False
        self._cancelled = True
        self._task.cancel()
        return True

    async def update(self, wish: migrations_pb2.UpdateMigrationRequest) -> None:
        """Change it under way. Raises `PhaseError`, `InvalidRequest`, and `PhaulError` UNSUPPORTED; then nothing is."""
        await self._attempts.controls.update(wish, self._attempts.phase or Phase.PREFLIGHT)
        await self._report.notify()

    def _lose_destination(self, error: PeerError) -> None:
        local = self._attempts.coordinator
        if isinstance(local, CriuLocal) and local.lose_destination(error) and not local.is_dumping:
            assert self._task is not None
            self._task.cancel()  # a round waits, perhaps for ever, for a connection that is dead

    async def resolve(self, request: migrations_pb2.ResolveRequest) -> bool:
        """An operator's answer to a doubt, seen to its end; `False` when there is none, or nobody to hear it.

        Raises `PhaulError` if the destination answers after all, and does not end it: then it decides.
        """
        if self._is_left or self._attempts.coordinator is None or self._task is None:
            return False
        operator = f"an operator ({request.reason})" if request.reason else "an operator"
        answer = self._attempts.coordinator.resolve(RESOLUTIONS[request.resolution], operator)
        if answer is None:
            return False
        self.record.resolution = request.resolution
        self._journal.note(resolution=migrations_pb2.Resolution.Name(request.resolution), reason=request.reason)
        answer.add_done_callback(lambda _: self.record.ClearField("resolution"))
        ends: set[asyncio.Future[Any]] = {self._task, answer}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            await asyncio.wait({self._task}, timeout=ANSWERED_SECONDS)
            if not self.is_over:
                raise PhaulError(
                    f"the destination answers for itself ({answer.result()}): it decides",
                    reason="WRONG_PHASE",
                    remedy=f"phaul status {self.migration_id}",
                )
        return True

    async def stop(self) -> None:
        """phauld stops: cancel what can be cancelled; what is in doubt stays so, in the journal."""
        self._is_stopping = True
        if self._task is not None and not self._task.done():
            if not self.cancel():
                self._task.cancel()
            await asyncio.wait([self._task])

    async def _see_through(self, work: Coroutine[None, None, None]) -> None:
        """To the end, unless phauld stops: what failed in doubt goes on from the journal, as after a restart."""
        await self._run(work)
        while self._is_left and not self._is_stopping:
            await asyncio.sleep(AGAIN_SECONDS)
            try:
                entry = await self._journal.entry()
            except OSError as exc:
                logger.error("journal not read migration_id=%s error=%s", self.migration_id, exc)
                continue
            assert entry is not None  # it was in doubt, so it is on record
            await self._run(self._attempts.recover(entry))

    async def _run(self, work: Coroutine[None, None, None]) -> None:
        self._is_left = False
        try:
            await work
        except (Exception, asyncio.CancelledError) as exc:
            local = self._attempts.coordinator
            if local is None or local.phase is not Phase.DONE:
                self._ended_badly(exc)
            elif self.record.phase != types_pb2.MIGRATION_PHASE_DONE:
                logger.warning("moved, but then migration_id=%s error=%r", self.migration_id, exc)
                self._attempts.moved(local)
        finally:
            await finish(self._finish())

    @property
    def _attempt(self) -> Attempt:
        return Attempt(
            migration_id=self.migration_id,
            phase=self._attempts.phase,
            is_recovery=self._attempts.is_recovery,
            is_cancelled=self._cancelled,
            has_opened=self._attempts.has_opened,
            pipe_failure=self._attempts.pipe_failure,
            deadline_seconds=self._attempts.controls.options.deadline_seconds,
        )

    def _ended_badly(self, error: BaseException) -> None:
        end = ending(self._attempt, error)
        if end is None:
            logger.warning("left to a recovery migration_id=%s error=%r", self.migration_id, error)
            return
        self._report.ended(end)
        logger.warning(
            "ended migration_id=%s phase=%s reason=%s error=%s",
            self.migration_id,
            types_pb2.MigrationPhase.Name(end.phase),
            reason_of(end.error),
            end.error,
            exc_info=error if reason_of(end.error) == "INTERNAL" else None,
        )

    async def _finish(self) -> None:
        attempt = self._attempt
        if attempt.is_left:
            self._is_left = True
            return
        if attempt.phase is Phase.ROLLED_BACK:
            self._attempts.stayed()
        self._report.over()
        if attempt.phase not in (None, Phase.PREFLIGHT):
            with contextlib.suppress(OSError, PhaulError):
                await self._journal.report(json_format.MessageToDict(self.record))
        self._report.told()
        self._attempts.forget()
        await self._report.notify()
