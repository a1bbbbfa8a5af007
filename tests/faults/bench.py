"""Two nodes with daemons, criu behind gates and links that break; a victim; and a judge who looks at the end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc

from phaul.v1 import migrations_pb2, migrations_pb2_grpc, node_pb2, node_pb2_grpc, types_pb2
from phaul.v1.types_pb2 import Options
from tests.daemon import IMAGES_DIR, LOG_DIR, SOCKET, STATE_DIR, DaemonFailed
from tests.faults.gates import CriuGate, Gates, until
from tests.faults.links import Link
from tests.faults.victim import SLOT, SLOTS
from tests.inventory import Inventory
from tests.nodes import PROGRAMS, Nodes, Process, two_nodes

START_SECONDS: Final = 20.0
SETTLE_SECONDS: Final = 40.0
CLEAN_SECONDS: Final = 8.0
LEASE_SECONDS: Final = 3.0
RESTARTS: Final = 20
BEAT_SECONDS: Final = 3.0
_NOT_OVER: Final = (node_pb2.WORKLOAD_STATE_RUNNING, node_pb2.WORKLOAD_STATE_ARRIVING)
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
_HELD: Final = (types_pb2.MIGRATION_PHASE_HELD, types_pb2.MIGRATION_PHASE_COMMITTED)


class Wrong(AssertionError):
    """A promise was broken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What was found when all had settled."""

    outcome: str  #: resumed, moved, held
    alive: int  #: copies that beat
    data_intact: bool
    leftovers: tuple[str, ...]
    phase: str  #: what the source's record says, without its prefix; "" if there is none
    reason: str  #: why it did not move, as the record says
    complaints: tuple[str, ...] = ()  #: what else is wrong


@dataclass(slots=True, kw_only=True)
class Victim:
    """A tree that is to move. Its files have the same path on every node."""

    name: str
    processes: int = 1
    threads: int = 0
    outside_pid: int | None = None  #: on node a, of a process that phaul did not start

    @property
    def file(self) -> Path:
        return Path("/run") / f"{self.name}.beats"

    @property
    def log(self) -> Path:
        return LOG_DIR / f"{self.name}.log"

    @property
    def slots(self) -> int:
        return self.processes + self.processes * self.threads


@dataclass(slots=True)
class Beats:
    """What a node's copy of the victim's file says."""

    counts: list[int] = field(default_factory=list)
    checks: list[int] = field(default_factory=list)
    failures: int = 0


class Bench:
    """One pair of nodes, for many points one after the other."""

    def __init__(self, nodes: Nodes, gates: Gates, links: dict[str, Link], criu: dict[str, CriuGate]) -> None:
        self.gates = gates
        self.links = links
        self.nodes = {"a": nodes.a, "b": nodes.b}
        self.client = nodes.client
        self._criu = criu
        self._numbers = itertools.count(1)
        self._channels = {name: grpc.aio.insecure_channel(node.daemon.target, options=_CHANNEL) for name, node in
                          self.nodes.items()}  # fmt: skip
        self._baseline: dict[str, Inventory] = {}
        self._restarts: list[asyncio.Task[None]] = []
        self.settings: dict[str, object] = {}

    @property
    def link(self) -> Link:
        """The way from a to b."""
        return self.links["a"]

    async def start(self, **settings: object) -> None:
        """Start both daemons."""
        self.settings = settings
        await asyncio.gather(*(self.start_daemon(name) for name in self.nodes))
        await asyncio.sleep(0.1)
        self._baseline = {name: await node.inventory() for name, node in self.nodes.items()}

    async def start_daemon(self, name: str) -> None:
        """Start a node's phauld."""
        await self.nodes[name].start_phauld(
            criu=self._criu[name].program,
            memory_images_dir=MEMORY_DIR,
            lease_seconds=LEASE_SECONDS,
            log_level="debug",
            **self.settings,
        )

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

    # The judge

    async def judge(self, victim: Victim, migration_id: str, *, source: str = "a") -> Judgement:
        """Look which copies beat, whether anything is lost or doubled, and what is left; ends the victim."""
        destination = "b" if source == "a" else "a"
        record = await self.record(migration_id, source) if migration_id else None
        beating = await self.beating(victim)
        complaints = self._complaints(victim, source, destination, beating)
        held = record is not None and record.phase in _HELD
        outcome = "held" if held else "moved" if beating == [destination] else "resumed"
        done = record is not None and record.phase == types_pb2.MIGRATION_PHASE_DONE
        if not held and done != (outcome == "moved"):
            complaints.append(f"the record says {_phase(record)}, but it runs on {beating}")
        intact = await self._is_intact(victim, beating[0]) if len(beating) == 1 else held
        if not held:
            await self.end(victim, beating)
        return Judgement(
            outcome=outcome,
            alive=len(beating),
            data_intact=intact,
            leftovers=() if held else await self.leftovers(),
            phase=_phase(record),
            reason=types_pb2.ErrorReason.Name(record.error.reason).removeprefix("ERROR_REASON_")
            if record is not None and record.HasField("error")
            else "",
            complaints=tuple(complaints),
        )

    async def beating(self, victim: Victim) -> list[str]:
        """The nodes on which every part of it goes on. Raises Wrong if only a part does."""
        before = {name: self.read(victim, name).counts for name in self.nodes}
        deadline = time.monotonic() + BEAT_SECONDS
        while True:
            await asyncio.sleep(0.1)
            now = {name: self.read(victim, name).counts for name in self.nodes}
            going = {name: [new > old for new, old in zip(now[name], before[name], strict=True)] for name in now}
            if any(all(each) for each in going.values()) and not any(any(each) != all(each) for each in going.values()):
                return [name for name, each in going.items() if all(each)]
            if time.monotonic() > deadline:
                if any(any(each) != all(each) for each in going.values()):
                    raise Wrong(f"only a part of {victim.name} goes on: {going}")
                return []

    def _complaints(self, victim: Victim, source: str, destination: str, beating: list[str]) -> list[str]:
        if victim.outside_pid is not None:
            return [] if beating != [source] or not any(self.read(victim, destination).counts) else ["the copy has run"]
        logs = {name: self.read_log(victim, name) for name in (source, destination)}
        found = [f"{name}: {gap}" for name, lines in logs.items() if lines for gap in _gaps(lines)]
        if beating == [source] and any(self.read(victim, destination).counts):
            found.append("the copy at the destination has run")
        if beating == [destination]:
            ours, theirs = logs[source] or [], logs[destination] or []
            if ours != theirs[: len(ours)]:
                found.append(f"it ran on at the source: {len(ours)} lines there, {len(theirs)} here")
        return found

    async def _is_intact(self, victim: Victim, name: str) -> bool:
        before = self.read(victim, name).checks
        await until(
            lambda: all(new > old for new, old in zip(self.read(victim, name).checks, before, strict=True)),
            START_SECONDS,
        )
        return self.read(victim, name).failures == 0

    async def end(self, victim: Victim, beating: list[str]) -> None:
        """Stop the victim where it runs; forget it everywhere."""
        for name in beating:
            if victim.outside_pid is not None and name == "a":
                await self.nodes[name].run(["kill", "-KILL", str(victim.outside_pid)])
                continue
            listed = await self.node_service(name).ListWorkloads(node_pb2.ListWorkloadsRequest(), timeout=10)
            for workload in listed.workloads:
                if _is_of(victim, workload) and workload.state == node_pb2.WORKLOAD_STATE_RUNNING:
                    stop = node_pb2.StopWorkloadRequest(name=workload.spec.name, signal=9)
                    with _dropped_meanwhile():
                        await self.node_service(name).StopWorkload(stop, timeout=20)
        for name, node in self.nodes.items():
            for workload in await self._ended_workloads(victim, name):
                request = node_pb2.RemoveWorkloadRequest(name=workload.spec.name)
                with _dropped_meanwhile():
                    await self.node_service(name).RemoveWorkload(request, timeout=10)
            (node.root / victim.file.relative_to("/")).unlink(missing_ok=True)
            if name in ("a", *beating):  # where it never ran, a log is a leftover
                (node.root / victim.log.relative_to("/")).unlink(missing_ok=True)

    async def _ended_workloads(self, victim: Victim, name: str) -> list[node_pb2.Workload]:
        """Once none of the victim runs; one that is about to be restored runs until its lease is over."""
        deadline = time.monotonic() + LEASE_SECONDS + CLEAN_SECONDS
        while True:
            listed = await self.node_service(name).ListWorkloads(node_pb2.ListWorkloadsRequest(), timeout=10)
            ours = [each for each in listed.workloads if _is_of(victim, each)]
            ended = [each for each in ours if each.state not in _NOT_OVER]
            if len(ended) == len(ours) or time.monotonic() > deadline:
                return ended
            await asyncio.sleep(0.1)

    async def leftovers(self) -> tuple[str, ...]:
        """What there is more than in the beginning, once it had time to go: processes, mounts, rules, files."""
        deadline = time.monotonic() + CLEAN_SECONDS
        while True:
            found = [each for name in self.nodes for each in await self._leftovers_of(name)]
            if not found or time.monotonic() > deadline:
                return tuple(found)
            await asyncio.sleep(0.1)

    async def _leftovers_of(self, name: str) -> list[str]:
        more = (await self.nodes[name].inventory()).more_than(self._baseline[name])
        more.pop("descriptors", None)  # a phauld that was started anew has other ones
        return [f"{name}: {kind}: {each}" for kind, items in more.items() for each in items]


