"""A client of redis that writes all the time and follows redis wherever it goes.

    redis_writer.py RESULT PORT ADDRESS [ADDRESS…]     until SIGTERM; then RESULT holds `Written` as JSON

It writes 0, 1, 2 … to the keys of these names in database 1, each when the one before was acknowledged. While an
answer is due it keeps the connection and tries the other addresses as well: who answers first is where it goes on. So
it loses no time by waiting, and no write by giving up. Needs nothing but the standard library.
"""

import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PATIENCE_SECONDS = 0.001  #: without an answer, before the other addresses are tried
CONNECT_SECONDS = 0.05
GIVE_UP_SECONDS = 60.0
PACE_SECONDS = 0.0005  #: from an answer to the next write
SHOW_SECONDS = 0.1
OK = b"+OK\r\n"
SELECT = b"*2\r\n$6\r\nSELECT\r\n$1\r\n1\r\n"


@dataclass(slots=True)
class Written:
    """What the writer has seen."""

    acknowledged: int = 0
    longest_gap_ms: float = 0.0  #: between two acknowledged writes
    address: str = ""  #: of who acknowledged last
    moves: int = 0  #: how often that was another one than before


class Attempt:
    """A connection that owes an answer. Its methods raise OSError when it is lost."""

    def __init__(self, address: str, port: int) -> None:
        self.address = address
        self.socket = socket.create_connection((address, port), CONNECT_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._due = b""
        self._send(SELECT)

    def write(self, number: int) -> None:
        name = b"%d" % number
        self._send(b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n" % (len(name), name, len(name), name))

    def is_answered(self) -> bool:
        """Take what has come; whether that is all that is due."""
        data = self.socket.recv(len(self._due))
        if not data or not self._due.startswith(data):
            raise ConnectionError(f"{self.address}: {data!r}")
        self._due = self._due[len(data) :]
        return not self._due

    def _send(self, command: bytes) -> None:
        self.socket.sendall(command)
        self._due += OK


class Writer:
    """Writes to whoever answers."""

    def __init__(self, addresses: Sequence[str], port: int) -> None:
        self.written = Written()
        self._addresses = addresses
        self._port = port
        self._attempts: dict[str, Attempt] = {}
        self._last = 0.0

    def write_next(self) -> None:
        """Return when the next write is acknowledged. Raises TimeoutError after a minute without."""
        number, deadline = self.written.acknowledged, time.monotonic() + GIVE_UP_SECONDS
        for attempt in list(self._attempts.values()):  # one at most: who answered last
            try:
                attempt.write(number)
            except OSError:
                self._drop(attempt)
        while (answered := self._wait()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError("nobody answers")
            for address in self._addresses:
                if address not in self._attempts:
                    self._connect(address, number)
        self._count(answered)

    def _connect(self, address: str, number: int) -> None:
        try:
            self._attempts[address] = attempt = Attempt(address, self._port)
            attempt.write(number)
        except OSError:
            if address in self._attempts:
                self._drop(self._attempts[address])

    def _wait(self) -> Attempt | None:
        """Who has answered within our patience."""
        if not self._attempts:
            time.sleep(PATIENCE_SECONDS)
            return None
        with selectors.DefaultSelector() as selector:
            for attempt in self._attempts.values():
                selector.register(attempt.socket, selectors.EVENT_READ, attempt)
            for key, _ in selector.select(PATIENCE_SECONDS):
                found: Attempt = key.data
                try:
                    if found.is_answered():
                        return found
                except OSError:
                    self._drop(found)
        return None

    def _drop(self, attempt: Attempt) -> None:
        del self._attempts[attempt.address]
        attempt.socket.close()

    def _count(self, answered: Attempt) -> None:
        for attempt in [each for each in self._attempts.values() if each is not answered]:
            self._drop(attempt)
        now, seen = time.monotonic(), self.written
        if self._last:
            seen.longest_gap_ms = max(seen.longest_gap_ms, round((now - self._last) * 1000, 3))
        seen.moves += seen.address not in ("", answered.address)
        seen.address, self._last = answered.address, now
        seen.acknowledged += 1


def main() -> None:
    result, port, *addresses = sys.argv[1:]
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    writer, shown = Writer(addresses, int(port)), 0.0
    while not stopped:
        writer.write_next()
        if time.monotonic() > shown + SHOW_SECONDS:
            show(Path(result), writer.written)
            shown = time.monotonic()
        time.sleep(PACE_SECONDS)
    show(Path(result), writer.written)


def show(path: Path, written: Written) -> None:
    """Replace the result as a whole."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(asdict(written)))
    os.rename(temporary, path)


if __name__ == "__main__":
    main()
