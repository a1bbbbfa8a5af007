"""The record of one outgoing migration: what it is up to, how it went, and who waits for it to change.

The invariant: whatever ends a migration, its record says where the process runs.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from phaul.v1 import migrations_pb2, types_pb2
from phaul_client import commit, timeline
from phaul_client.client import RoundEnded
from phaul_client.commit import Phase
from phaul_client.timeline import Step
from phaul_criu.stats import DumpStats
from phauld import convert
from phauld.observer import Observer
from phauld.source.endings import Ending


class LastStep(Protocol):
    """What is told of the last dump and of what followed."""

    steps: list[Step]
    dump_stats: DumpStats | None
    image_bytes: int
    pause_seconds: float | None


class Report:
    """Of the migration that `record` is about."""

    def __init__(self, record: migrations_pb2.Migration, observer: Observer) -> None:
        now = time.time()
        record.phase = types_pb2.MIGRATION_PHASE_PREFLIGHT
        record.created_at.CopyFrom(convert.timestamp(now))
        record.phase_since.CopyFrom(convert.timestamp(now))
        self.record = record
        self._node_name = record.source.node_name
        self._observer = observer
        self._changed = asyncio.Condition()
        self._started = self._phase_started = time.monotonic()

    @property
    def is_over(self) -> bool:
        return self.record.HasField("finished_at")

    async def changed(self, timeout_seconds: float) -> None:
        """Wait for a change, but no longer than that."""
        try:
            async with asyncio.timeout(timeout_seconds), self._changed:
                await self._changed.wait()
        except TimeoutError:
            pass

    async def notify(self) -> None:
        """The record has changed."""
        async with self._changed:
            self._changed.notify_all()

    def announce(self) -> None:
        """The same, where nothing can be waited for."""
        task = asyncio.create_task(self.notify())
        task.add_done_callback(lambda done: done.exception())

    def warn(self, code: str, subject: str, message: str, remedy: str) -> None:
        """Something at the source is not as it should be, and the migration does not end for it."""
        self._problem(types_pb2.SEVERITY_WARNING, code, subject, message, remedy)

    def fail(self, code: str, subject: str, message: str, remedy: str) -> None:
        """It cannot be done."""
        self._problem(types_pb2.SEVERITY_ERROR, code, subject, message, remedy)

    def _problem(
        self, severity: types_pb2.Severity.ValueType, code: str, subject: str, message: str, remedy: str
    ) -> None:
        self.record.problems.add(
            code=code,
            severity=severity,
            subject=subject,
            message=message,
            remedy=remedy,
            node_name=self._node_name,
        )

    def begun(self) -> None:
        """It begins, or goes on after a restart of phauld."""
        self._observer.migration_started(self.record)

    def again(self) -> None:
        """A recovery takes it up: what an earlier attempt said of its end does not hold, or was said too early."""
        self.record.ClearField("finished_at")
        self.record.ClearField("error")

    def on_phase(self, phase: Phase) -> None:
        """Its coordinator has entered a phase."""
        self.record.in_doubt = phase in commit.IN_DOUBT
        if phase not in commit.FINAL:  # these are told when everything else about the end is, too
            self._enter(convert.migration_phase(phase))

    def on_round(self, ended: RoundEnded) -> None:
        """A pre-dump has ended."""
        forecast = ended.verdict.forecast
        bandwidth = forecast.bandwidth_bytes_per_second if forecast else 0.0
        self.record.rounds.append(convert.round_message(len(self.record.rounds) + 1, ended, bandwidth))
        self.record.rounds_reason = convert.rounds_reason(ended.verdict)
        if forecast is not None:
            self.record.expected_pause.CopyFrom(convert.duration(forecast.expected_pause_seconds))
        self.announce()

    def on_last_step(self, last: LastStep) -> None:
        """The last dump is over, well or badly."""
        record = self.record
        if last.dump_stats is not None:
            record.rounds.append(convert.last_round_message(len(record.rounds) + 1, last.dump_stats))
            record.bytes_sent = max(record.bytes_sent, sum(each.bytes_sent for each in record.rounds))
            record.bytes_sent += last.image_bytes
        if last.pause_seconds is not None:
            record.pause.CopyFrom(convert.duration(last.pause_seconds))
        origin = last.steps[0].start if last.steps else 0.0
        record.timeline.extend(timeline.messages(last.steps, origin, {"": self._node_name}))

    def moved(self, destination_pid: int, spoken_for: str) -> None:
        """It runs there; or so somebody has said, `spoken_for`, in place of the destination."""
        record = self.record
        record.pages_missing = 0
        record.destination_pid = destination_pid
        self._leave_phase()
        record.phase = types_pb2.MIGRATION_PHASE_DONE
        record.status_text = f"runs on {record.destination.node_name} as PID {destination_pid}"
        if spoken_for:
            record.status_text = f"killed here, as {spoken_for} decided: the destination did not answer"

    def ended(self, ending: Ending) -> None:
        """An attempt has ended, and has not moved it."""
        self.record.error.CopyFrom(convert.failure(ending.error))
        self._enter(ending.phase)

    def over(self) -> None:
        """Nothing follows."""
        self.record.finished_at.CopyFrom(convert.timestamp(time.time()))
        self.note_total()

    def told(self) -> None:
        """The record is complete."""
        self._observer.migration_ended(self.record)

    def note_total(self) -> None:
        """It lasts so long by now."""
        self.record.total.CopyFrom(convert.duration(time.monotonic() - self._started))

    def _enter(self, phase: types_pb2.MigrationPhase.ValueType) -> None:
        self._leave_phase()
        self.record.phase = phase
        self.record.phase_since.CopyFrom(convert.timestamp(time.time()))
        self.announce()

    def _leave_phase(self) -> None:
        now = time.monotonic()
        self._observer.phase_left(self.record, now - self._phase_started)
        self._phase_started = now
