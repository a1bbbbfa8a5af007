"""Whose a tree is while it moves, written into its record: until that is settled, nobody else may start it here.

The invariant: LEAVING is on disk before the other node can let the tree run, and is taken back only when the journal
says that the migration was rolled back. ARRIVING is on disk before anything is restored, and is taken back only when
the journal says that the tree ran here and that the source is needed no more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time

from phaul_client.commit import Phase
from phaul_client.errors import PhaulError
from phauld import session
from phauld.journal import Journal
from phauld.trees.record_files import read_json
from phauld.trees.restart_policy import NEVER, Attempts, after_running
from phauld.trees.workload_records import Workload, read
from phauld.trees.workload_spec import WorkloadSpec
from phauld.whole_files import write_json

logger = logging.getLogger(__name__)


def leaves(workload: Workload, migration_id: str) -> None:
    """A migration may take it away from now on. Raises `PhaulError` if it has ended, `OSError`."""
    with contextlib.suppress(FileNotFoundError):  # forgotten: it has ended and was started again
        if read(workload.directory).pid is not None:
            return write_json(str(workload.directory), "leaving.json", {"migration_id": migration_id})
    raise PhaulError(f"{workload.name} has ended", reason="PID_NOT_FOUND", remedy="phaul ps --all")


def carried(workload: Workload) -> tuple[WorkloadSpec, Attempts]:
    """What the other node is to know of it. Whoever was told to stop it here is heard there, too."""
    with contextlib.suppress(FileNotFoundError):
        workload = read(workload.directory)
    spec = dataclasses.replace(workload.spec, restart=NEVER) if workload.was_stopped else workload.spec
    return spec, after_running(workload.attempts, time.time() - workload.created_at)


def stays(workload: Workload, migration_id: str) -> None:
    """The migration did not take it away, and never will. Raises `OSError`."""
    if _is_leaving_by(workload, migration_id):
        (workload.directory / "leaving.json").unlink(missing_ok=True)


def mark_moved(workload: Workload, destination: str, migration_id: str) -> None:
    """Record that the tree lives on elsewhere. Raises `OSError`."""
    if _is_leaving_by(workload, migration_id):
        write_json(str(workload.directory), "moved.json", {"to": destination, "at": time.time()})


def _is_leaving_by(workload: Workload, migration_id: str) -> bool:
    leaving = read_json(workload.directory / "leaving.json")
    return leaving is None or leaving["migration_id"] == migration_id


async def settle(workload: Workload, journal: Journal) -> None:
    """Note in its record how a migration of it ended, if the journal knows. Raises `OSError`."""
    if workload.leaving:
        entry = await journal.get_outgoing(workload.leaving)
        if entry is None:  # no longer on record: then it is not known who has it
            logger.warning("not on record migration_id=%s workload=%s", workload.leaving, workload.name)
        elif entry.phase is Phase.DONE or (entry.phase is Phase.CONFIRMED and workload.pid is None):
            # DONE waits for no disk: after CONFIRMED there is no way back.
            mark_moved(workload, entry.detail["destination"], workload.leaving)
        elif entry.phase is Phase.ROLLED_BACK:
            stays(workload, workload.leaving)
    elif workload.arriving:
        session_entry = await journal.get_incoming(workload.arriving)
        if session_entry is not None and session_entry.phase is session.Phase.RUNNING and session_entry.cleaned:
            (workload.directory / "arriving.json").unlink(missing_ok=True)
