"""The journal: what was acknowledged survives a kill, in order; what cannot be written is told and changes nothing."""

import asyncio
import errno
import os
import re
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from phaul_client.commit import Phase
from phauld import session
from phauld.destination.incoming_spec import Incoming
from phauld.errors import MigrationNotFound, PhaulError
from phauld.journal import INLINE_SECONDS, Journal
from phauld.journal_file import APPLICATION_ID, MIGRATIONS
from phauld.retention import prune

ROOT: Final = Path(__file__).resolve().parents[2]
ENVIRONMENT: Final = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"}
KILLS: Final = 12


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


@pytest.fixture
async def journal(path: Path) -> AsyncIterator[Journal]:
    opened = await Journal.open(path)
    yield opened
    await opened.aclose()


async def test_an_outgoing_migration_from_its_first_phase_to_its_report(journal: Journal) -> None:
    record = journal.outgoing("m1")
    record.note(pid=42, options={"mode": "auto", "old": 1})
    await record.record(Phase.OPENING)
    record.note(options={"mode": "pre-copy"})
    record.note(path="/\udc80")
    await record.record(Phase.COMMITTED, tasks=[[42, 1000]])
    await record.report({"pause_seconds": 0.25})
    entry = await journal.get_outgoing("m1")
    assert entry is not None
    assert entry.phase is Phase.COMMITTED
    assert entry.detail == {"pid": 42, "options": {"mode": "pre-copy"}, "path": "/\udc80", "tasks": [[42, 1000]]}
    assert entry.report == {"pause_seconds": 0.25}
    assert entry.created_at < entry.updated_at <= time.time()


async def test_an_incoming_session_from_its_first_phase_to_its_end(journal: Journal) -> None:
    record = journal.incoming("m1", "node-a")
    record.note(request="AAEC")
    await record.record(session.Phase.OPEN)
    record.note_failure({"reason": "LEASE_EXPIRED"})
    await record.record(session.Phase.ABORTED)
    await journal.incoming("m1", "node-b").record(session.Phase.ABORTED)
    entry = await journal.get_incoming("m1")
    assert entry is not None
    assert (entry.phase, entry.source_node_id, entry.cleaned) == (session.Phase.ABORTED, "node-a", False)
    assert (entry.detail, entry.failure) == ({"request": "AAEC"}, {"reason": "LEASE_EXPIRED"})


async def test_a_note_alone_writes_nothing(journal: Journal) -> None:
    record = journal.outgoing("m1")
    record.note(pid=42)
    assert await journal.get_outgoing("m1") is None


async def test_notes_of_a_restarted_phauld_add_to_those_on_record(path: Path) -> None:
    journal = await Journal.open(path)
    await journal.outgoing("m1").record(Phase.COMMITTED, pid=42, tries=1)
    await journal.aclose()
    journal = await Journal.open(path)
    await journal.outgoing("m1").record(Phase.HELD, tries=2)
    entry = await journal.get_outgoing("m1")
    await journal.aclose()
    assert entry is not None
    assert (entry.phase, entry.detail) == (Phase.HELD, {"pid": 42, "tries": 2})


async def test_an_id_that_was_never_seen(journal: Journal) -> None:
    assert await journal.get_outgoing("m1") is None
    assert await journal.get_incoming("m1") is None
    with pytest.raises(MigrationNotFound):
        await journal.outgoing("m1").report({})
    with pytest.raises(MigrationNotFound):
        await journal.incoming("m1", "a").cleaned()


async def test_the_newest_first_and_the_finished_left_out(journal: Journal) -> None:
    for phase in (Phase.DONE, Phase.HELD, Phase.ROLLED_BACK, Phase.OPENING):
        await journal.outgoing(phase).record(phase)
    assert [each.migration_id for each in await journal.list_outgoing()] == ["OPENING", "ROLLED_BACK", "HELD", "DONE"]
    assert [each.migration_id for each in await journal.list_outgoing(limit=1)] == ["OPENING"]
    assert [each.migration_id for each in await journal.unfinished_outgoing()] == ["OPENING", "HELD"]


async def test_a_session_is_unfinished_until_it_is_final_and_cleaned(journal: Journal) -> None:
    """ABORTED is recorded before the kill: a crash between the two must be seen to."""
    for phase in (session.Phase.ABORTED, session.Phase.PREPARED, session.Phase.RUNNING):
        await journal.incoming(phase, "a").record(phase)
    await journal.incoming("RUNNING", "a").cleaned()
    await journal.incoming("PREPARED", "a").cleaned()
    assert [each.migration_id for each in await journal.unfinished_incoming()] == ["PREPARED", "ABORTED"]


