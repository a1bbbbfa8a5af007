"""The file of the journal: made, locked, checked, brought up to date; what is wrong with one that cannot be opened."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sqlite3
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from phauld.errors import PhaulError

APPLICATION_ID: Final = 0x70686175  # "phau", in the file's header: no other program's file is taken for a journal

#: what makes each schema version out of the one before, from nothing to version 1 on; never edited, only added to
MIGRATIONS: Final = (
    """
    CREATE TABLE node (node_id TEXT NOT NULL);
    CREATE TABLE outgoing (
        sequence INTEGER PRIMARY KEY,
        migration_id TEXT NOT NULL UNIQUE,
        phase TEXT NOT NULL,
        created_at REAL NOT NULL,
        updated_at REAL NOT NULL,
        detail TEXT NOT NULL,
        report TEXT
    );
    CREATE TABLE incoming (
        sequence INTEGER PRIMARY KEY,
        migration_id TEXT NOT NULL UNIQUE,
        phase TEXT NOT NULL,
        source_node_id TEXT NOT NULL,
        cleaned INTEGER NOT NULL DEFAULT 0,
        created_at REAL NOT NULL,
        updated_at REAL NOT NULL,
        detail TEXT NOT NULL,
        failure TEXT
    );
    """,
)


class _Connection(sqlite3.Connection):
    """Which holds the file by a lock of its own, too: SQLite's are gone as soon as anything here opens and closes it.

    A preflight does so for the files of the tree, even where the tree is phauld itself.
    """

    _held: int | None = None

    def hold(self, path: Path) -> None:
        """Raises `OSError`: EWOULDBLOCK if somebody else has it."""
        self._held = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            if exc.errno == errno.EWOULDBLOCK:
                raise

    def close(self) -> None:
        """SQLite's first."""
        super().close()
        held, self._held = self._held, None
        if held is not None:
            os.close(held)


def open_file(path: Path) -> tuple[sqlite3.Connection, str]:
    """Open it, or make it; the connection, which holds it alone, and the node id. Raises `PhaulError`."""
    try:
        _create(path)
        uri = f"{path.absolute().as_uri()}?mode=rw"
        connection = sqlite3.connect(uri, timeout=0, isolation_level=None, uri=True, factory=_Connection)
        try:
            connection.hold(path)
            return connection, _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    except (OSError, sqlite3.Error) as exc:
        raise _cannot_open(path, exc) from exc
    except UnicodeDecodeError as exc:  # of SQLite's own message about a schema that is damaged
        raise _cannot_open(path, sqlite3.DatabaseError(str(exc))) from exc


def _create(path: Path) -> None:
    """Make the file with its mode; SQLite gives the same to its write-ahead log.

    A file that exists is never opened here: closing any descriptor of it drops the locks that this process has on it.
    """
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)


def _prepare(connection: sqlite3.Connection, path: Path) -> str:
    """Lock it, check it, bring its schema up to date, and return the node id."""
    connection.row_factory = sqlite3.Row
    connection.create_function("merged", 2, _merged, deterministic=True)
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    application_id, version = _value(connection, "PRAGMA application_id"), _value(connection, "PRAGMA user_version")
    if application_id != APPLICATION_ID and _value(connection, "SELECT count(*) FROM sqlite_schema"):
        raise PhaulError(f"{path} is not a journal of phauld's", remedy="choose another state_dir")
    if version > len(MIGRATIONS):
        raise PhaulError(
            f"the journal {path} is of a newer phauld (schema {version}; this one knows {len(MIGRATIONS)})",
            remedy="install the phauld that ran here last, or a newer one",
        )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA journal_mode = WAL")
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        new_node = f"INSERT INTO node VALUES ('{uuid.uuid4()}');" if number == 1 else ""
        header = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {number};"
        connection.executescript(f"BEGIN; {script} {new_node} {header} COMMIT")
    # A write that changes nothing: a file system that has become read-only is found now, not inside a freeze.
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    if (damage := _value(connection, "PRAGMA quick_check(1)")) != "ok":
        raise sqlite3.DatabaseError(damage)
    return str(_value(connection, "SELECT node_id FROM node"))


def _merged(earlier: str, later: str) -> str:
    return to_json(json.loads(earlier) | json.loads(later))


def to_json(value: Mapping[str, object]) -> str:
    return json.dumps(value, allow_nan=False)


def _value(connection: sqlite3.Connection, query: str) -> Any:
    row = connection.execute(query).fetchone()
    if row is None:
        raise sqlite3.DatabaseError(f"no answer to {query}")
    return row[0]


def _cannot_open(path: Path, error: OSError | sqlite3.Error) -> PhaulError:
    match _sqlite_code(error):
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return PhaulError(
                f"the journal {path} is held by another phauld",
                remedy="one phauld for each state_dir: stop the other one, or give this one its own",
            )
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_FULL | sqlite3.SQLITE_IOERR | None:
            return PhaulError(
                f"the journal {path} cannot be written: {error}",
                remedy="state_dir must be a directory on a writable disk with free space, owned by phauld's user",
            )
        case _:
            return PhaulError(
                f"the journal {path} is damaged: {error}",
                remedy="move it and its -wal file away: phauld starts as a new node with a new id, and every migration "
                "that was in doubt with this node wants `phaul resolve`; never put an old copy in its place",
            )


def _sqlite_code(error: OSError | sqlite3.Error) -> int | None:
    """SQLite's primary result code; `None` for an error of the system."""
    if isinstance(error, OSError):
        return sqlite3.SQLITE_BUSY if isinstance(error, BlockingIOError) else None
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    return code & 0xFF


def os_error(error: sqlite3.Error) -> OSError:
    number = errno.ENOSPC if _sqlite_code(error) == sqlite3.SQLITE_FULL else errno.EIO
    return OSError(number, f"journal: {error}")
