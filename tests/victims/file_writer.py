"""Writes to files all the time, in every way that there is, and checks everything that it has ever written.

    file_writer.py DIRECTORY

Appends lines to `log` (numbered), counts in `counter` in place without another size, counts in `mapped` through
shared memory (whose times need not change), makes, renames and deletes `short-N`, and holds a deleted file open. Says
"N ok" now and then, or what is wrong.
"""

import mmap
import os
import sys
import time

KEPT = 5


def main() -> None:
    os.chdir(sys.argv[1])
    log = os.open("log", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    counter = os.open("counter", os.O_RDWR | os.O_CREAT)
    mapped_fd = os.open("mapped", os.O_RDWR | os.O_CREAT)
    os.ftruncate(mapped_fd, 1 << 20)
    mapped = mmap.mmap(mapped_fd, 1 << 20)
    ghost = os.open("ghost", os.O_RDWR | os.O_CREAT)
    os.unlink("ghost")
    size = n = 0
    while True:
        n += 1
        line = b"%012d\n" % n
        os.write(log, line)
        size += len(line)
        os.pwrite(counter, line, 0)
        offset = n * 4096 % (1 << 20)
        mapped[offset : offset + len(line)] = line
        os.pwrite(ghost, line, 0)
        with open(f"short-{n}.new", "wb") as file:
            file.write(line)
        os.rename(f"short-{n}.new", f"short-{n}")
        if n > KEPT:
            os.unlink(f"short-{n - KEPT}")
        check(n, size, line, log, counter, mapped_fd, ghost)
        if n % 20 == 0:
            print(n, "ok", flush=True)
            time.sleep(0.001)


def is_another_file(log: int) -> bool:
    return os.stat("log").st_ino != os.fstat(log).st_ino


def check(n: int, size: int, line: bytes, log: int, counter: int, mapped_fd: int, ghost: int) -> None:
    """What is in the files, by their descriptors and by their names."""
    wrong = []
    if (length := os.fstat(log).st_size) != size:
        wrong.append(f"log has {length} bytes, not {size}")
    if is_another_file(log) and is_another_file(log):  # a move between two calls gives the numbers of two nodes, once
        wrong.append(f"log is another file, of {os.stat('log').st_size} bytes")
    for name, descriptor, offset in (
        ("log", log, size - len(line)),
        ("counter", counter, 0),
        ("mapped", mapped_fd, n * 4096 % (1 << 20)),
        ("deleted file", ghost, 0),
    ):
        if (found := os.pread(descriptor, len(line), offset)) != line:
            wrong.append(f"{name} has {found!r}, not {line!r}")
    with open("counter", "rb") as file:
        if file.read() != line:
            wrong.append("counter is another file")
    expected = {f"short-{each}" for each in range(max(1, n - KEPT + 1), n + 1)}
    if (there := {name for name in os.listdir(".") if name.startswith("short-")}) != expected:
        wrong.append(f"there are {sorted(there)}, not {sorted(expected)}")
    if wrong:
        print(n, "WRONG", "; ".join(wrong), flush=True)
        sys.exit(1)


main()
