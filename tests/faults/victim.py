"""What moves in the fault tests: every beat leaves traces that show whether it ran twice, or lost a part of its past.

    victim.py FILE [--mib N] [--children N] [--threads N]

Standard output gets a line "PROCESS COUNT" for each beat; phaul carries it, so it must hold every beat once, in order.
FILE gets, for each process and thread, a slot; it has the same size from the start and is another file on each node,
so it tells which copy has ever run. Memory is filled with known noise and checked again and again.
"""

import argparse
import mmap
import os
import random
import struct
import threading
import time
import zlib

SLOT = struct.Struct("<4Q")  #: count, monotonic nanoseconds, checks of all memory, failures of these
SLOTS = 16
BEAT_SECONDS = 0.01
CHECK_EVERY = 20  # beats


def beat(fd: int, number: int, memory: mmap.mmap, checksum: int, *, tell: bool) -> None:
    """Beat for ever."""
    count = checks = failures = 0
    while True:
        count += 1
        if count % CHECK_EVERY == 0:
            checks += 1
            failures += zlib.crc32(memory) != checksum
        os.pwrite(fd, SLOT.pack(count, time.monotonic_ns(), checks, failures), number * SLOT.size)
        if tell:
            os.write(1, f"{number} {count}\n".encode())
        time.sleep(BEAT_SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--mib", type=int, default=4)
    parser.add_argument("--children", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    fd = os.open(arguments.file, os.O_RDWR)
    number = 0
    for child in range(1, arguments.children + 1):
        if os.fork() == 0:
            number = child
            break
    memory = mmap.mmap(-1, arguments.mib << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(random.Random(number).randbytes(arguments.mib << 20))
    checksum = zlib.crc32(memory)
    for thread in range(arguments.threads):
        slot = arguments.children + 1 + number * arguments.threads + thread
        threading.Thread(target=beat, args=(fd, slot, memory, checksum), kwargs={"tell": False}, daemon=True).start()
    beat(fd, number, memory, checksum, tell=True)


if __name__ == "__main__":
    main()
