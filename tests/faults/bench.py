"""Two nodes with daemons, criu behind gates and links that break; a victim there, and its migration."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import grpc

from phaul.v1 import migrations_pb2, migrations_pb2_grpc, node_pb2, node_pb2_grpc, types_pb2
from phaul.v1.types_pb2 import Options
from tests.daemon import IMAGES_DIR, SOCKET, STATE_DIR, DaemonFailed
from tests.faults.gates import CriuGate, Gates, until
from tests.faults.links import Link
from tests.faults.victim import SLOT, SLOTS
from tests.faults.victims import Beats, Victim
from tests.inventory import Inventory
from tests.nodes import PROGRAMS, Nodes, two_nodes
from tests.started import Process

START_SECONDS: Final = 20.0
SETTLE_SECONDS: Final = 90.0
LEASE_SECONDS: Final = 3.0
RESTARTS: Final = 20
POLL_SECONDS: Final = 0.02
STATE_BYTES: Final = 64 << 20  #: the file system of a node's state
IMAGES_BYTES: Final = 320 << 20  #: each of those of its images; phauld leaves 256 MiB free
MEMORY_DIR: Final = Path("/run/phaul/memory")  #: images in memory
VICTIM: Final = Path(__file__).with_name("victim.py")
_CHANNEL: Final = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.use_local_subchannel_pool", 1),
)


class Bench:
    """One pair of nodes, for many points one after the other."""

    def __init__(self, nodes: Nodes, gates: Gates, links: dict[str, Link], criu: dict[str, CriuGate]) -> None:
        self.gates = gates
        self.links = links
        self.nodes = {"a": nodes.a, "b": nodes.b}
        self.client = nodes.client
        self._programs = {name: gate.program for name, gate in criu.items()}
        self._numbers = itertools.count(1)
        self._channels = {name: grpc.aio.insecure_channel(node.daemon.target, options=_CHANNEL) for name, node in
                          self.nodes.items()}  # fmt: skip
        self.baseline: dict[str, Inventory] = {}  #: what there is without a migration
        self._restarts: list[asyncio.Task[None]] = []
        self.settings: dict[str, object] = {}

    @property
    def link(self) -> Link:
        """The way from a to b."""
        return self.links["a"]

    def use_criu(self, name: str, program: Path) -> None:
        """Without a gate; before the daemons start."""
        self._programs[name] = program

    async def start(self, **settings: object) -> None:
        """Start both daemons."""
        self.settings = settings
        await asyncio.gather(*(self.start_daemon(name) for name in self.nodes))
        await asyncio.sleep(0.1)
        self.baseline = {name: await node.inventory() for name, node in self.nodes.items()}

    async def start_daemon(self, name: str) -> None:
        """Start a node's phauld."""
        settings = {"lease_seconds": LEASE_SECONDS, "log_level": "debug", **self.settings}
        await self.nodes[name].start_phauld(criu=self._programs[name], memory_images_dir=MEMORY_DIR, **settings)

    async def kill_daemon(self, name: str, *, restart_after_seconds: float | None = 0.3) -> None:
        """SIGKILL phauld, and start it again a little later, beside what the test does then."""
        await self.nodes[name].kill_phauld(signal.SIGKILL)

        async def restart(seconds: float) -> None:
            for _ in range(RESTARTS):
                await asyncio.sleep(seconds)
                with contextlib.suppress(DaemonFailed):  # its disk is full; systemd would try again, too
                    return await self.start_daemon(name)

        if restart_after_seconds is not None:
            self._restarts.append(asyncio.create_task(restart(restart_after_seconds)))

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    def migrations(self, name: str) -> migrations_pb2_grpc.MigrationsAsyncStub:
        """The source's service of a node."""
        return migrations_pb2_grpc.MigrationsStub(self._channels[name])

    def node_service(self, name: str) -> node_pb2_grpc.NodeAsyncStub:
        """The service of a node about itself."""
        return node_pb2_grpc.NodeStub(self._channels[name])

    # The victim

    async def run_victim(self, *, mib: int = 4, children: int = 0, threads: int = 0, outside: bool = False) -> Victim:
        """Start one on node a and see it beat. `outside`: not by phaul, with a PID that is free on both nodes."""
        number = next(self._numbers)
        victim = Victim(name=f"v{number}", processes=1 + children, threads=threads)
        for node in self.nodes.values():
            (node.root / victim.file.relative_to("/")).write_bytes(bytes(SLOT.size * SLOTS))
        argv = [sys.executable, "-IS", str(VICTIM), str(victim.file), "--mib", str(mib)]
        argv += ["--children", str(children), "--threads", str(threads)]
        if outside:
            victim.outside_pid = await self._start_outside(argv, 20000 + 100 * number)
        else:
            spec = types_pb2.WorkloadSpec(name=victim.name, argv=argv, working_directory="/run")
            await self.node_service("a").RunWorkload(
                node_pb2.RunWorkloadRequest(spec=spec), wait_for_ready=True, timeout=20
            )
        await until(lambda: min(self.read(victim, "a").checks) > 0, START_SECONDS)
        return victim

    async def _start_outside(self, argv: list[str], pid: int) -> int:
        node = self.nodes["a"]
        script = 'echo "$0" >/proc/sys/kernel/ns_last_pid; exec setsid -f "$@" </dev/null >/dev/null 2>&1'
        await node.run(["sh", "-c", script, str(pid), *argv])
        async with asyncio.timeout(10):
            while True:
                for entry in (node.root / "proc").glob("[0-9]*/cmdline"):
                    with contextlib.suppress(OSError):
                        if entry.read_bytes().split(b"\0")[:-1] == [word.encode() for word in argv]:
                            return int(entry.parent.name)
                await asyncio.sleep(POLL_SECONDS)

    def read(self, victim: Victim, name: str) -> Beats:
        """What the victim's copy on a node has written to its file."""
        data = (self.nodes[name].root / victim.file.relative_to("/")).read_bytes()
        rows = [SLOT.unpack_from(data, slot * SLOT.size) for slot in range(victim.slots)]
        return Beats([row[0] for row in rows], [row[2] for row in rows], sum(row[3] for row in rows))

    def read_log(self, victim: Victim, name: str) -> list[str] | None:
        """The lines of the victim's log on a node; `None` if there is no log."""
        try:
            return (self.nodes[name].root / victim.log.relative_to("/")).read_text().splitlines()
        except FileNotFoundError:
            return None

    # The migration

    async def migrate(self, victim: Victim, *, migration_id: str, options: Options, source: str = "a") -> None:
        """Ask for it; that the daemon dies meanwhile is no error."""
        target: dict[str, Any] = {"workload": victim.name}
        if victim.outside_pid is not None:
            target = {"pid": victim.outside_pid}
        request = migrations_pb2.StartMigrationRequest(
            migration_id=migration_id, destination=self.links[source].address, options=options, **target
        )
        await self.migrations(source).StartMigration(request, timeout=10)

    async def start_cli(self, victim: Victim, *words: str) -> Process:
        """The same by the command line."""
        argv: list[str | Path] = [
            PROGRAMS / "phaul",
            "--daemon",
            f"unix:{SOCKET}",
            "migrate",
            victim.name,
            "--to",
            self.link.address,
        ]
        return await self.nodes["a"].start([*argv, *words])

    async def record(self, migration_id: str, source: str = "a") -> migrations_pb2.Migration | None:
        """What the source says of the migration; `None` if it knows nothing of it."""
        request = migrations_pb2.GetMigrationRequest(migration_id=migration_id)
        try:
            answer = await self.migrations(source).GetMigration(request, wait_for_ready=True, timeout=20)
        except grpc.aio.AioRpcError as exc:
            if exc.code() is grpc.StatusCode.NOT_FOUND:
                return None
            if exc.code() is grpc.StatusCode.UNAVAILABLE:  # killed meanwhile, and about to be started again
                await asyncio.sleep(POLL_SECONDS)
                return await self.record(migration_id, source)
            raise
        return answer.migration

    async def find_record(self, victim: Victim, source: str = "a") -> str:
        """The id of the victim's last migration; "" if there is none."""
        request = migrations_pb2.ListMigrationsRequest(workload=victim.name)
        answer = await self.migrations(source).ListMigrations(request, wait_for_ready=True, timeout=20)
        return answer.migrations[0].migration_id if answer.migrations else ""

    async def settle(self, migration_id: str, *, source: str = "a", held: bool = False) -> None:
        """Wait until what was killed runs again and the migration is over (or held, if that is what is wanted)."""
        async with asyncio.timeout(SETTLE_SECONDS):
            while True:
                restarts, self._restarts = self._restarts, []
                await asyncio.gather(*restarts)
                record = await self.record(migration_id, source)
                over = record is None or record.HasField("finished_at")
                over |= held and record is not None and record.phase == types_pb2.MIGRATION_PHASE_HELD
                if over and not self._restarts:
                    return
                await asyncio.sleep(POLL_SECONDS)


@contextlib.asynccontextmanager
async def bench(directory: Path, *, images_bytes: int = IMAGES_BYTES) -> AsyncIterator[Bench]:
    """A pair of nodes; the daemons are not started yet. State and images are on small file systems of their own."""
    gates = Gates()
    async with contextlib.AsyncExitStack() as stack:
        nodes = await stack.enter_async_context(two_nodes(directory))
        criu = {
            node.name: await stack.enter_async_context(CriuGate(gates, node.name, directory / f"criu-{node.name}"))
            for node in (nodes.a, nodes.b)
        }
        for node in (nodes.a, nodes.b):
            for path, size_bytes in ((STATE_DIR, STATE_BYTES), (IMAGES_DIR, images_bytes), (MEMORY_DIR, images_bytes)):
                await node.run(["mkdir", "-p", path])
                await node.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", path])
        links = {
            source.name: await stack.enter_async_context(Link(gates, source, destination, directory))
            for source, destination in ((nodes.a, nodes.b), (nodes.b, nodes.a))
        }
        made = Bench(nodes, gates, links, criu)
        stack.push_async_callback(made.close)
        yield made
