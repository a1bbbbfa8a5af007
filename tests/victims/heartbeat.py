"""A program to move: counts beats in a file, holds memory with a known checksum, writes to it at a known rate.

    heartbeat.py FILE [--mib N] [--dirty MIB_PER_SECOND] [--hot-mib N] [--listen PORT] [--interval SECONDS]

FILE holds the last `Beats`. SIGUSR1 makes it check all its memory, SIGUSR2 forget the longest gap so far. A client that
connects to PORT gets the number of beats, once for each line that it sends. `--hot-mib` is the part of the memory that
is written to, a quarter of it if not given; it is written page by page in turn. Needs nothing but the standard library.
"""

import argparse
import mmap
import os
import random
import selectors
import signal
import socket
import struct
import time
import zlib
from dataclasses import astuple, dataclass
from pathlib import Path

MIB = 1 << 20
PAGE_BYTES = 4096
LAYOUT = struct.Struct("<6Q")


@dataclass(slots=True)
class Beats:
    """What the file says. Times are nanoseconds of the clock of the day: no namespace has one of its own.

    criu restores a time namespace so that the monotonic clock goes on from where it stopped: the process does not see
    by it how long it stood still.
    """

    count: int = 0
    at_ns: int = 0
    longest_gap_ns: int = 0  #: between two beats, since the start or the last SIGUSR2
    checks: int = 0  #: of all memory
    failures: int = 0  #: of these
    dirtied_pages: int = 0


def read_beats(path: Path) -> Beats:
    """The last beat; zeros if there was none yet."""
    try:
        return Beats(*LAYOUT.unpack(path.read_bytes()))
    except (FileNotFoundError, struct.error):
        return Beats()


class Memory:
    """`mib` of noise, the last `hot_mib` of it written to page by page: the first 8 bytes are the round."""

    def __init__(self, mib: int, hot_mib: int) -> None:
        self._all = mmap.mmap(-1, max(mib, 1) * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        noise = random.Random(mib)
        for _ in range(mib):
            self._all.write(noise.randbytes(MIB))
        self._hot_start = (max(mib, 1) - hot_mib) * MIB
        self._hot_pages = hot_mib * MIB // PAGE_BYTES
        self._checksum = self._cold_checksum()
        self.dirtied_pages = 0
        for page in range(self._hot_pages):
            self._write(page, 0)

    def dirty(self, pages: int) -> None:
        """Write to the next so many pages."""
        for _ in range(pages if self._hot_pages else 0):
            round_number, page = divmod(self.dirtied_pages, self._hot_pages)
            self._write(page, round_number + 1)
            self.dirtied_pages += 1

    def is_intact(self) -> bool:
        """Whether every page is what was written to it."""
        rounds, partial = divmod(self.dirtied_pages, self._hot_pages) if self._hot_pages else (0, 0)
        hot = all(self._read(page) == rounds + (page < partial) for page in range(self._hot_pages))
        return hot and self._cold_checksum() == self._checksum

    def _cold_checksum(self) -> int:
        with memoryview(self._all) as view:
            return zlib.crc32(view[: self._hot_start])

    def _write(self, page: int, round_number: int) -> None:
        struct.pack_into("<Q", self._all, self._hot_start + page * PAGE_BYTES, round_number)

    def _read(self, page: int) -> int:
        (round_number,) = struct.unpack_from("<Q", self._all, self._hot_start + page * PAGE_BYTES)
        assert isinstance(round_number, int)
        return round_number


class Answers:
    """A server that tells the number of beats, between two of them."""

    def __init__(self, port: int | None) -> None:
        self._selector = selectors.DefaultSelector()
        self._server = socket.create_server(("", port)) if port is not None else None
        if self._server is not None:
            self._selector.register(self._server, selectors.EVENT_READ)

    def serve(self, until: float, count: int) -> None:
        """Answer until a point in time of the monotonic clock."""
        while (left := until - time.monotonic()) > 0:
            if self._server is None:
                time.sleep(left)
                continue
            for key, _ in self._selector.select(left):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is self._server:
                    self._selector.register(connection.accept()[0], selectors.EVENT_READ)
                else:
                    self._answer(connection, count)

    def _answer(self, connection: socket.socket, count: int) -> None:
        try:
            if connection.recv(PAGE_BYTES):
                connection.sendall(f"{count}\n".encode())
                return
        except OSError:
            pass  # the client is gone, or the move has closed the connection
        self._selector.unregister(connection)
        connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--mib", type=int, default=0)
    parser.add_argument("--dirty", type=float, default=0.0)
    parser.add_argument("--hot-mib", type=int)
    parser.add_argument("--listen", type=int)
    parser.add_argument("--interval", type=float, default=0.002)
    arguments = parser.parse_args()
    hot_mib = arguments.mib // 4 if arguments.hot_mib is None else arguments.hot_mib
    memory, answers, beats = Memory(arguments.mib, hot_mib), Answers(arguments.listen), Beats()
    wanted: list[int] = []
    signal.signal(signal.SIGUSR1, lambda *_: wanted.append(1))
    signal.signal(signal.SIGUSR2, lambda *_: setattr(beats, "longest_gap_ns", 0))
    fd = os.open(arguments.file, os.O_RDWR | os.O_CREAT, 0o644)
    started = time.monotonic()
    while True:
        now_ns = time.time_ns()
        if beats.count:
            beats.longest_gap_ns = max(beats.longest_gap_ns, now_ns - beats.at_ns)
        beats.count, beats.at_ns = beats.count + 1, now_ns
        due_pages = int((time.monotonic() - started) * arguments.dirty * MIB / PAGE_BYTES) - memory.dirtied_pages
        memory.dirty(min(due_pages, 256))  # no more at a time: after a pause it would not beat for long
        beats.dirtied_pages = memory.dirtied_pages
        if wanted:
            wanted.pop()
            beats.failures += not memory.is_intact()
            beats.checks += 1
        os.pwrite(fd, LAYOUT.pack(*astuple(beats)), 0)
        answers.serve(time.monotonic() + arguments.interval, beats.count)


if __name__ == "__main__":
    main()