@pytest.mark.parametrize("value", [object(), float("nan"), b"bytes"])
async def test_what_is_not_json_is_refused_before_the_freeze(journal: Journal, value: object) -> None:
    record = journal.outgoing("m1")
    with pytest.raises((TypeError, ValueError)):
        record.note(pid=value)
    await record.record(Phase.OPENING)


@pytest.mark.parametrize("inline_seconds", [0, INLINE_SECONDS])
async def test_a_cancelled_caller_neither_loses_nor_reorders_its_write(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, inline_seconds: float
) -> None:
    monkeypatch.setattr("phauld.journal.INLINE_SECONDS", inline_seconds)
    record = journal.outgoing("m1")
    cancelled = 0
    for number in range(200):
        task = asyncio.create_task(record.record(Phase.COMMITTED if number % 2 else Phase.HELD, number=number))
        await asyncio.sleep(0)
        cancelled += task.cancel()
    assert cancelled > 100 or inline_seconds
    entry = await journal.get_outgoing("m1")
    assert entry is not None
    assert (entry.phase, entry.detail) == (Phase.COMMITTED, {"number": 199})


async def test_close_waits_for_writes_and_can_be_repeated(path: Path) -> None:
    journal = await Journal.open(path)
    writes = [asyncio.create_task(journal.outgoing(f"m{number}").record(Phase.OPENING)) for number in range(50)]
    await asyncio.sleep(0)
    await journal.aclose()
    await journal.aclose()
    await asyncio.gather(*writes)
    with pytest.raises(PhaulError, match="closed"):
        await journal.get_outgoing("m1")
    assert [each.name for each in path.parent.iterdir()] == [path.name]


# Opening


async def test_the_node_id_stays_as_long_as_the_file(path: Path) -> None:
    node_ids = []
    for _ in range(2):
        journal = await Journal.open(path)
        node_ids.append(journal.node_id)
        await journal.aclose()
    os.unlink(path)
    journal = await Journal.open(path)
    await journal.aclose()
    assert node_ids[0] == node_ids[1] != journal.node_id


async def test_only_the_owner_can_read_it(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT, 0o644))
    journal = await Journal.open(path)
    await journal.outgoing("m1").record(Phase.OPENING)
    modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
    await journal.aclose()
    assert modes == {"journal.db": 0o600, "journal.db-wal": 0o600}


async def test_a_second_phauld_is_refused_and_harms_nothing(path: Path) -> None:
    first = await Journal.open(path)
    for _ in range(2):
        with pytest.raises(PhaulError, match="held by another phauld"):
            await Journal.open(path)
        assert _open_in_a_child(path) == f"the journal {path} is held by another phauld"
    await first.outgoing("m1").record(Phase.OPENING)
    await first.aclose()
    assert _open_in_a_child(path) == "opened"


async def test_it_stays_held_when_the_file_is_read_here(path: Path) -> None:
    """As a preflight does with the open files of a tree, and of phauld itself if somebody asks for that."""
    first = await Journal.open(path)
    os.close(os.open(path, os.O_RDONLY))  # SQLite's locks are gone with this
    assert _open_in_a_child(path) == f"the journal {path} is held by another phauld"
    await first.aclose()
    assert _open_in_a_child(path) == "opened"


