"""The client of a PostgreSQL that moves with its connections: one writes all the time, one has a transaction open.

    postgres_client.py RESULT SOURCE_ADDRESS ADDRESS PORT PACE     until SIGTERM; then RESULT holds `Seen` as JSON

Each answer of the writer is a row that PostgreSQL has committed. After SIGTERM the transaction, which was begun before
the move, goes on, and it is looked whether all is as it was told: rows and their sum, each row once; the transaction's
rows, cursor and lock, which nobody else sees or gets before it commits; the backends, which are the ones of before.
On SIGUSR1 the transaction is committed and verified, and the next one begun.

PACE is the time, in seconds, from an answer to the next row. It speaks the protocol itself, and needs nothing but the
standard library.
"""

import dataclasses
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 90.0
ANSWER_SECONDS = 120.0
SHOW_SECONDS = 0.1
FILLER_ROWS = 20000
CURSOR_ROWS = 1000
LOCK = 4711
_INT = struct.Struct("!i")
_LENGTH = struct.Struct("!ci")


@dataclass(slots=True)
class Seen:
    """What the client has seen."""

    answers: int = 0  #: rows that PostgreSQL said are committed
    longest_gap_ms: float = 0.0  #: between two answers
    gaps_ms: list[float] = dataclasses.field(default_factory=list)  #: the longest until each signal
    connections: int = 1  #: of the writer
    transactions: int = 0  #: that were open across a move, and committed behind it
    read_back: int = 0  #: rows that were there at the end
    failure: str = ""


class Connection:
    """One session, by the simple query protocol. Raises OSError, EOFError when it is lost, ValueError for an error."""

    def __init__(self, source: str, address: str, port: int) -> None:
        self._socket = socket.create_connection((address, port), ANSWER_SECONDS, source_address=(source, 0))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = self._socket.makefile("rb")
        words = b"".join(word + b"\0" for word in (b"user", b"postgres", b"database", b"postgres", b""))
        self._socket.sendall(_INT.pack(8 + len(words)) + _INT.pack(196608) + words)
        self._answer()
        self.backend = int(self.rows("SELECT pg_backend_pid()")[0][0])

    def rows(self, query: str) -> list[list[str]]:
        """What a query, or several, give."""
        text = query.encode() + b"\0"
        self._socket.sendall(_LENGTH.pack(b"Q", 4 + len(text)) + text)
        return self._answer()

    def _answer(self) -> list[list[str]]:
        found, error = [], ""
        while True:
            kind, length = _LENGTH.unpack(self._read(5))
            body = self._read(length - 4)
            if kind == b"D":
                found.append(_fields(body))
            elif kind == b"E":
                error = body.replace(b"\0", b" ").decode()
            elif kind == b"Z":
                if error:
                    raise ValueError(error)
                return found

    def _read(self, size: int) -> bytes:
        data = self._received.read(size)
        if len(data) != size:
            raise EOFError("PostgreSQL closed the connection")
        return data


def _fields(body: bytes) -> list[str]:
    found, offset = [], 2
    for _ in range(int.from_bytes(body[:2], "big")):
        (size,) = _INT.unpack_from(body, offset)
        found.append(body[offset + 4 : offset + 4 + size].decode())
        offset += 4 + size
    return found


def check(query: str, found: object, expected: object) -> None:
    if found != expected:
        raise ValueError(f"{query}: {found}, expected {expected}")


class Holder:
    """The connection with the open transaction."""

    def __init__(self, connection: Connection, number: int) -> None:
        self._connection = connection
        self._number = number
        connection.rows("BEGIN")
        connection.rows(f"INSERT INTO held VALUES ({number}, 'before')")
        connection.rows(f"SELECT pg_advisory_xact_lock({LOCK})")
        connection.rows(f"DECLARE c CURSOR FOR SELECT generate_series(1, {CURSOR_ROWS})")
        self._fetched = connection.rows(f"FETCH {CURSOR_ROWS // 2} FROM c")

    def finish(self, other: Connection) -> None:
        """It goes on where it was; `other` sees nothing of it before it commits, and all of it then."""
        mine = f"SELECT word FROM held WHERE n = {self._number} ORDER BY word"
        lock = f"SELECT pg_try_advisory_xact_lock({LOCK})"
        check("backend", self._connection.rows("SELECT pg_backend_pid()"), [[str(self._connection.backend)]])
        check(mine, other.rows(mine), [])
        check(lock, other.rows(lock), [["f"]])
        rest = self._connection.rows("FETCH ALL FROM c")
        check("cursor", self._fetched + rest, [[str(number)] for number in range(1, CURSOR_ROWS + 1)])
        self._connection.rows(f"INSERT INTO held VALUES ({self._number}, 'behind')")
        self._connection.rows("COMMIT")
        check(mine, other.rows(mine), [["before"], ["behind"]])
        check(lock, other.rows(lock), [["t"]])


def connect(source: str, address: str, port: int) -> Connection:
    """Wait for the server."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return Connection(source, address, port)
        except (OSError, EOFError, ValueError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def main() -> None:
    result, source, address, port, pace = sys.argv[1:]
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: told.append(number))
    seen = Seen()
    try:
        follow(Path(result), seen, told, float(pace), lambda: connect(source, address, int(port)))
    except (OSError, EOFError, ValueError) as exc:
        seen.failure = repr(exc)
    show(Path(result), seen)


def follow(result: Path, seen: Seen, told: list[int], pace: float, connection: Callable[[], Connection]) -> None:
    writer = connection()
    writer.rows("CREATE TABLE beats (n bigint, at timestamptz DEFAULT clock_timestamp())")
    writer.rows("CREATE TABLE total (sum numeric); INSERT INTO total VALUES (0)")
    writer.rows("CREATE TABLE held (n int, word text)")
    filler = f"SELECT g, repeat(md5(g::text), 16) FROM generate_series(1, {FILLER_ROWS}) g"
    writer.rows(f"CREATE TABLE filler AS {filler}; CREATE INDEX ON filler (g)")
    holding = connection()
    holder = Holder(holding, 0)
    last = shown = gap = 0.0
    while True:
        if told:
            seen.gaps_ms.append(gap)
            holder.finish(writer)
            seen.transactions += 1
            if told.pop(0) == signal.SIGTERM:
                break
            holder = Holder(holding, seen.transactions)
            last = gap = 0.0
        writer.rows(f"INSERT INTO beats VALUES ({seen.answers}); UPDATE total SET sum = sum + {seen.answers}")
        now = time.monotonic()
        if last:
            gap = max(gap, round((now - last) * 1000, 1))
            seen.longest_gap_ms = max(seen.longest_gap_ms, gap)
        last = now
        seen.answers += 1
        if now > shown + SHOW_SECONDS:
            show(result, seen)
            shown = now
        time.sleep(pace)
    count = seen.answers
    for query, expected in (
        ("SELECT count(*), count(DISTINCT n), max(n) FROM beats", [[str(count), str(count), str(count - 1)]]),
        ("SELECT sum FROM total", [[str(count * (count - 1) // 2)]]),
        (f"SELECT count(*) FROM ({filler} EXCEPT SELECT * FROM filler) x", [["0"]]),
        ("SELECT count(*) FROM filler", [[str(FILLER_ROWS)]]),
        ("SELECT pg_backend_pid()", [[str(writer.backend)]]),
    ):
        check(query, writer.rows(query), expected)
    seen.read_back = count


def show(path: Path, seen: Seen) -> None:
    """Replace the result as a whole."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(dataclasses.asdict(seen)))
    os.rename(temporary, path)


if __name__ == "__main__":
    main()
