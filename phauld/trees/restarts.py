"""Starts workloads again, as their policies say: the shell around the table in `restart_policy.py`.

One task for each record of a tree that has not ended for good. The invariant: between the last look at a record and the
new record nothing else runs in phauld, and the new record is on disk before anything is started.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Final

from phaul_client.tree import wait_until_gone
from phauld.journal import Journal
from phauld.observer import NOBODY, Observer
from phauld.trees import cgroup_limits, custody, workload_records
from phauld.trees.restart_policy import Act
from phauld.trees.workload_records import Workload
from phauld.trees.workloads import Workloads

logger = logging.getLogger(__name__)

POLL_SECONDS: Final = 0.05
UNSETTLED_POLL_SECONDS: Final = 0.5
RETRY_SECONDS: Final = 1.0


class Restarts:
    """The restarts of this node. Between `start` and `close`."""

    def __init__(self, workloads: Workloads, journal: Journal, observer: Observer = NOBODY) -> None:
        self._observer = observer
        self._workloads = workloads
        self._journal = journal
        self._tasks: dict[Path, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Take up what an earlier phauld left; every migration of it is in the journal, and those open are resumed."""
        for workload in list(self._workloads.records):
            try:
                await custody.settle(workload, self._journal)
            except OSError as exc:
                logger.error("not settled workload=%s error=%s", workload.name, exc)
        self._workloads.records.on_begun = self._watch
        for workload in self._workloads.list():
            if workload.is_present:
                self._watch(workload.directory)

    async def close(self) -> None:
        """phauld stops. What is being started is seen through; what waits is the next phauld's."""
        self._workloads.records.on_begun = lambda _: None
        tasks = tuple(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _watch(self, directory: Path) -> None:
        if directory in self._tasks:
            return
        task = asyncio.create_task(self._see_to(directory), name=f"restarts-{directory.name}")
        self._tasks[directory] = task
        task.add_done_callback(lambda _: self._tasks.pop(directory, None))

    async def _see_to(self, directory: Path) -> None:
        """Until the record is of the past."""
        while (workload := _read(directory)) is not None and workload.is_present:
            try:
                if await self._step(workload):
                    return
            except OSError as exc:  # the disk is full, for instance: it is tried until it is not
                logger.error("not restarted name=%s error=%s", workload.name, exc)
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:
                logger.exception("not restarted name=%s", workload.name)
                await asyncio.sleep(RETRY_SECONDS)
        cgroup_limits.drop(directory)

    async def _step(self, workload: Workload) -> bool:
        """Wait for what comes next; whether it was restarted. Raises `OSError`."""
        if workload.pid is not None:
            await wait_until_gone(workload.pid)
        elif workload.leaving or workload.arriving:
            await custody.settle(workload, self._journal)
            if (now := _read(workload.directory)) is not None and (now.leaving or now.arriving):
                await asyncio.sleep(UNSETTLED_POLL_SECONDS)
        elif workload.state == "restarting" and workload.verdict.act is Act.RESTART:
            await asyncio.sleep(_patience_seconds(workload))
            return await self._restart(workload)
        else:
            await asyncio.sleep(UNSETTLED_POLL_SECONDS if workload.state == "starting" else POLL_SECONDS)
        return False

    async def _restart(self, looked_at: Workload) -> bool:
        workload = _read(looked_at.directory)
        if workload is None or workload.state != "restarting" or workload.verdict.act is not Act.RESTART:
            return False  # stopped meanwhile
        if self._workloads.get(workload.name).directory != workload.directory:
            return True  # of the past
        started = await self._workloads.run_again(workload)
        self._observer.workload_restarted(failed=bool(started.error))
        logger.info(
            "workload restarted name=%s pid=%s restarts=%d error=%r",
            *(started.name, started.pid, started.attempts.restarts, started.error),
        )
        return True


def _read(directory: Path) -> Workload | None:
    try:
        return workload_records.read(directory)
    except FileNotFoundError:
        return None


def _patience_seconds(workload: Workload) -> float:
    """What is left of the delay; of all of it if nobody knows when it ended, or the clock was set."""
    delay = workload.verdict.delay_seconds
    if workload.restart_at is None:
        return delay
    return min(max(workload.restart_at - time.time(), 0.0), delay)