def _open_in_a_child(path: Path) -> str:
    script = """
        import asyncio, pathlib, sys
        from phauld.journal import Journal
        try:
            asyncio.run(Journal.open(pathlib.Path(sys.argv[1])))
            print("opened")
        except Exception as exc:
            print(exc)
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), path], env=ENVIRONMENT, capture_output=True, text=True
    ).stdout.strip()


def _newer(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()


def _foreign(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE cookies (name)")
    connection.close()


def _garbage(path: Path) -> None:
    path.write_bytes(b"not a database" * 1000)


def _scratched(path: Path) -> None:
    asyncio.run(_fill(path))
    content = bytearray(path.read_bytes())
    for page_start in range(4096, len(content), 4096):
        content[page_start : page_start + 64] = b"\xff" * 64
    path.write_bytes(content)


def _directory(path: Path) -> None:
    path.mkdir()


def _nowhere(path: Path) -> None:
    path.parent.rmdir()


async def _fill(path: Path) -> None:
    journal = await Journal.open(path)
    for number in range(100):
        await journal.outgoing(f"m{number}").record(Phase.OPENING, text="x" * 500)
    await journal.aclose()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_newer, "of a newer phauld"),
        (_foreign, "not a journal of phauld's"),
        (_garbage, "is damaged"),
        (_scratched, "is damaged"),
        (_directory, "cannot be written"),
        (_nowhere, "cannot be written"),
    ],
)
def test_a_journal_that_cannot_be_opened(path: Path, spoil: object, said: str) -> None:
    assert callable(spoil)
    spoil(path)
    with pytest.raises(PhaulError, match=said) as caught:
        asyncio.run(Journal.open(path))
    assert caught.value.remedy


async def test_every_older_schema_is_brought_up_to_date(path: Path) -> None:
    for version in range(len(MIGRATIONS) + 1):
        with sqlite3.connect(path) as connection:
            for script in MIGRATIONS[:version]:
                connection.executescript(script)
            if version:
                connection.execute("INSERT INTO node VALUES ('n')")
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {version}")
        connection.close()
        journal = await Journal.open(path)
        await journal.incoming("m1", "a").record(session.Phase.OPEN)
        await journal.outgoing("m1").record(Phase.OPENING)
        await journal.aclose()
        os.unlink(path)


# What is over for long


def kept(path: Path) -> tuple[list[str], list[str]]:
    """The migrations on record, and the sessions of which more than the answer is."""
    with sqlite3.connect(path) as connection:
        outgoing = [row[0] for row in connection.execute("SELECT migration_id FROM outgoing ORDER BY sequence")]
        whole = connection.execute("SELECT migration_id FROM incoming WHERE length(detail) > 400 ORDER BY sequence")
        return outgoing, [row[0] for row in whole]


async def test_what_is_over_for_long_is_dropped_and_how_a_session_ended_is_not(path: Path) -> None:
    journal = await Journal.open(path)
    for number in range(12):
        last = (Phase.DONE, Phase.ROLLED_BACK)[number % 2]
        await journal.outgoing(f"out-{number}").record(Phase.HELD if number == 3 else last, text="x" * 3000)
        record = journal.incoming(f"in-{number}", "node-a")
        record.note(owner="node-a.example", record="x" * 3000)
        if number % 2:
            record.note_failure({"message": "y" * 500})
        ended = (session.Phase.RUNNING, session.Phase.ABORTED)[number % 2]
        await record.record(session.Phase.PREPARED if number == 2 else ended)
        if number != 4:
            await record.cleaned()
    assert await prune(journal, keep=5) == (11 - 5) + (10 - 5)
    assert await prune(journal, keep=5) == 0
    for number in range(12):
        entry = await journal.get_incoming(f"in-{number}")
        assert entry is not None
        if number != 2:
            assert entry.phase is (session.Phase.RUNNING, session.Phase.ABORTED)[number % 2]
        assert (entry.detail["owner"], entry.source_node_id) == ("node-a.example", "node-a")
    assert (await journal.get_outgoing("out-3")) is not None
    await journal.incoming("in-0", "node-b").record(session.Phase.RUNNING)  # who asks again finds the same session
    entry = await journal.get_incoming("in-0")
    assert entry is not None
    assert entry.source_node_id == "node-a"
    assert [each.migration_id for each in await journal.unfinished_incoming()] == ["in-4", "in-2"]
    await journal.aclose()
    newest = [7, 8, 9, 10, 11]
    assert kept(path) == (
        ["out-3", *(f"out-{number}" for number in newest)],
        ["in-2", "in-4", *(f"in-{number}" for number in newest)],
    )


async def test_a_journal_that_is_pruned_does_not_grow(path: Path) -> None:
    journal = await Journal.open(path)
    sizes: list[int] = []
    for batch in range(4):
        for number in range(200):
            await journal.outgoing(f"{batch}-{number}").record(Phase.DONE, text="x" * 3000)
        await prune(journal, keep=100)
        sizes.append(os.path.getsize(path))  # noqa: ASYNC240 (it is not opened)
    await journal.aclose()
    assert sizes[-1] <= sizes[1] * 1.1


async def test_a_session_of_which_the_answer_is_left_answers(path: Path) -> None:
    journal = await Journal.open(path)
    record = journal.incoming("m1", "node-a")
    record.note(owner="node-a", record="x" * 3000, workload="web", carried=[])
    await record.record(session.Phase.RUNNING)
    await record.cleaned()
    for number in range(2):
        later = journal.incoming(f"later-{number}", "node-a")
        await later.record(session.Phase.RUNNING, text="x" * 3000)
        await later.cleaned()
    assert await prune(journal, keep=2) == 1
    entry = await journal.get_incoming("m1")
    await journal.aclose()
    assert entry is not None
    known = Incoming.from_journal(entry)
    assert (known.owner, known.source_node_id, entry.phase) == ("node-a", "node-a", session.Phase.RUNNING)


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
