"""The demo: a live redis-server with data moves from one phauld to another while a client goes on writing to it.

Two nodes and a client, each a set of namespaces of this machine. Everything is made for the demo and gone after it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from phaul_client.cli.units import format_bytes, format_seconds
from phaul_criu.errors import CriuError
from phaul_criu.install import ask_version, find_binary
from tests.by_hand import move_by_hand, start_tree, warm_memory
from tests.daemon import DaemonFailed
from tests.inventory import processes
from tests.nodes import PROGRAMS, ROOT, Node, Nodes, missing_programs, two_nodes, until
from tests.started import CommandFailed, Process
from tests.victims.redis_writer import Written

NAME: Final = "redis"
PORT: Final = 6379
PORT_BY_HAND: Final = 6380
REDIS_DIR: Final = "/run/redis"
WRITES_AROUND: Final = 300  #: acknowledged before and after a move, at least
WRITER_SECONDS: Final = 90.0
BULK_SECONDS: Final = 600.0

_EPILOG: Final = """\
examples:
  ./demo                          100,000 keys
  ./demo --mib 1024 --by-hand     1 GiB more, and the same move with nothing but the criu command, side by side
  ./demo --json result.json       what was measured, for programs

exit status: 0 if every proof holds, 1 if one does not or the demo could not go on, 2 for a wrong call.
"""


class DemoFailed(Exception):
    """The demo cannot go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What is in a redis, the writer's database left aside."""

    keys: int
    digest: str


