"""Real programs move under load; their own clients verify the data and tell the pause that they saw."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.need import need
from tests.node.test_daemons import migrate
from tests.nodes import Node, Nodes, until
from tests.workloads.catalogue import PORT, WORKLOADS, Workload
from tests.workloads.conftest import MODES, START_SECONDS, Outside, Row, record

pytestmark = [pytest.mark.criu, pytest.mark.timeout(600)]

CLIENT: Final = Path(__file__).with_name("client.py")


class Inside:
    """The workload is its own client, and writes to its beats file, wherever it runs."""

    def __init__(self, *beats: Path) -> None:
        self._beats = beats

    @property
    def beats(self) -> Path:
        """That of the node where it wrote last."""
        return max(self._beats, key=lambda path: path.stat().st_mtime if path.exists() else 0.0)

    def seen(self) -> Row:
        lines = self.beats.read_text().splitlines() if self.beats.exists() else []
        if not lines:
            return {"answers": 0, "longest_gap_ms": 0.0}
        count, gap, word = lines[-1].split(" ", 2)
        assert word in ("RUNS", "PASS"), lines[-1]
        return {"answers": int(count), "longest_gap_ms": float(gap), "word": word}

    async def progress(self) -> None:
        count = self.seen()["answers"]
        await until(lambda: self.seen()["answers"] > count + 100, START_SECONDS)

    async def end(self) -> Row:
        return self.seen()


async def start(nodes: Nodes, workload: Workload, directory: Path) -> Outside | Inside:
    files = [node.root / "run" / workload.name if workload.own_files else directory for node in (nodes.a, nodes.b)]
    if workload.own_files:
        directory = Path("/run") / workload.name
        for each in files:
            each.mkdir()
    words = workload.prepare(directory)
    await nodes.a.phaul("run", "--name", workload.name, "--cwd", str(directory), "--", *words, check=True)
    if not workload.protocol:
        return Inside(*(each / "beats" for each in files))
    result = directory / "client.json"
    words = [sys.executable, "-I", str(CLIENT), workload.protocol, str(result), str(PORT)]
    addresses = [nodes.a.lan_address, nodes.b.lan_address]
    return Outside(result, await nodes.client.start([*words, *addresses]))


async def states(node: Node) -> dict[str, str]:
    """Each workload and its state."""
    listed = (await node.phaul("ps", "--all", "--json", check=True)).json()["workloads"]
    return {each["name"]: each["state"] for each in listed}


def cases() -> list[Any]:
    """Each workload with one mode first, in turn, then with the others (`--all`)."""
    names = list(MODES)
    found = [(workload, names[index % len(names)]) for index, workload in enumerate(WORKLOADS)]
    found += [(workload, mode) for workload in WORKLOADS for mode in names if (workload, mode) not in found]
    return [
        pytest.param(each, mode, index >= len(WORKLOADS), id=f"{each.name}-{mode}")
        for index, (each, mode) in enumerate(found)
    ]


@pytest.mark.parametrize(("workload", "mode", "only_if_all"), cases())
async def test_it_moves_under_load_and_its_client_finds_everything(
    daemons: Nodes, tmp_path: Path, workload: Workload, mode: str, only_if_all: bool, every: bool, table: list[Row]
) -> None:
    if only_if_all and not every:
        pytest.skip("one mode for each workload; all of them with --all")
    if reason := await asyncio.to_thread(need, workload.needs):
        pytest.skip(reason)
    a, b, _ = daemons
    client = await start(daemons, workload, tmp_path)
    await client.progress()
    if workload.own_files:
        shutil.copytree(a.root / "run" / workload.name, b.root / "run" / workload.name, dirs_exist_ok=True)
    tcp = ("--tcp", "close") if workload.protocol else ()
    exit_code, report = await migrate(a, workload.name, b, *tcp, *MODES[mode])
    assert exit_code == 0, (report["error"], report["problems"])
    assert report["mode"] == ("post-copy" if mode == "post-copy" else "stop-copy"), report
    await client.progress()
    assert (await states(a))[workload.name] == "moved"
    assert (await states(b))[workload.name] == "running"
    seen = await client.end()
    stopped = await b.phaul("stop", workload.name, "--grace", "20", "--signal", "TERM", "--json")
    if isinstance(client, Inside):
        assert client.seen()["word"] == "PASS", stopped
    assert workload.protocol not in ("redis", "memcached") or seen["read_back"] == seen["answers"]
    record(table, workload.name, mode, report, seen)
