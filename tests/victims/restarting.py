"""Says in one file, seen from all nodes, which start of it runs and how far it is, until it is told to end.

    restarting.py FILE ORDER

A line "START BEAT" for each beat: START is 1 for the first process, 2 for the one after it. So two at a time, a lost
one and a start too many are all to be seen. The file ORDER holds an exit code; whoever reads it removes it and exits.
"""

import os
import sys
import time


def lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def say(path: str, text: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(file, f"{text}\n".encode())
    os.close(file)


def main() -> None:
    path, order = sys.argv[1:]
    start = max((int(line.split()[0]) for line in lines(path)), default=0) + 1
    beat = 0
    while True:
        say(path, f"{start} {beat}")
        beat += 1
        if code := lines(order):
            os.unlink(order)
            sys.exit(int(code[0]))
        time.sleep(0.02)


if __name__ == "__main__":
    main()
