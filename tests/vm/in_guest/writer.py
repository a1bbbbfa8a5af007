"""A program to move between guests: memory with known content, written to at a known rate, and a clock that watches.

    writer.py PORT [--mib N] [--hot-mib N] [--rate BYTES_PER_SECOND]

It beats every few milliseconds and notes its longest gap between two beats by the clock of the day, which the guests
share (clock.py), and by its other clocks, and whether one of these ever went back. To a datagram at PORT it answers
with what it knows, as JSON: "reset" forgets the gaps, "check" looks at all memory.
"""

import argparse
import json
import mmap
import select
import socket
import time
import zlib

MIB = 1 << 20
PAGE_BYTES = 4096
BEAT_SECONDS = 0.005
#: What a pause has left unwritten is not made up for: at most so many beats' worth is written at once.
BURST_BEATS = 2
NO_GAPS = (0.0, 0.0, 0.0)


class Memory:
    """`mib` of noise in which no two pages are alike; the first byte of a page counts how often it was written."""

    def __init__(self, mib: int, hot_mib: int) -> None:
        self.pages, self.hot_pages = mib * MIB // PAGE_BYTES, hot_mib * MIB // PAGE_BYTES
        self.written_pages = 0
        self.all = memoryview(mmap.mmap(-1, max(self.pages, 1) * PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        with open("/dev/urandom", "rb") as source:
            noise = source.read(MIB)
        for start in range(0, self.pages * PAGE_BYTES, MIB):
            self.all[start : start + MIB] = noise
        for byte in range(3):
            self.all[8 + byte :: PAGE_BYTES] = bytes(page >> 8 * byte & 255 for page in range(max(self.pages, 1)))
        self.all[0::PAGE_BYTES] = bytes(max(self.pages, 1))
        self.checksum = zlib.crc32(self.all)

    def write(self, pages: int) -> None:
        """Write to the next so many of the hot pages, which come first, in turn."""
        while pages > 0:
            turn, first = divmod(self.written_pages, self.hot_pages)
            number = min(pages, self.hot_pages - first)
            self.all[first * PAGE_BYTES : (first + number) * PAGE_BYTES : PAGE_BYTES] = (
                bytes([(turn + 1) % 256]) * number
            )
            self.written_pages += number
            pages -= number

    def is_intact(self) -> bool:
        turn, first = divmod(self.written_pages, self.hot_pages) if self.hot_pages else (0, 0)
        counts = bytes([(turn + 1) % 256]) * first + bytes([turn % 256]) * (self.hot_pages - first)
        counts += bytes(max(self.pages, 1) - self.hot_pages)
        if bytes(self.all[0::PAGE_BYTES]) != counts:
            return False
        self.all[0::PAGE_BYTES] = bytes(len(counts))
        checksum = zlib.crc32(self.all)
        self.all[0::PAGE_BYTES] = counts
        return checksum == self.checksum


def clocks() -> tuple[float, float, float]:
    """The clock of the day, and those that must not jump."""
    return time.time(), time.clock_gettime(time.CLOCK_MONOTONIC), time.clock_gettime(time.CLOCK_BOOTTIME)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--mib", type=int, default=0)
    parser.add_argument("--hot-mib", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0)
    arguments = parser.parse_args()
    memory = Memory(arguments.mib, arguments.hot_mib)
    questions = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    questions.bind(("", arguments.port))
    poll = select.poll()
    poll.register(questions, select.POLLIN)
    before, gaps, back, beats, due = clocks(), NO_GAPS, 0, 0, 0.0
    while True:
        now = clocks()
        passed = tuple(new - old for new, old in zip(now, before, strict=True))
        gaps = (max(gaps[0], passed[0]), max(gaps[1], passed[1]), max(gaps[2], passed[2]))
        before, beats = now, beats + 1
        back += passed[1] < 0 or passed[2] < 0
        due += min(max(0.0, passed[1]), BURST_BEATS * BEAT_SECONDS) * arguments.rate / PAGE_BYTES
        memory.write(int(due))
        due -= int(due)
        if poll.poll(BEAT_SECONDS * 1000):
            question, asker = questions.recvfrom(64)
            answer: dict[str, float] = {"beats": beats, "written_pages": memory.written_pages, "went_back": back}
            answer.update(gap_ms=gaps[0] * 1000, monotonic_ms=gaps[1] * 1000, boottime_ms=gaps[2] * 1000)
            if question == b"check":
                answer["intact"] = memory.is_intact()
            questions.sendto(json.dumps(answer).encode(), asker)
            before = clocks()
            gaps, back = (NO_GAPS, 0) if question == b"reset" else (gaps, back)


if __name__ == "__main__":
    main()