class Redis:
    """A redis-server with data, and the client's programs that use it."""

    def __init__(self, nodes: Nodes, directory: Path, port: int) -> None:
        self._nodes = nodes
        self._port = port
        self._result = directory / f"writer-{port}.json"
        config = directory / f"redis-{port}.conf"
        lines = [f"port {port}", "bind 0.0.0.0", "protected-mode no", f"dir {REDIS_DIR}", 'save ""', "appendonly no"]
        config.write_text("\n".join(lines) + "\n")
        self.argv: Final = ("redis-server", str(config))

    def pid(self, node: Node) -> int | None:
        """Its PID on a node; `None` if it does not run there."""
        for pid, line in processes(node):
            if line.split()[0].endswith("redis-server") and f":{self._port}" in line:
                return pid
        return None

    def memory_bytes(self, node: Node) -> int:
        """Its resident memory on a node."""
        status = (node.root / f"proc/{self.pid(node)}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))

    async def fill(self, node: Node, keys: int, mib: int) -> Data:
        """Fill it as soon as it answers; what is in it then."""
        await until(lambda: self.pid(node) is not None)
        await self._ask(node, "load", "--keys", str(keys), "--mib", str(mib))
        return await self.data(node)

    async def data(self, node: Node) -> Data:
        """All that is in it, read by the client."""
        return Data(**await self._ask(node, "digest"))

    async def lost_writes(self, node: Node) -> int:
        """How many of the writer's acknowledged writes are not there."""
        answer = await self._ask(node, "lost", "--acknowledged", str(self.written().acknowledged))
        return int(answer["lost"])

    @contextlib.asynccontextmanager
    async def writer(self) -> AsyncIterator[None]:
        """The client writes all the time, from well before the block until well after it."""
        a, b, client = self._nodes
        script = ROOT / "tests/victims/redis_writer.py"
        argv: list[str | Path] = [
            sys.executable,
            "-I",
            "-S",
            script,
            self._result,
            str(self._port),
            a.lan_address,
            b.lan_address,
        ]
        writer = await client.start(argv)
        await self._until_written(writer, WRITES_AROUND)
        yield
        await self._until_written(writer, self.written().acknowledged + WRITES_AROUND)
        await writer.stop()

    def written(self) -> Written:
        """What the writer has seen."""
        return Written(**json.loads(self._result.read_text())) if self._result.exists() else Written()

    async def _until_written(self, writer: Process, number: int) -> None:
        await until(lambda: self.written().acknowledged >= number or writer.returncode is not None, WRITER_SECONDS)
        if writer.returncode is not None:
            raise DemoFailed(f"the writing client ended: {writer.log.read_text()}")

    async def _ask(self, node: Node, *words: str) -> Any:
        script = ROOT / "tests/victims/redis_data.py"
        where = [node.lan_address, str(self._port)]
        done = await self._nodes.client.run([sys.executable, script, *where, *words], timeout_seconds=BULK_SECONDS)
        return done.json() if done.stdout else None


class Demo:
    """The steps, and what they show."""

    def __init__(self, nodes: Nodes, directory: Path, arguments: argparse.Namespace, console: Console) -> None:
        self._nodes = nodes
        self._directory = directory
        self._arguments = arguments
        self._console = console
        self._proofs: list[bool] = []

    async def run(self) -> bool:
        """All of it; whether every proof holds."""
        a = self._nodes.a
        await self._start_nodes()
        redis = Redis(self._nodes, self._directory, PORT)
        workload = (await a.phaul("run", "--json", "--name", NAME, "--", *redis.argv, check=True)).json()
        before = await self._fill(redis)
        self._say(
            "workload",
            f"redis-server on a, pid {workload['pid']}: {before.keys:,} keys, "
            f"{format_bytes(redis.memory_bytes(a))}, and a client that writes to it all the time",
        )
        report = await self._move(redis)
        result = {"workload": NAME, "keys_before": before.keys, **await self._prove(redis, before, workload["pid"])}
        result |= {key: report[key] for key in ("mode", "restore_mode", "pause_ms", "total_ms", "bytes", "timeline")}
        result["client_pause_ms"] = redis.written().longest_gap_ms
        self._say(
            "pause",
            f"{_time(report['pause_ms'])} by phaul's clock, "
            f"[bold]{_time(result['client_pause_ms'])}[/] between two writes of the client",
        )
        if self._arguments.by_hand:
            result["by_hand_pause_ms"] = await self._by_hand()
        await self._write_json(result)
        return all(self._proofs)

    async def _start_nodes(self) -> None:
        a, b, _ = self._nodes
        await asyncio.gather(a.start_phauld(), b.start_phauld())
        for node in (a, b):
            await node.run(["mkdir", REDIS_DIR])
        self._say("nodes", "a and b, made of namespaces of this machine, with a phauld each")

    async def _fill(self, redis: Redis) -> Data:
        with self._console.status("filling redis"):
            return await redis.fill(self._nodes.a, self._arguments.keys, self._arguments.mib)

    async def _move(self, redis: Redis) -> dict[str, Any]:
        """The move itself, on the terminal; phaul's report of it."""
        a, b, _ = self._nodes
        command = ["migrate", NAME, "--to", b.name, "--tcp", "close"]
        await warm_memory(b, redis.memory_bytes(a))
        self._console.print(f"\n[bold]$ phaul {' '.join(command)}[/]")
        async with redis.writer():
            status = await a.show([PROGRAMS / "phaul", *command])
            if status != 0:
                raise DemoFailed(f"redis was not moved: phaul's exit status is {status}")
        self._console.print()
        report: dict[str, Any] = (await a.phaul("status", "--json", check=True)).json()["migrations"][0]
        return report

    async def _prove(self, redis: Redis, before: Data, source_pid: int) -> dict[str, Any]:
        a, b, _ = self._nodes
        after, lost, written = await redis.data(b), await redis.lost_writes(b), redis.written()
        source_alive = redis.pid(a) is not None or _runs(a, source_pid)
        destination_pid = redis.pid(b)
        self._prove_that(
            after == before, f"all {before.keys:,} keys and values are the same (hash {after.digest[:12]}…)"
        )
        self._prove_that(lost == 0, f"all {written.acknowledged:,} writes that the client was told are done are there")
        self._prove_that(not source_alive, "the old process is gone from a")
        self._prove_that(destination_pid is not None and written.address == b.lan_address, "the new one answers on b")
        return {
            "keys_after": after.keys,
            "same_data": after == before and lost == 0,
            "acknowledged_writes": written.acknowledged,
            "lost_writes": lost,
            "source_alive": source_alive,
            "destination_alive": destination_pid is not None,
        }

    async def _by_hand(self) -> float:
        """Move another redis with the same data by the criu command alone; the pause as the client saw it, in ms."""
        a, b, _ = self._nodes
        redis = Redis(self._nodes, self._directory, PORT_BY_HAND)
        pid = await start_tree(a, redis.argv, self._directory / "by-hand.log")
        before = await self._fill(redis)
        await warm_memory(b, redis.memory_bytes(a))
        with self._console.status("the same by hand"):
            async with redis.writer():
                steps = await move_by_hand(a, b, pid, "--tcp-close")
        pause_ms = redis.written().longest_gap_ms
        self._say(
            "by hand",
            f"[bold]{_time(pause_ms)}[/] with nothing but the criu command (dump to a page server "
            f"{format_seconds(steps.dump_seconds)}, copy {format_seconds(steps.copy_seconds)}, "
            f"restore {format_seconds(steps.restore_seconds)})",
        )
        if await redis.data(b) != before or await redis.lost_writes(b) != 0:
            raise DemoFailed("the move by hand has lost data: there is nothing to compare with")
        return pause_ms

    async def _write_json(self, result: dict[str, Any]) -> None:
        if (path := self._arguments.json) is not None:
            result |= {"criu": str(await ask_version(find_binary())), "kernel": os.uname().release}
            path.write_text(json.dumps(result, indent=2) + "\n")

    def _say(self, what: str, text: str) -> None:
        self._console.print(f"[cyan]{what:9}[/]{text}", highlight=False, soft_wrap=True)

    def _prove_that(self, holds: bool, statement: str) -> None:
        self._proofs.append(holds)
        mark = "[green]✔[/]" if holds else "[red]✘ not true:[/]"
        self._console.print(f"{mark} {statement}", highlight=False, soft_wrap=True)


def _time(milliseconds: float) -> str:
    return format_seconds(milliseconds / 1000)


def _runs(node: Node, pid: int) -> bool:
    return any(found == pid and not line.startswith("zombie") for found, line in processes(node))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./demo",
        description="Moves a live redis-server between two nodes on this machine, and proves that nothing was lost.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--keys", type=int, default=100_000, metavar="N", help="keys in redis (default: 100,000)")
    parser.add_argument("--mib", type=int, default=0, metavar="N", help="more data, in MiB that do not compress")
    parser.add_argument("--by-hand", action="store_true", help="make the same move with the criu command, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured to FILE")
    arguments = parser.parse_args()
    if arguments.keys < 1 or arguments.mib < 0:
        parser.error("--keys must be 1 or more, --mib 0 or more")
    return arguments


async def _run(arguments: argparse.Namespace, console: Console) -> bool:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):  # as asyncio does it with SIGINT
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    with tempfile.TemporaryDirectory(prefix="phaul-demo.") as directory:
        async with two_nodes(Path(directory) / "nodes") as nodes:
            return await Demo(nodes, Path(directory), arguments, console).run()


def main() -> None:
    arguments, console = _parse(), Console()
    if missing := [*missing_programs(), *([] if shutil.which("redis-server") else ["redis-server"])]:
        remedy = "apt-get install tini iproute2 nftables redis-server"
        sys.exit(f"demo: error: missing here: {', '.join(missing)}\n  remedy: {remedy}")
    try:
        proven = asyncio.run(_run(arguments, console))
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("\nstopped; nothing is left behind")
        sys.exit(130)
    except (DemoFailed, CommandFailed, DaemonFailed, CriuError, TimeoutError) as exc:
        console.print(f"[red]demo:[/] {exc}", highlight=False)
        sys.exit(1)
    sys.exit(0 if proven else 1)


if __name__ == "__main__":
    main()
