"""What an outgoing migration sends, and how fast, in its record: the page stream's bytes and those of the relays."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Final, NamedTuple

from phaul_client.remote import GrpcRemote
from phaul_client.serving import Progress
from phauld.node import bytes_acked
from phauld.source.report import Report

PROGRESS_SECONDS: Final = 0.2
RATE_SAMPLES: Final = 5


class Sample(NamedTuple):
    """So many bytes by then."""

    at: float  #: seconds on the monotonic clock
    sent_bytes: int


class Meter:
    """Of one migration."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._remote: GrpcRemote | None = None  # while it is watched
        self._samples: list[Sample] = []
        self._relayed = Progress(sent_bytes=0, wire_bytes=0, pages_missing=0)

    def on_progress(self, progress: Progress) -> None:
        """The relay has sent that much."""
        self._relayed = progress
        self._report.record.pages_missing = progress.pages_missing
        self._report.announce()

    @contextlib.asynccontextmanager
    async def watching(self, remote: GrpcRemote) -> AsyncIterator[None]:
        """Keep the record true meanwhile."""
        task = asyncio.create_task(self._watch(remote))
        self._remote = remote
        try:
            yield
        finally:
            self._remote = None
            task.cancel()
            with contextlib.suppress(OSError):  # what was sent since the last look
                self._count(remote)

    def look(self) -> None:
        """Somebody is about to be told: a fast move is over between two looks."""
        if self._remote is not None:
            with contextlib.suppress(OSError):
                self._count(self._remote)

    async def _watch(self, remote: GrpcRemote) -> None:
        while True:
            self._samples = [*self._samples[-RATE_SAMPLES:], Sample(time.monotonic(), self._count(remote))]
            self._report.record.rate_bytes_per_second = rate(self._samples)
            self._report.note_total()
            await self._report.notify()
            await asyncio.sleep(PROGRESS_SECONDS)

    def _count(self, remote: GrpcRemote) -> int:
        """What was sent so far, and on the network. Raises `OSError`."""
        acked, raw = bytes_acked(remote.wire_socket), remote.raw_bytes_sent
        record = self._report.record
        record.bytes_sent = (acked if raw is None else raw) + self._relayed.sent_bytes
        record.wire_bytes = acked + self._relayed.wire_bytes
        return record.bytes_sent


def rate(samples: Sequence[Sample]) -> int:
    """Bytes per second from the first to the last; 0 as long as there is but one."""
    seconds = samples[-1].at - samples[0].at
    return round((samples[-1].sent_bytes - samples[0].sent_bytes) / seconds) if seconds > 0 else 0
