"""What the journal acknowledged survives a kill, in order; what cannot be written is told and changes nothing."""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from phaul_client.commit import Phase
from phauld.journal import INLINE_SECONDS, Journal

ROOT: Final = Path(__file__).resolve().parents[2]
ENVIRONMENT: Final = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"}


KILLS: Final = 12


# A disk that does not take it


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_what_cannot_be_written_is_told_and_changes_nothing(path: Path, journal: Journal) -> None:
    record = journal.outgoing("m1")
    await record.record(Phase.OPENING, pid=42)
    before = await journal.get_outgoing("m1")
    with file_size_limit(path.with_name("journal.db-wal").stat().st_size), pytest.raises(OSError, match="journal"):
        await record.record(Phase.COMMITTED, tasks=[42])
    assert await journal.get_outgoing("m1") == before
    await record.record(Phase.ROLLING_BACK)
    after = await journal.get_outgoing("m1")
    assert after is not None
    assert (after.phase, after.detail) == (Phase.ROLLING_BACK, {"pid": 42, "tasks": [42]})


FILLER: Final = """
    import asyncio, os, pathlib
    from phaul_client.commit import Phase
    from phauld.journal import Journal

    async def main():
        directory = pathlib.Path("/mnt")
        journal = await Journal.open(directory / "journal.db")
        await journal.outgoing("m1").record(Phase.OPENING)
        try:
            with open(directory / "ballast", "wb", buffering=0) as ballast:
                while ballast.write(bytes(4096)):
                    pass
        except OSError:
            pass
        try:
            await journal.outgoing("m1").record(Phase.COMMITTED, text="x" * 10_000)
        except OSError as exc:
            print(exc.errno, (await journal.get_outgoing("m1")).phase)
        os.unlink(directory / "ballast")
        await journal.outgoing("m1").record(Phase.ROLLED_BACK)
        print((await journal.get_outgoing("m1")).phase)
        await journal.aclose()

    asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("mounting", "expected"),
    [
        (
            "mount -t tmpfs -o size=256k none /mnt && exec {python} -c {script}",
            f"{errno.ENOSPC} OPENING\nROLLED_BACK\n",
        ),
        (
            "mount -t tmpfs -o size=256k none /mnt && {python} -c {script} >&2 && mount -o remount,ro /mnt && "
            '{python} -c {script} 2>&1 | grep -o "cannot be written"',
            "cannot be written\n",
        ),
    ],
    ids=["full", "read-only"],
)
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, to mount")
def test_a_disk_that_is(mounting: str, expected: str) -> None:
    words = {"python": '"$1"', "script": '"$2"'}
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mounting.format(**words), "sh", sys.executable, textwrap.dedent(FILLER)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == expected, done.stderr


# kill -9 and fsync

WRITER: Final = """
    import asyncio, os, pathlib, sys
    from phaul_client.commit import Phase
    from phauld import journal
    from phauld.journal import Journal

    WIDTH = 8  # writes begun before the first of them has returned
    journal.INLINE_SECONDS = float(sys.argv[4])

    async def write(journal, number):
        phase = Phase.COMMITTED if number % 2 else Phase.HELD
        await journal.outgoing(f"m{number // 2}").record(phase, number=number, text="x" * (number % 5000))
        os.write(1, b"%d\\n" % number)

    async def main():
        journal = await Journal.open(pathlib.Path(sys.argv[1]))
        os.write(2, b"opened\\n")
        start, stop = int(sys.argv[2]), int(sys.argv[3])
        for first in range(start, stop, WIDTH):
            await asyncio.gather(*(write(journal, number) for number in range(first, min(stop, first + WIDTH))))
        os._exit(0)  # closing would sync as well

    asyncio.run(main())
"""


async def test_what_was_acknowledged_survives_kill_9_in_order(path: Path) -> None:
    """Every number up to the last that is on record is there, and every one that was acknowledged is among them."""
    next_number = 0
    for kill in range(KILLS):
        acknowledged, status = _write_and_kill(path, next_number, acknowledgements=kill * 7 % 61, delay=kill % 4 * 2e-4)
        assert status == -signal.SIGKILL
        journal = await Journal.open(path)
        entries = await journal.list_outgoing()
        await journal.aclose()
        found = [entry.detail["number"] for entry in reversed(entries)]
        last = found[-1]
        assert found == [*range(1, last, 2), last]
        # Eight are under way at a time: the order in which their callers wake up is nobody's promise.
        assert len(set(acknowledged)) == len(acknowledged)
        assert next_number <= min(acknowledged)
        assert max(acknowledged) <= last
        assert all((entry.phase is Phase.COMMITTED) == (entry.detail["number"] % 2 == 1) for entry in entries)
        next_number = last + 1
    assert next_number > KILLS


def _write_and_kill(path: Path, start: int, *, acknowledgements: int, delay: float) -> tuple[list[int], int]:
    """Numbers that the writer was told are written, until it was killed a moment after so many of them."""
    inline_seconds = INLINE_SECONDS if acknowledgements % 2 else 0
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), path, str(start), str(start + 100_000), str(inline_seconds)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    with child, child.stdout:
        lines = [child.stdout.readline() for _ in range(acknowledgements + 1)]
        time.sleep(delay)
        child.kill()
        lines += child.stdout.readlines()
    return [int(line) for line in lines], child.returncode


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_every_record_is_synced_before_it_is_acknowledged(path: Path, tmp_path: Path) -> None:
    """What kill -9 cannot show: the page cache outlives a process, not a power cut."""
    trace = tmp_path / "trace"
    strace = ["strace", "-f", "-o", str(trace), "-e", "trace=fsync,fdatasync,write"]
    writer = [sys.executable, "-c", textwrap.dedent(WRITER), str(path), "0", "64", "0"]
    subprocess.run([*strace, *writer], env=ENVIRONMENT, capture_output=True, check=True)
    opening, separator, writing = trace.read_text().partition('write(2, "opened')
    assert separator
    assert "sync(" in opening
    syncs = acknowledged = 0
    for line in writing.splitlines():
        if re.search(r"\bf(data)?sync(\(.*| resumed>.*)= 0$", line):
            syncs += 1
        elif re.search(r'\bwrite\(1, "\d+\\n"', line):
            acknowledged += 1
            assert syncs >= acknowledged
    assert (acknowledged, syncs) == (64, 64)
