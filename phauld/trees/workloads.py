"""The process trees that this node started or restored, each under a shim that outlives phauld.

What is known of each is in its record (`workload_records.py`). The invariant: what is started is in a record before,
and what could not be started leaves none, unless it was a restart: that is an end of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

from phaul_client.errors import InvalidRequest, PhaulError
from phaul_client.tree import wait_until_gone
from phaul_criu.child import finish
from phauld.trees import cgroup_limits, shim, workload_records
from phauld.trees.record_files import lives, read_json
from phauld.trees.restart_policy import NEVER, NO_ATTEMPTS, Attempts
from phauld.trees.restore_slot import POLL_SECONDS, RestoreSlot
from phauld.trees.shims import Shims
from phauld.trees.startable import told
from phauld.trees.workload_records import START_TIMEOUT_SECONDS, Records, Workload, forget
from phauld.trees.workload_spec import WorkloadSpec
from phauld.whole_files import write_json

logger = logging.getLogger(__name__)

RESTARTING_POLL_SECONDS: Final = 0.1


class Workloads:
    """The trees of this node."""

    def __init__(self, directory: Path, log_dir: Path) -> None:
        self.records: Final = Records(directory)
        self._log_dir = log_dir
        log_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
        self._shims = Shims()
        self.is_open: Callable[[str], bool] = lambda _: True  #: whether a migration away from here is not over

    def list(self) -> list[Workload]:
        """The newest record of every name, in the order of their making."""
        return self.records.list()

    def get(self, name: str) -> Workload:
        """The newest record of a name. Raises `WorkloadNotFound`."""
        return self.records.get(name)

    def by_pid(self, pid: int) -> Workload | None:
        """The running workload whose root has this PID."""
        return next((each for each in self.list() if each.pid == pid and each.state == "running"), None)

    @property
    def log_dir(self) -> Path:
        """Where the logs of workloads are."""
        return self._log_dir

    def log_path(self, name: str) -> str:
        return str(self._log_dir / f"{name}.log")

    async def run(self, spec: WorkloadSpec) -> Workload:
        """Start a workload. Raises `WorkloadExists`, and `InvalidRequest` when it cannot be started."""
        self.records.check_free(spec.name)
        needed = told(spec)
        return await finish(self._run(spec, self.records.make(spec), needed))

    async def _run(self, spec: WorkloadSpec, directory: Path, needed: dict[str, Any]) -> Workload:
        try:
            outcome = await self._shims.run(spec, directory, needed)
        except BaseException:
            forget(directory)
            raise
        if "error" in outcome:
            forget(directory)
            raise InvalidRequest(f"{spec.argv[0]!r} did not start: {outcome['error']}")
        self.records.begun(spec.name, directory)
        logger.info("workload started name=%s pid=%s", spec.name, outcome["pid"])
        return workload_records.read(directory)

    async def run_again(self, ended: Workload) -> Workload:
        """Start it once more, as its policy says; what cannot be started is on record as having failed.

        Raises `OSError` if that could not be written down: then it is still to be restarted.
        """
        directory = self.records.make(ended.spec, ended.verdict.attempts, after=ended.created_at)
        return await finish(self._run_again(ended, directory))

    async def _run_again(self, ended: Workload, directory: Path) -> Workload:
        try:
            if error := await self._try_again(ended.spec, directory):
                write_json(str(directory), "failure.json", {"error": error, "at": time.time()})
                if not (directory / "exit.json").exists():
                    failed = {"outcome": "exited", "exit_code": shim.NOT_STARTED, "signal": None, "at": time.time()}
                    write_json(str(directory), "exit.json", failed)
        except BaseException:
            if not lives(read_json(directory / "tree.json") or {}):
                forget(directory)
            raise
        self.records.begun(ended.name, directory)
        return workload_records.read(directory)

    async def _try_again(self, spec: WorkloadSpec, directory: Path) -> str:
        """Why it did not start; empty if it did. Raises `OSError`."""
        try:
            outcome = await self._shims.run(spec, directory, told(spec))
        except InvalidRequest as exc:  # a program, a directory or a user that there is no more
            return exc.message
        except TimeoutError:
            return f"its shim has not started it within {START_TIMEOUT_SECONDS:g} s"
        return str(outcome.get("error", ""))

    async def restore_under_shim(
        self,
        spec: WorkloadSpec,
        criu: Path,
        *,
        new_cgroup_namespace: bool = False,
        inherited: tuple[int, ...] = (),
        attempts: Attempts = NO_ATTEMPTS,
        migration_id: str = "",
    ) -> RestoreSlot:
        """Start a shim with a `criu swrk` below it, ready for a restore request. Raises `WorkloadExists`.

        criu inherits those descriptors. With a new cgroup namespace it waits for `RestoreSlot.go`: the cgroups that it
        is in by then are its roots.
        """
        self.records.check_free(spec.name)
        cgroup_limits.check(spec.cgroup)
        directory = self.records.make(spec, attempts, arriving=migration_id)
        try:
            made = await self._shims.restore(spec, directory, criu, inherited, waits=new_cgroup_namespace)
        except BaseException:
            forget(directory)
            raise
        return RestoreSlot(self.records, directory, *made)

    def found_slot(self, directory: Path) -> RestoreSlot:
        """What an earlier phauld had begun to restore in `directory`."""
        return RestoreSlot(self.records, directory, None, None)

    async def discard_slots(self, but: Collection[str]) -> None:
        """Those of an earlier phauld that was killed before its journal knew of them: nothing in them ever ran."""
        left = [each.directory for each in self.records if each.brought_by and each.state in ("starting", "never-ran")]
        await asyncio.gather(*(self.found_slot(each).discard() for each in left if str(each) not in but))

    async def wait(self, name: str) -> Workload:
        """Wait until the tree has ended for good (or moved away); its last record. Raises `WorkloadNotFound`."""
        workload = self.get(name)
        while workload.is_present:
            if workload.pid is not None:
                await wait_until_gone(workload.pid)
            await asyncio.sleep(RESTARTING_POLL_SECONDS if workload.state == "restarting" else POLL_SECONDS)
            workload = self._as_it_is_now(workload)
        return workload

    def _as_it_is_now(self, workload: Workload) -> Workload:
        """The same record, the one of its restart, or, if what brought it came to nothing, what else is of that name.

        Raises `WorkloadNotFound`.
        """
        if workload.spec.restart == NEVER:
            with contextlib.suppress(FileNotFoundError):
                if (now := workload_records.read(workload.directory)).state != "never-ran":
                    return now
        return self.get(workload.name)

    async def stop(self, name: str, number: int, grace_seconds: float) -> Workload:
        """Signal it, kill all of it after a while, and start it no more; its last record.

        Raises `WorkloadNotFound`, and `PhaulError` WRONG_PHASE if it is on the move and might be restarted elsewhere,
        or if it is arriving: it runs at its source, and nothing is here that could be stopped.
        """
        workload = self.get(name)
        if workload.is_arriving:
            raise _arriving(workload, "stop it at its source, or here once it runs")
        is_moving = bool(workload.leaving) and self.is_open(workload.leaving)
        if is_moving and workload.is_present and workload.spec.restart != NEVER:
            raise PhaulError(
                f"{name} is on the move",
                reason="WRONG_PHASE",
                remedy=f"phaul cancel {workload.leaving}, or stop it where it arrives",
            )
        if workload.is_present and not is_moving:
            self._note_stop(workload)
            workload = self.get(name)
        while workload.state in ("starting", "ending"):  # a moment, or as long as a migration
            await asyncio.sleep(POLL_SECONDS)
            workload = self._as_it_is_now(workload)
        if workload.pid is None:
            return workload
        with contextlib.suppress(ProcessLookupError):
            os.kill(workload.pid, number)
        try:
            async with asyncio.timeout(grace_seconds):
                return await self.wait(name)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError, InvalidRequest):  # it has ended in this moment
                self.send_signal(name, signal.SIGKILL)
        return await self.wait(name)

    def _note_stop(self, workload: Workload) -> None:
        """Nobody starts it again. Raises `OSError` if that could not be written down, and somebody would."""
        try:
            write_json(str(workload.directory), "stopped.json", {"at": time.time()})
        except FileNotFoundError:
            pass  # dropped in this moment
        except OSError:
            if workload.spec.restart != NEVER:
                raise

    def send_signal(self, name: str, number: int) -> None:
        """Signal the root of a tree; killing the root of a PID namespace ends the tree. Raises `WorkloadNotFound`."""
        workload = self.get(name)
        if workload.state != "running" or workload.pid is None:
            raise InvalidRequest(f"{name} does not run here (it is {workload.state})")
        os.kill(workload.pid, number)

    def remove(self, name: str) -> None:
        """Forget a workload that does not run. Raises `WorkloadNotFound`, `InvalidRequest`."""
        workload = self.get(name)
        if workload.is_arriving:
            raise _arriving(workload, "cancel it at its source, or stop it here once it runs, then remove it")
        if workload.is_present:
            raise PhaulError(f"{name} runs", reason="WRONG_PHASE", remedy=f"phaul stop {name}, then remove it")
        for record in list(self.records):
            if record.name == name:
                forget(record.directory)

    async def close(self) -> None:
        """Stop watching. The trees and their shims stay."""
        await self._shims.close()


def _arriving(workload: Workload, remedy: str) -> PhaulError:
    message = f"{workload.name} is arriving here with the migration {workload.brought_by}"
    return PhaulError(message, reason="WRONG_PHASE", remedy=remedy)
