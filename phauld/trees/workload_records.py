"""What this node knows of its workloads: a directory of records, a directory each.

Everything known about a tree is in its record, so a restarted phauld knows as much as the one before it. `shim.py` says
which files the shim writes; phauld's are

  record.json    {"spec", "created_at", "restarts", "in_a_row", "brought_by"}   before anything is started
  leaving.json   {"migration_id"}   a migration may take it away; gone when it is known that it did not
  arriving.json  {"migration_id"}   a migration brings it; gone when that is over, only written if it may be restarted
  moved.json     {"to", "at"}       it lives on elsewhere
  stopped.json   {"at"}             somebody stopped it: it is not restarted
  failure.json   {"error", "at"}    why it could not be started

The invariant: of a name at most one record is alive, and the newest record stands for the name; one that a migration
brought and that never ran stands for nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from phaul_client.errors import WorkloadExists, WorkloadNotFound
from phauld.trees import cgroup_limits, record_files
from phauld.trees.record_files import RecordFiles, boot_id, lives
from phauld.trees.restart_policy import (
    NEVER,
    NO_ATTEMPTS,
    UNDECIDED,
    Act,
    Attempts,
    Ending,
    Restart,
    Standing,
    Verdict,
    decide,
)
from phauld.trees.workload_spec import WorkloadSpec
from phauld.whole_files import write_json

START_TIMEOUT_SECONDS: Final = 10.0

#: "ending": its root has ended, and what that means is not known yet; "restarting": it is to be started again
State = Literal["starting", "running", "ending", "restarting", "exited", "moved", "never-ran", "lost"]
ShownState = Literal["running", "arriving", "restarting", "exited", "moved", "lost"]
#: They hold their name.
PRESENT: Final = ("starting", "running", "ending", "restarting")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A record, as it stands now."""

    directory: Path
    spec: WorkloadSpec
    state: State
    pid: int | None  #: root of the tree, while it runs
    created_at: float  #: seconds since the epoch
    verdict: Verdict = UNDECIDED  #: what becomes of it
    exit_code: int | None = None
    signal: int | None = None
    ended_at: float | None = None  #: seconds since the epoch, if it is known
    moved_to: str | None = None
    error: str = ""  #: why it could not be started
    attempts: Attempts = NO_ATTEMPTS
    was_stopped: bool = False  #: by `phaul stop`
    leaving: str = ""  #: the migration that may take it away
    arriving: str = ""  #: the migration that brings it, if it may be restarted
    brought_by: str = ""  #: the migration that brings it or has brought it

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def is_present(self) -> bool:
        """Whether it runs here, or is to."""
        return self.state in PRESENT

    @property
    def is_arriving(self) -> bool:
        """Whether a migration brings it, and nothing of it has run here yet."""
        return self.state == "starting" and bool(self.brought_by)

    @property
    def shown_state(self) -> ShownState:
        """Its state for those who ask from outside."""
        if self.is_arriving:
            return "arriving"
        match self.state:
            case "starting" | "ending":
                return "running"
            case "never-ran":
                return "lost"
            case state:
                return state

    @property
    def restart_at(self) -> float | None:
        """When it is to be started again, in seconds since the epoch; `None`: it is not, or it is not known."""
        if self.state != "restarting" or self.verdict.act is not Act.RESTART or self.ended_at is None:
            return None
        return self.ended_at + self.verdict.delay_seconds


