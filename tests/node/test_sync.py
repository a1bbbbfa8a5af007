"""`--sync`: a directory moves with its tree, and no byte of it is lost, doubled, or put over somebody else's."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.inventory import processes
from tests.need import need
from tests.node.test_daemons import REFUSED, ROLLED_BACK, migrate
from tests.nodes import Node, Nodes, until

pytestmark = [pytest.mark.criu, pytest.mark.timeout(180)]

WRITER: Final = [sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "victims/file_writer.py")]
#: On the node's own tmpfs, or on the disk, where each node sees a directory of its own there.
PLACES: Final = {"tmpfs": Path("/run/data"), "disk": Path("/run/disk/data")}
DATA: Final = PLACES["tmpfs"]


@pytest.fixture(autouse=True)
def _rsync() -> None:
    if reason := need({"rsync": "rsync"}):
        pytest.skip(reason)


@pytest.fixture
async def nodes_with_roots(nodes: Nodes) -> Nodes:
    for node in (nodes.a, nodes.b):
        (node.directory / "disk").mkdir()
        await node.run(["mkdir", "/run/disk"])
        await node.run(["mount", "--bind", node.directory / "disk", "/run/disk"])
        await node.start_phauld(sync_roots="/run/data:/run/disk")
    return nodes


class Writer:
    """The workload `writer`, which checks its own files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    async def start(cls, node: Node, directory: Path) -> Writer:
        await node.run(["mkdir", directory])
        await node.phaul("run", "--name", "writer", "--", *WRITER, directory, check=True)
        writer = cls(directory)
        await writer.goes_on(node)
        return writer

    async def goes_on(self, node: Node) -> int:
        """Wait for more lines that say that all is well; the last number."""

        async def last() -> int:
            done = await node.phaul("logs", "writer", "-n", "3")
            assert "WRONG" not in done.stdout, done.stdout
            lines = [line for line in done.stdout.splitlines() if line.endswith(" ok")]
            return int(lines[-1].split()[0]) if lines else 0

        count = await last()
        async with asyncio.timeout(30):
            while (now := await last()) <= count:  # noqa: ASYNC110 - polled
                await asyncio.sleep(0.05)
        text = (node.root / self.directory.relative_to("/") / "log").read_bytes()
        written = text[: text.rfind(b"\n") + 1]
        assert written == b"".join(b"%012d\n" % each for each in range(1, written.count(b"\n") + 1))
        return now


def rsyncs(*nodes: Node) -> list[str]:
    return [line for node in nodes for _, line in processes(node) if "rsync" in line]


async def codes(node: Node, to: Node, *options: str) -> set[str]:
    done = await node.phaul("preflight", "writer", "--to", to.address, "--json", *options)
    return {each["code"] for each in done.json()["problems"] if each["severity"] == "error"}


@pytest.mark.parametrize(
    ("place", "mode"),
    [("tmpfs", ()), ("disk", ("--mode", "post-copy")), ("disk", ("--restore", "lazy"))],
    ids=["eager", "post-copy", "lazy"],
)
async def test_a_tree_that_writes_all_the_time_moves_with_its_files(
    nodes_with_roots: Nodes, place: str, mode: tuple[str, ...]
) -> None:
    a, b, _ = nodes_with_roots
    directory = PLACES[place]
    writer = await Writer.start(a, directory)
    for source, destination in ((a, b), (b, a)):  # what it left behind may be replaced when it comes back
        status, report = await migrate(source, "writer", destination, "--sync", str(directory), *mode)
        assert status == 0, report
        (synced,) = report["synced"]
        assert {"counter", "mapped", "log"} <= set(synced["freeze_paths"]), synced
        await writer.goes_on(destination)
        print(f"{place} {mode} pause {report['pause_ms']} ms, sync in the freeze {synced['freeze_duration_ms']} ms")
    assert rsyncs(a, b) == []


