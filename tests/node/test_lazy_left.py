"""phauld is killed while `criu lazy-pages` fills a tree from local images: the next one still knows how it ends."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest

from phauld.guarding.lazy_hold import Left
from phauld.proc import start_ticks
from tests.faults.faults import signal_lazy_pages
from tests.faults.gates import CriuGate, Gates
from tests.node.checksummed import run_checksummed
from tests.nodes import Nodes

pytestmark = [pytest.mark.criu, pytest.mark.timeout(120)]

MIB: Final = 64


@asynccontextmanager
async def _filling(nodes: Nodes, directory: Path) -> AsyncIterator[Path]:
    """The victim runs at b, its lazy-pages is stopped, b's phauld is another one. The file that asks for a word."""
    a, b, _ = nodes
    gates, killed = Gates(), asyncio.Event()
    async with CriuGate(gates, "b", directory / "gate") as gate:
        await a.start_phauld()
        await b.start_phauld(criu=gate.program)
        done = a.directory / "done"
        await run_checksummed(a, MIB, done)

        async def stop() -> None:
            pid = signal_lazy_pages(b, signal.SIGSTOP)
            async with asyncio.timeout(30):  # its guard, which traces it, has to let the signal through
                while (b.root / f"proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "tT":  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

        async def kill() -> None:
            await b.kill_phauld(signal.SIGKILL)
            killed.set()

        gates.plan("b:restore:pre-resume:notify", stop)
        gates.plan("b:restore:post-resume:notify", kill)
        migrating = asyncio.create_task(a.phaul("migrate", "victim", "--to", b.address, "--restore", "lazy", "--json"))
        await killed.wait()
        await b.start_phauld(criu=gate.program)
        report = json.loads((await migrating).stdout.splitlines()[-1])
        assert report["outcome"] == "moved", report
        yield done
        async with asyncio.timeout(30):  # nothing is left
            while list((b.root / "dev/shm/phaul").glob(f"in-{report['migration_id']}")):  # noqa: ASYNC110
                await asyncio.sleep(0.1)


async def test_it_dies(nodes: Nodes, tmp_path: Path) -> None:
    b = nodes.b
    async with _filling(nodes, tmp_path) as done:
        if not await _tells_how_it_ended():
            pytest.skip("this kernel does not tell how a process ended that is not a child (6.15)")
        signal_lazy_pages(b, signal.SIGKILL)
        done.touch()
        async with asyncio.timeout(30):
            while "pages lost, the tree was killed" not in (b.directory / "phauld.log").read_text():  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            while "signal 9" not in (await b.phaul("ps", "--all")).stdout:  # noqa: ASYNC110 - over an RPC
                await asyncio.sleep(0.1)
        assert (await b.phaul("logs", "victim")).stdout.split() == ["ready"]  # and never "lost"


async def test_it_goes_on(nodes: Nodes, tmp_path: Path) -> None:
    b = nodes.b
    async with _filling(nodes, tmp_path) as done:
        signal_lazy_pages(b, signal.SIGCONT)
        done.touch()
        async with asyncio.timeout(30):
            while len(said := (await b.phaul("logs", "victim")).stdout.split()) < 2:  # noqa: ASYNC110 - over an RPC
                await asyncio.sleep(0.1)
        assert said == ["ready", "intact"]
        assert "not known" not in (b.directory / "phauld.log").read_text() or not await _tells_how_it_ended()


async def _tells_how_it_ended() -> bool:
    child = await asyncio.create_subprocess_exec("cat", stdin=asyncio.subprocess.PIPE)
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()  # noqa: ASYNC240
    left = Left({"pid": child.pid, "start_ticks": start_ticks(child.pid), "boot_id": boot_id})
    child.kill()
    await child.wait()
    status = await left.wait()
    left.close()
    return status == -signal.SIGKILL
