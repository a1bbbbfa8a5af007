"""Three ways to move the same process between the lab's guests by pre-copy: phaul, the criu command, go-criu's phaul.

Each takes the process that it has started from `a` to `b` and ends it there. The pause is what the process saw, by the
clock of the day, which the guests share.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from tests.vm.guest import Guest, Process
from tests.vm.lab import Lab
from tests.vm.scenarios import IN_GUEST, Moved, ask, milliseconds, move, take, writer

MOVE_SECONDS: Final = 280.0
GO_PHAUL: Final = "/run/go-phaul"
_DIRECTORY: Final = "/run/images"  #: in memory, as phaul's
_LOG: Final = "/var/log/writer.log"
_GO_PORT: Final = 7400
ROUNDS_BY_HAND: Final = 2

#: Seconds: the pause, and the whole move.
Figures = tuple[float, float]
Way = Callable[[Lab, int], Awaitable[Figures]]


async def warm(lab: Lab, mib: int) -> None:
    """Touch as much of the guests' memory as the move will need, in every way alike: images and process."""
    size = f"{mib * 11 // 10}M"
    script = f"for d in /dev/shm /run; do head -c {size} /dev/zero >$d/warm; done; rm /dev/shm/warm /run/warm"
    await asyncio.gather(*(guest.run(["sh", "-c", script]) for guest in lab.guests))


async def by_phaul(lab: Lab, mib: int) -> Figures:
    """With lazy restore."""
    steps = [
        {"run": "idle", "argv": writer(mib), "on": "a"},
        ask("idle", "a", "reset"),
        move("idle", "a", "b", "PRE_COPY", restore_mode="RESTORE_MODE_LAZY"),
        ask("idle", "b", "tell"),
        {"stop": "idle", "on": "b"},
    ]
    answers = await take(lab, steps, MOVE_SECONDS)
    moved = Moved(answers[2])
    assert moved.done, moved.record
    total = milliseconds(moved.record["total"])
    assert total is not None
    return answers[3]["gap_ms"] / 1000, total / 1000


async def by_hand(lab: Lab, mib: int) -> Figures:
    """See in_guest/by_hand.sh."""
    pid = await _start(lab, mib)
    script = IN_GUEST / "by_hand.sh"
    there = await lab.b.start([script, "there", _DIRECTORY, str(ROUNDS_BY_HAND)], log="/var/log/there.log")
    await _until_it_says(lab.b, there, "ready")
    here: list[str | Path] = [script, "here", _DIRECTORY, str(ROUNDS_BY_HAND), str(pid), lab.b.address]
    return await _measured(lab, there, here)


async def by_go_criu(lab: Lab, mib: int) -> Figures:
    """See go_criu/main.go."""
    pid = await _start(lab, mib)
    for guest in lab.guests:
        await guest.run(["mkdir", "-p", _DIRECTORY])
    there = await lab.b.start([GO_PHAUL, "serve", f":{_GO_PORT}", _DIRECTORY], log="/var/log/there.log")
    await _until_it_says(lab.b, there, "listening")
    here = [GO_PHAUL, "migrate", str(pid), f"{lab.b.address}:{_GO_PORT}", _DIRECTORY]
    return await _measured(lab, there, here)


async def _start(lab: Lab, mib: int) -> int:
    """The same program as phaul's, in a PID namespace with a reaping init, and a log that is on both guests."""
    await lab.b.put(_LOG, b"")
    await lab.b.run(["rm", "-f", "/var/log/there.log"])
    argv = [str(IN_GUEST / "by_hand.sh"), "run", _LOG, *writer(mib)]
    pid = int((await lab.a.run(argv)).stdout)
    await take(lab, [ask("idle", "a", "reset")])
    return pid


async def _measured(lab: Lab, there: Process, here: Sequence[str | Path]) -> Figures:
    started = time.monotonic()
    await lab.a.run(here, timeout_seconds=MOVE_SECONDS)
    assert await there.wait() == 0, (await lab.b.get(there.log)).decode()
    total = time.monotonic() - started
    (told,) = await take(lab, [ask("idle", "b", "tell")])
    await lab.b.run(["pkill", "-KILL", "-f", "[w]riter.py"])
    for guest in lab.guests:
        await guest.run(["rm", "-rf", _DIRECTORY])
    pause: float = told["gap_ms"] / 1000
    return pause, total


async def clear(lab: Lab) -> None:
    """After a move that failed: nothing of it is left, the process neither."""
    for guest in lab.guests:
        for words in (GO_PHAUL, "[w]riter.py", "[c]riu"):
            await guest.run(["pkill", "-KILL", "-f", words], check=False)
        await guest.run(["rm", "-rf", _DIRECTORY])


async def _until_it_says(guest: Guest, process: Process, word: str) -> None:
    done = await guest.run(["sh", "-c", f"timeout 30 sh -c 'until grep -q {word} {process.log}; do sleep 0.1; done'"])
    assert done.returncode == 0