async def test_what_fails_leaves_the_tree_and_its_files_here(nodes_with_roots: Nodes) -> None:
    a, b, _ = nodes_with_roots
    writer = await Writer.start(a, DATA)
    await b.run(["mkdir", DATA])
    await b.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", DATA])
    status, report = await migrate(a, "writer", b, "--sync", str(DATA))
    assert (status, report["error"]["reason"]) == (ROLLED_BACK, "SYNC_FAILED"), report
    assert "No space left" in report["error"]["message"]
    await writer.goes_on(a)
    assert rsyncs(a, b) == []
    await b.run(["umount", DATA])
    status, report = await migrate(a, "writer", b, "--sync", str(DATA))
    assert status == 0, report
    await writer.goes_on(b)


async def test_a_failure_in_the_freeze_lets_the_tree_run_on(nodes_with_roots: Nodes) -> None:
    a, b, _ = nodes_with_roots
    writer = await Writer.start(a, DATA)
    status, report = await migrate(a, "writer", b, "--sync", str(DATA), "--freeze-budget", "5ms")
    assert (status, report["error"]["reason"]) == (ROLLED_BACK, "DEADLINE_EXCEEDED"), report
    await writer.goes_on(a)
    await until(lambda: rsyncs(a, b) == [])
    status, report = await migrate(a, "writer", b, "--sync", str(DATA))  # its own half copy may be replaced
    assert status == 0, report
    await writer.goes_on(b)


@pytest.mark.parametrize("killed", ["a", "b"])
async def test_a_daemon_that_is_killed_while_files_are_copied(nodes_with_roots: Nodes, killed: str) -> None:
    a, b, _ = nodes_with_roots
    writer = await Writer.start(a, DATA)
    await a.run(["sh", "-c", f"head -c 40000000 /dev/urandom >{DATA}/large"])
    await a.limit_bandwidth(8 << 20)
    moving = asyncio.create_task(migrate(a, "writer", b, "--sync", str(DATA)))
    await until(lambda: bool(rsyncs(b)))
    victim = a if killed == "a" else b
    await victim.kill_phauld(signal.SIGKILL)
    await until(lambda: rsyncs(a, b) == [])
    await victim.start_phauld(sync_roots="/run/data:/run/disk")
    await moving
    await writer.goes_on(a)
    await a.limit_bandwidth(None)
    status, report = await migrate(a, "writer", b, "--sync", str(DATA))
    assert status == 0, report
    await writer.goes_on(b)


async def test_nothing_of_somebody_elses_is_replaced_unasked(nodes_with_roots: Nodes) -> None:
    a, b, _ = nodes_with_roots
    writer = await Writer.start(a, DATA)
    sync = ("--sync", str(DATA))
    await b.run(["mkdir", DATA])
    assert await codes(a, b, *sync) == set()
    await b.run(["sh", "-c", f"echo mine >{DATA}/mine"])
    assert await codes(a, b, *sync) == {"sync-not-empty"}
    status, report = await migrate(a, "writer", b, *sync)
    assert status == REFUSED, report
    assert await codes(a, b, *sync, "--sync", "/run/other") == {"sync-missing"}
    await a.run(["mkdir", "/run/other"])
    assert await codes(a, b, *sync, "--sync", "/run/other") == {"sync-not-empty", "sync-not-allowed"}
    reader = await b.start(["sleep", "1000"], log=Path("/run/data/open"))
    assert await codes(a, b, *sync, "--sync-overwrite") == {"sync-in-use"}
    await reader.stop()
    status, report = await migrate(a, "writer", b, *sync, "--sync-overwrite")
    assert status == 0, report
    await writer.goes_on(b)
    assert not (b.root / "run/data/mine").exists()
    # what is at b may be the only copy now; what is at a is the older one
    await a.phaul("run", "--name", "stale", "--", "sleep", "1000", check=True)
    done = await a.phaul("preflight", "stale", "--to", b.address, "--json", *sync)
    found = {each["code"] for each in done.json()["problems"] if each["severity"] == "error"}
    assert found == {"sync-stale"}
    await a.run(["sh", "-c", f"echo more >>{DATA}/log"])
    assert await codes(b, a, *sync) == {"sync-not-empty"}