@contextlib.contextmanager
def _dropped_meanwhile() -> Iterator[None]:
    """An abort may drop a record that was just listed: what is not there need not be asked for."""
    try:
        yield
    except grpc.aio.AioRpcError as exc:
        if exc.code() is not grpc.StatusCode.NOT_FOUND:
            raise


def _is_of(victim: Victim, workload: node_pb2.Workload) -> bool:
    """A tree that was started outside of phauld has a workload under another name once it moved; it is alone then."""
    return victim.outside_pid is not None or workload.spec.name == victim.name


def _gaps(lines: list[str]) -> list[str]:
    """Where the beats of a process do not follow one another."""
    last: dict[str, int] = {}
    found = []
    for line in lines:
        words = line.split()
        if len(words) != 2 or not words[1].isdigit():
            found.append(f"a strange line {line!r}")
            continue
        if int(words[1]) != last.get(words[0], 0) + 1:
            found.append(f"beat {words[1]} of process {words[0]} follows {last.get(words[0], 0)}")
        last[words[0]] = int(words[1])
    return found[:3]


def _phase(record: migrations_pb2.Migration | None) -> str:
    if record is None:
        return ""
    return types_pb2.MigrationPhase.Name(record.phase).removeprefix("MIGRATION_PHASE_")


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