class Records:
    """The records below one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.on_begun: Callable[[Path], None] = lambda _: None  #: told of each whose tree runs, or could not be started
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._forget_unstarted()

    def list(self) -> list[Workload]:
        """The newest record of every name, in the order of their making."""
        records = [workload for workload in self if workload.state != "never-ran"]
        newest = {workload.name: workload for workload in sorted(records, key=lambda each: each.created_at)}
        return sorted(newest.values(), key=lambda each: each.created_at)

    def get(self, name: str) -> Workload:
        """The newest record of a name. Raises `WorkloadNotFound`."""
        for workload in self.list():
            if workload.name == name:
                return workload
        raise WorkloadNotFound(name)

    def check_free(self, name: str) -> None:
        """Raises `WorkloadExists`."""
        for workload in self:
            if workload.name == name and workload.is_present:
                raise WorkloadExists(name)

    def make(self, spec: WorkloadSpec, attempts: Attempts = NO_ATTEMPTS, arriving: str = "", after: float = 0) -> Path:
        """Write down that it is about to be started; it is newer than `after`. Raises `OSError`."""
        directory = self._directory / f"{spec.name}@{uuid.uuid4().hex[:12]}"
        directory.mkdir(mode=0o700)
        created_at = max(time.time(), after + 1e-3)  # also when the clock was set back
        record = {"spec": asdict(spec), "created_at": created_at, **asdict(attempts), "brought_by": arriving}
        try:
            if arriving and spec.restart != NEVER:
                write_json(str(directory), "arriving.json", {"migration_id": arriving})
            write_json(str(directory), "record.json", record)
        except OSError:
            forget(directory)
            raise
        return directory

    def begun(self, name: str, directory: Path) -> None:
        """This one alone stands for the name from now on."""
        for record in list(self):
            if record.name == name and record.directory != directory:
                forget(record.directory)
        self.on_begun(directory)

    def _forget_unstarted(self) -> None:
        """Drop what an earlier phauld, killed in the middle of it, had no shim for: it would seem to start for ever.

        A shim that comes too late finds nothing to write to, and starts nothing.
        """
        for directory in self._directory.iterdir():
            if (directory / "shim.json").exists():
                continue
            dropped = directory if directory.name.startswith(".") else directory.with_name(f".{directory.name}")
            os.rename(directory, dropped)
            if (dropped / "shim.json").exists():  # written in this moment
                os.rename(dropped, directory)
            else:
                forget(dropped)

    def __iter__(self) -> Iterator[Workload]:
        for directory in self._directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if not directory.name.startswith("."):
                    yield read(directory)


def forget(directory: Path) -> None:
    """Drop a record, of which nothing runs."""
    cgroup_limits.drop(directory)
    shutil.rmtree(directory, ignore_errors=True)


def read(directory: Path) -> Workload:
    """A record as it stands. Raises `FileNotFoundError` if it was dropped."""
    record = json.loads((directory / "record.json").read_text(encoding="utf-8"))
    files = RecordFiles.read(directory)
    state, pid = _state(files, record["created_at"])
    if state == "lost" and (ending := record_files.read_json(directory / "exit.json")) is not None:  # written meanwhile
        files.ending = ending
        state, pid = _state(files, record["created_at"])
    spec = WorkloadSpec.from_json(record["spec"])
    attempts = Attempts(restarts=record.get("restarts", 0), in_a_row=record.get("in_a_row", 0))
    ended_at = (files.ending or {}).get("at")
    standing = _standing(files)
    ran_seconds = ended_at - record["created_at"] if ended_at is not None else 0.0
    verdict = decide(spec.restart, attempts, standing, _ending(files, state, spec), ran_seconds)
    return Workload(
        directory=directory,
        spec=spec,
        state=_shown(state, standing, verdict.act, spec.restart),
        pid=pid,
        created_at=record["created_at"],
        exit_code=(files.ending or {}).get("exit_code"),
        signal=(files.ending or {}).get("signal"),
        ended_at=ended_at,
        moved_to=(files.moved or {}).get("to"),
        error=(files.failure or {}).get("error", ""),
        attempts=attempts,
        verdict=verdict,
        was_stopped=files.stopped is not None,
        leaving=(files.leaving or {}).get("migration_id", ""),
        arriving=(files.arriving or {}).get("migration_id", ""),
        brought_by=record.get("brought_by", ""),
    )


def _state(files: RecordFiles, created_at: float) -> tuple[State, int | None]:
    """What the shim says, and what is to be seen of its tree."""
    if files.moved is not None:
        return "moved", None
    if files.ending is not None:
        return ("exited" if files.ending["outcome"] == "exited" else "never-ran"), None
    if files.tree is not None and lives(files.tree):
        return "running", files.tree["pid"]
    if files.shim is None:  # phauld may have ended before it could start one
        return ("starting" if time.time() - created_at < START_TIMEOUT_SECONDS else "lost"), None
    if lives(files.shim):
        return ("starting" if files.tree is None else "ending"), None
    return "lost", None


def _standing(files: RecordFiles) -> Standing:
    if files.moved is not None:
        return Standing.MOVED
    if files.stopped is not None:  # whatever becomes of a migration: it is not started again
        return Standing.STOPPED
    if files.leaving is not None:
        return Standing.LEAVING
    return Standing.ARRIVING if files.arriving is not None else Standing.HERE


def _ending(files: RecordFiles, state: State, spec: WorkloadSpec) -> Ending:
    if state == "never-ran":
        return Ending.NEVER_RAN
    if state == "lost":
        return _ending_of_the_lost(files, spec)
    if files.ending is None or (files.shim is not None and lives(files.shim)):
        return Ending.NOT_YET  # the shim stays as long as anything of the tree does
    if "exit_code" not in files.ending:
        return Ending.UNSEEN  # restored, and at its end before its shim could look at it
    return Ending.SUCCESS if files.ending["exit_code"] == 0 else Ending.FAILURE


def _ending_of_the_lost(files: RecordFiles, spec: WorkloadSpec) -> Ending:
    """The shim is gone: killed, or with its whole node."""
    known = files.tree or files.shim
    if known is not None and known["boot_id"] != boot_id():
        return Ending.UNSEEN
    if files.tree is not None and spec.new_pid_namespace:
        return Ending.UNSEEN  # the end of its init was the end of all
    return Ending.UNSURE


def _shown(state: State, standing: Standing, act: Act, restart: Restart) -> State:
    """A tree that has ended may be a migration's, or be started again: then its name is not free."""
    if state not in ("exited", "lost"):
        return state
    if standing in (Standing.LEAVING, Standing.ARRIVING):
        return "ending"
    return "restarting" if restart != NEVER and act is not Act.LEAVE else state