async def test_one_directory_that_both_see_is_left_alone(nodes: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes
    shared = tmp_path / "shared"
    for node in (a, b):
        await node.start_phauld(sync_roots=tmp_path)
    writer = await Writer.start(a, shared)
    status, report = await migrate(a, "writer", b, "--sync", str(shared), "--sync-overwrite")
    assert (status, report["error"]["reason"]) == (ROLLED_BACK, "SYNC_FAILED"), report
    assert "the same directory" in report["error"]["message"]
    await writer.goes_on(a)


async def test_what_rsync_is_told(nodes_with_roots: Nodes) -> None:
    """A node without rsync, or without sync_roots, says so beforehand."""
    a, b, _ = nodes_with_roots
    await Writer.start(a, DATA)
    found: dict[str, Any] = (await b.phaul("info", "--json")).json()
    assert "sync-v1" in found["api_features"]
    await b.kill_phauld(signal.SIGTERM)
    await b.start_phauld()
    assert await codes(a, b, "--sync", str(DATA)) == {"sync-not-allowed"}


async def test_a_lock_on_a_shared_file_is_told_beforehand_and_moves_with_a_file_of_its_own(
    nodes_with_roots: Nodes, tmp_path: Path
) -> None:
    """On one file system the restore would wait for the frozen tree's lock until the freeze budget is over."""
    a, b, _ = nodes_with_roots
    lock = "fcntl.lockf(file, fcntl.LOCK_EX, 1, 7)"
    await a.run(["mkdir", DATA])
    for place, expected in ((tmp_path, {"file-lock-held"}), (DATA, set())):
        program = f"import fcntl, time; file = open('{place}/locked', 'wb+'); {lock}; print('has it', flush=True)"
        words = [sys.executable, "-I", "-S", "-c", f"{program}\nwhile True: time.sleep(1)"]
        await a.phaul("run", "--name", "writer", "--", *words, check=True)
        async with asyncio.timeout(20):
            while "has it" not in (await a.phaul("logs", "writer")).stdout:  # noqa: ASYNC110 - polled
                await asyncio.sleep(0.05)
        sync = ("--sync", str(DATA)) if place == DATA else ()
        assert await codes(a, b, *sync) == expected
        status, report = await migrate(a, "writer", b, *sync)
        assert status == (REFUSED if expected else 0), report
        await a.phaul("stop", "writer")
        await a.phaul("rm", "writer")


async def test_a_shared_file_that_grows_is_no_other_file(nodes_with_roots: Nodes, tmp_path: Path) -> None:
    a, b, _ = nodes_with_roots
    file = tmp_path / "growing"
    program = f"import time; file = open('{file}', 'ab', 0)\nwhile True: file.write(b'x' * 100); time.sleep(0.0005)"
    await a.phaul("run", "--name", "writer", "--", sys.executable, "-I", "-S", "-c", program, check=True)
    await until(lambda: file.exists() and file.stat().st_size > 0)
    found: set[str] = set()
    async with asyncio.timeout(60):
        while "file-growing" not in found:  # it need not have grown between the two looks
            done = await a.phaul("preflight", "writer", "--to", b.address, "--json")
            found = {each["code"] for each in done.json()["problems"]}
            assert "file-size" not in found
    status, report = await migrate(a, "writer", b)
    assert status == 0, report
    size = file.stat().st_size
    await until(lambda: file.stat().st_size > size)
    await b.phaul("stop", "writer")


async def test_a_lease_is_not_broken_by_reading(nodes_with_roots: Nodes) -> None:
    a, b, _ = nodes_with_roots
    await a.run(["sh", "-c", f"mkdir {DATA}; echo content >{DATA}/leased"])
    program = (
        f"import fcntl, time; file = open('{DATA}/leased'); fcntl.fcntl(file, 1024, fcntl.F_RDLCK); print('has it')"
    )
    words = [sys.executable, "-I", "-S", "-u", "-c", f"{program}\nwhile True: time.sleep(1)"]
    await a.phaul("run", "--name", "writer", "--", *words, check=True)
    async with asyncio.timeout(20):
        while "has it" not in (await a.phaul("logs", "writer")).stdout:  # noqa: ASYNC110 - polled
            await asyncio.sleep(0.05)
    assert await codes(a, b, "--sync", str(DATA)) == {"sync-lease"}
    assert (await a.phaul("ps", "--json")).json()["workloads"][0]["state"] == "running"
