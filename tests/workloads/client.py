"""The client of a moving server: asks all the time, checks every answer, and follows the server wherever it goes.

    client.py PROTOCOL RESULT PORT ADDRESS [ADDRESS…]     until SIGTERM; then RESULT holds `Seen` as JSON

PROTOCOL is "lines" (our own servers), "http", "redis" or "memcached". While an answer is due it keeps its connection
and tries the other addresses as well: who accepts a connection is where it goes on. Needs nothing but the standard
library.
"""

import dataclasses
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PATIENCE_SECONDS = 0.005
CONNECT_SECONDS = 0.05
GIVE_UP_SECONDS = 60.0
PACE_SECONDS = 0.0005
SHOW_SECONDS = 0.1
HTTP_BODY = b"".join(b"%07d\n" % number for number in range(4096))


@dataclass(slots=True)
class Seen:
    """What the client has seen."""

    answers: int = 0
    longest_gap_ms: float = 0.0  #: between two answers
    connections: int = 0
    address: str = ""
    read_back: int = 0  #: values that were asked for again at the end
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Protocol:
    """What to send for a number, when an answer is complete, and what it must be."""

    request: Callable[[int], bytes]
    is_complete: Callable[[bytes], bool]
    expected: Callable[[int, bytes], bool]
    read: Callable[[int], bytes] | None = None  #: asks for a number's value again
    read_expected: Callable[[int, bytes], bool] | None = None


_sums: list[int] = [0]


def running_sum(number: int) -> int:
    """What a server of lines has made of 1, 2 … `number`."""
    while len(_sums) <= number:
        _sums.append((_sums[-1] * 31 + len(_sums)) % 1000003)
    return _sums[number]


def _http_is_complete(data: bytes) -> bool:
    head, separator, body = data.partition(b"\r\n\r\n")
    return bool(separator) and len(body) >= int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0])


PROTOCOLS = {
    "lines": Protocol(
        request=lambda number: b"%d\n" % (number + 1),
        is_complete=lambda data: data.endswith(b"\n"),
        expected=lambda number, data: data == b"%d %d\n" % (number + 1, running_sum(number + 1)),
    ),
    "http": Protocol(
        request=lambda number: b"GET /data?%d HTTP/1.1\r\nHost: x\r\n\r\n" % number,
        is_complete=_http_is_complete,
        expected=lambda number, data: data.startswith(b"HTTP/1.1 200") and data.endswith(b"\r\n\r\n" + HTTP_BODY),
    ),
    "redis": Protocol(
        request=lambda number: b"SET %d v%d\r\n" % (number, number),
        is_complete=lambda data: data.endswith(b"\r\n"),
        expected=lambda number, data: data == b"+OK\r\n",
        read=lambda number: b"GET %d\r\n" % number,
        read_expected=lambda number, data: data.endswith(b"\r\nv%d\r\n" % number),
    ),
    "memcached": Protocol(
        request=lambda number: b"set k%d 0 0 7\r\n%07d\r\n" % (number, number),
        is_complete=lambda data: data.endswith((b"STORED\r\n", b"END\r\n")),
        expected=lambda number, data: data == b"STORED\r\n",
        read=lambda number: b"get k%d\r\n" % number,
        read_expected=lambda number, data: data == b"VALUE k%d 0 7\r\n%07d\r\nEND\r\n" % (number, number),
    ),
}


class Client:
    """Asks whoever is there."""

    def __init__(self, protocol: Protocol, port: int, addresses: list[str]) -> None:
        self.seen = Seen()
        self._protocol = protocol
        self._port = port
        self._addresses = addresses
        self._socket: socket.socket | None = None

    def ask(self, request: bytes) -> bytes:
        """The answer. Raises TimeoutError after a minute without."""
        deadline = time.monotonic() + GIVE_UP_SECONDS
        data = b""
        self._send(request)
        while time.monotonic() < deadline:
            if self._socket is not None and select.select([self._socket], [], [], PATIENCE_SECONDS)[0]:
                try:
                    chunk = self._socket.recv(1 << 16)
                except OSError:
                    chunk = b""
                data += chunk
                if chunk and self._protocol.is_complete(data):
                    return data
                if not chunk:
                    self._drop()
                continue
            if self._connect():
                data = b""
                self._send(request)
            elif self._socket is None:
                time.sleep(PATIENCE_SECONDS)
        raise TimeoutError("nobody answers")

    def _connect(self) -> bool:
        for address in self._addresses:
            if self._socket is None or address != self.seen.address:
                try:
                    made = socket.create_connection((address, self._port), CONNECT_SECONDS)
                except OSError:
                    continue
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._drop()
                self._socket, self.seen.address = made, address
                self.seen.connections += 1
                return True
        return False

    def _send(self, request: bytes) -> None:
        try:
            if self._socket is not None:
                self._socket.sendall(request)
        except OSError:
            self._drop()

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def read_back(self) -> None:
        """Ask for every value again. Raises ValueError."""
        read, expected = self._protocol.read, self._protocol.read_expected
        if read is None or expected is None:
            return
        for number in range(self.seen.answers):
            answer = self.ask(read(number))
            if not expected(number, answer):
                raise ValueError(f"{number} is {answer!r}")
            self.seen.read_back += 1


def main() -> None:
    name, result, port, *addresses = sys.argv[1:]
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    protocol = PROTOCOLS[name]
    client = Client(protocol, int(port), addresses)
    seen, last, shown = client.seen, 0.0, 0.0
    try:
        while not stopped:
            answer = client.ask(protocol.request(seen.answers))
            if not protocol.expected(seen.answers, answer):
                raise ValueError(f"{seen.answers}: {answer[-200:]!r}")
            now = time.monotonic()
            if last:
                seen.longest_gap_ms = max(seen.longest_gap_ms, round((now - last) * 1000, 1))
            last = now
            seen.answers += 1
            if now > shown + SHOW_SECONDS:
                show(Path(result), seen)
                shown = now
            time.sleep(PACE_SECONDS)
        client.read_back()
    except (ValueError, TimeoutError) as exc:
        seen.failure = repr(exc)
    show(Path(result), seen)


def show(path: Path, seen: Seen) -> None:
    """Replace the result as a whole."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(dataclasses.asdict(seen)))
    os.rename(temporary, path)


if __name__ == "__main__":
    main()
