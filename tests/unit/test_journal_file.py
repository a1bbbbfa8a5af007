"""The journal's file: opened by one phauld, brought up to date, pruned."""

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Final

import pytest

from phaul_client.commit import Phase
from phauld import session
from phauld.destination.incoming_spec import Incoming
from phauld.errors import PhaulError
from phauld.journal import Journal
from phauld.journal_file import APPLICATION_ID, MIGRATIONS
from phauld.retention import prune

ROOT: Final = Path(__file__).resolve().parents[2]


ENVIRONMENT: Final = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"}


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
