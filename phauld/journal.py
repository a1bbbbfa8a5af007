"""The durable journal: what a restarted phauld must know of every migration, out of here and in to here.

The invariant: when `record` has returned, what it wrote survives kill -9 and a power cut, and so does everything that
was begun before it. All work goes through one thread in the order of the calls; a cancelled caller changes neither.

One SQLite file in WAL mode with synchronous=FULL: one fdatasync for a record, where a rollback journal takes four.
Every write is a single statement, so it is there as a whole or not at all. See docs/adr/0002-journal.md.
"""

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, ParamSpec, TypeVar

from phaul_client import commit
from phauld import journal_sql as sql
from phauld import session
from phauld.errors import MigrationNotFound, PhaulError
from phauld.journal_file import open_file, os_error, to_json

logger = logging.getLogger(__name__)

INLINE_SECONDS = 0.01  # for so long the event loop stands still for a write; a slower disk does not stop it

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Phase = TypeVar("_Phase", commit.Phase, session.Phase)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutgoingEntry:
    """What is on record about a migration away from this node."""

    migration_id: str
    phase: commit.Phase
    created_at: float  #: Unix time in seconds
    updated_at: float  #: when the phase was recorded, Unix time in seconds
    detail: Mapping[str, Any]  #: JSON, as it was noted
    report: Mapping[str, Any] | None  #: JSON; how it ended


@dataclass(frozen=True, slots=True, kw_only=True)
class IncomingEntry:
    """What is on record about a session on this node."""

    migration_id: str
    phase: session.Phase
    source_node_id: str
    cleaned: bool  #: nothing of it is left to kill or to remove
    created_at: float  #: Unix time in seconds
    updated_at: float  #: when the phase was recorded, Unix time in seconds
    detail: Mapping[str, Any]  #: JSON, as it was noted
    failure: Mapping[str, Any] | None  #: JSON; why it was aborted


class _Record(Generic[_Phase]):
    """Writes about one migration; at most one at a time for each migration and side."""

    _record_sql: str

    def __init__(self, journal: "Journal", migration_id: str) -> None:
        self._journal = journal
        self._migration_id = migration_id
        self._noted: dict[str, Any] = {}

    def note(self, **detail: object) -> None:
        """Keep this for the next `record`, which writes it in the same fsync.

        It goes to what is on record as with `dict.update`: key by key, the later value replaces the earlier.

        Raises:
            TypeError, ValueError: a value cannot be written as JSON.
        """
        self._noted |= json.loads(to_json(detail))

    async def record(self, phase: _Phase, **detail: object) -> None:
        """Write the phase, and what was noted. On return it survives a crash.

        Cancelled, the write still takes place, in its turn.

        Raises:
            OSError: it could not be written (ENOSPC, EIO); what was on record still is, and the notes are kept.
            TypeError, ValueError: a value cannot be written as JSON.
        """
        self.note(**detail)
        # All notes, every time: a write that failed, or whose caller is gone, needs no undoing here.
        row = self._row() | {
            "migration_id": self._migration_id,
            "phase": phase.value,
            "now": time.time(),
            "detail": to_json(self._noted),
        }
        await self._journal._write(self._record_sql, row)

    def _row(self) -> dict[str, str | None]:
        return {}


class OutgoingRecord(_Record[commit.Phase]):
    """The source's record of one migration."""

    _record_sql = sql.RECORD_OUTGOING

    async def entry(self) -> OutgoingEntry | None:
        """What is on record; `None` if nothing ever was. Raises `OSError`."""
        return await self._journal.get_outgoing(self._migration_id)

    async def report(self, report: Mapping[str, object]) -> None:
        """Write how it ended, as JSON, in a write of its own.

        Raises:
            MigrationNotFound: no phase was ever recorded.
            OSError: it could not be written.
            TypeError, ValueError: it cannot be written as JSON.
        """
        await self._journal._write(sql.REPORT, {"migration_id": self._migration_id, "report": to_json(report)})


class IncomingRecord(_Record[session.Phase]):
    """The destination's record of one session."""

    _record_sql = sql.RECORD_INCOMING

    def __init__(self, journal: "Journal", migration_id: str, source_node_id: str) -> None:
        super().__init__(journal, migration_id)
        self._source_node_id = source_node_id
        self._failure: str | None = None

    def note_failure(self, failure: Mapping[str, object]) -> None:
        """Keep, for the next `record`, why it is aborted. Raises `TypeError` and `ValueError` as `note` does."""
        self._failure = to_json(failure)

    async def cleaned(self) -> None:
        """Write that nothing of it is left to kill or to remove: a restarted phauld need not look again.

        Raises:
            MigrationNotFound: no phase was ever recorded.
            OSError: it could not be written.
        """
        await self._journal._write(sql.CLEANED, {"migration_id": self._migration_id})

    def _row(self) -> dict[str, str | None]:
        return {"source_node_id": self._source_node_id, "failure": self._failure}


class Journal:
    """The journal of one node, held exclusively from `open` to `aclose`. Reads see every write begun before them.

    Attributes:
        node_id: made when the file was; a lost journal is a new node.
    """

    def __init__(self, thread: ThreadPoolExecutor, connection: sqlite3.Connection, node_id: str) -> None:
        self._thread = thread
        self._connection = connection
        self.node_id: Final = node_id

    @classmethod
    async def open(cls, path: Path) -> "Journal":
        """Open the journal, or make it, with mode 0600.

        Raises:
            PhaulError: it is held by another phauld, of a newer one, not a journal, damaged, or cannot be written.
        """
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        try:
            return cls(thread, *await asyncio.wrap_future(thread.submit(open_file, path)))
        except BaseException:
            thread.shutdown(wait=False)
            raise

    async def aclose(self) -> None:
        """Let go of the file when every write that was begun is done; again, it does nothing."""
        try:
            await self._run(self._connection.close)
        except PhaulError:
            return
        finally:
            self._thread.shutdown(wait=False)

    def outgoing(self, migration_id: str) -> OutgoingRecord:
        """To write about a migration away from here, new or on record. Nothing is written yet."""
        return OutgoingRecord(self, migration_id)

    def incoming(self, migration_id: str, source_node_id: str) -> IncomingRecord:
        """To write about a session here, new or on record. Nothing is written yet; the first source id stays."""
        return IncomingRecord(self, migration_id, source_node_id)

    async def get_outgoing(self, migration_id: str) -> OutgoingEntry | None:
        """What is on record; `None` if nothing ever was. Raises `OSError`."""
        rows = await self._run(self._select, sql.ONE_OUTGOING, (migration_id,))
        return _outgoing_entry(rows[0]) if rows else None

    async def get_incoming(self, migration_id: str) -> IncomingEntry | None:
        """What is on record; `None` if nothing ever was: the answer of a session is never dropped. Raises `OSError`."""
        rows = await self._run(self._select, sql.ONE_INCOMING, (migration_id,))
        return _incoming_entry(rows[0]) if rows else None

    async def list_outgoing(self, *, unfinished_only: bool = False, limit: int = 1000) -> tuple[OutgoingEntry, ...]:
        """Migrations away from here, the newest first, at most `limit`. Raises `OSError`."""
        query = sql.UNFINISHED_OUTGOING if unfinished_only else sql.EVERY_OUTGOING
        rows = await self._run(self._select, query, (limit,))
        return tuple(map(_outgoing_entry, rows))

    async def unfinished_outgoing(self) -> tuple[OutgoingEntry, ...]:
        """All that a restarted phauld must see to as a source, the newest first. Raises `OSError`."""
        return await self.list_outgoing(unfinished_only=True, limit=-1)

    async def unfinished_incoming(self) -> tuple[IncomingEntry, ...]:
        """All that a restarted phauld must see to as a destination, the newest first. Raises `OSError`.

        A session in a final phase is among them until it is on record as cleaned: ABORTED is recorded before the kill.
        """
        return tuple(map(_incoming_entry, await self._run(self._select, sql.UNFINISHED_INCOMING)))

    async def drop_oldest(self, keep: int, at_most: int) -> int:
        """Of what is over, keep the newest so many of each side as they are; see to some of the others, and how many.

        A migration away from here is dropped. Of a session its answer stays, for good: a source that is in doubt may
        ask after any time, and "never heard of it" would be a lie. What is open, in doubt or not cleaned is left alone.
        Raises `OSError`.
        """
        return await self._run(self._drop_oldest, {"keep": keep, "at_most": at_most, "answer": sql.ANSWER_CHARACTERS})

    async def _run(
        self, work: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        """Do it on the journal's thread when its turn comes, even if the caller is cancelled meanwhile."""
        try:
            future = self._thread.submit(work, *args, **kwargs)
        except RuntimeError as exc:
            raise PhaulError("the journal is closed: phauld is stopping", reason="PEER_UNREACHABLE") from exc
        # Wait here for a moment: an fsync is mostly shorter than the way back through the event loop, and a busy loop,
        # which lets go of the GIL and takes it back at once, can keep the thread from it for seconds (measured).
        if wait((future,), timeout=INLINE_SECONDS).done:
            return future.result()
        return await asyncio.shield(asyncio.wrap_future(future))

    async def _write(self, statement: str, row: Mapping[str, str | float | None]) -> None:
        await self._run(self._execute, statement, row)

    def _execute(self, statement: str, row: Mapping[str, str | float | None]) -> None:
        try:
            changed = self._connection.execute(statement, row).rowcount
        except sqlite3.Error as exc:
            # Logged here as well: the caller may have been cancelled.
            logger.error("journal not written migration_id=%s error=%s", row["migration_id"], exc)
            raise os_error(exc) from exc
        if not changed:
            raise MigrationNotFound(str(row["migration_id"]))

    def _drop_oldest(self, values: Mapping[str, int]) -> int:
        try:
            return sum(
                self._connection.execute(each, values).rowcount for each in (sql.DROP_OUTGOING, sql.CUT_INCOMING)
            )
        except sqlite3.Error as exc:
            raise os_error(exc) from exc

    def _select(self, query: str, values: tuple[str | int, ...] = ()) -> list[sqlite3.Row]:
        try:
            return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as exc:
            raise os_error(exc) from exc


def _outgoing_entry(row: sqlite3.Row) -> OutgoingEntry:
    return OutgoingEntry(
        migration_id=row["migration_id"],
        phase=commit.Phase(row["phase"]),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        detail=json.loads(row["detail"]),
        report=json.loads(row["report"]) if row["report"] is not None else None,
    )


def _incoming_entry(row: sqlite3.Row) -> IncomingEntry:
    return IncomingEntry(
        migration_id=row["migration_id"],
        phase=session.Phase(row["phase"]),
        source_node_id=row["source_node_id"],
        cleaned=bool(row["cleaned"]),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        detail=json.loads(row["detail"]),
        failure=json.loads(row["failure"]) if row["failure"] is not None else None,
    )
