"""Migrations to and fro with random faults: none is lost, none is doubled.

A few, always the same; `--count 1000` for a long run of its own seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import grpc
import pytest

from phaul.v1 import types_pb2
from phaul.v1.types_pb2 import Options
from tests.conftest import Report
from tests.faults.bench import LEASE_SECONDS, Bench, bench
from tests.faults.faults import signal_one
from tests.faults.gates import Verdict
from tests.faults.judge import beating_on, end_victim, leftovers
from tests.faults.victims import Victim

pytestmark = [pytest.mark.criu, pytest.mark.timeout(0)]

LANES: Final = 2
COUNT: Final = 20
SEED: Final = 1252222112  #: its last move leaves a session at the other node, which an abort drops while the test asks
START_SECONDS: Final = 20.0
MAX_CUT_SECONDS: Final = 1.5
#: as they are reached without faults, with X for the source and Y for the destination
BOUNDARIES: Final = (
    "X>Y:CheckTree:request", "X>Y:OpenSession:request", "X>Y:OpenSession:reply", "X>Y:StartIter:request",
    "Y:page-server:request", "X>Y:StartIter:reply", "X:dump:request", "X:dump:pre-dump:notify",
    "X:dump:query-ext-files:notify", "X:dump:post-dump:notify", "X>Y:Restore:request", "Y:wait-pid:request",
    "Y:restore:request", "Y:restore:pre-restore:notify", "Y:restore:post-restore:notify", "X>Y:Restore:reply",
    "X>Y:Commit:request", "Y:restore:post-restore:answer", "Y:restore:pre-resume:notify",
    "Y:restore:post-resume:notify", "X>Y:Commit:reply", "X:dump:post-dump:answer", "X:dump:response",
)  # fmt: skip
FAULTS: Final = ("none", "kill-source-phauld", "kill-destination-phauld", "kill-both", "kill-source-criu",
                 "kill-destination-criu", "kill-destination-shim", "cut", "stall", "lose", "repeat")  # fmt: skip


class Moves:
    """One victim that is sent to and fro."""

    def __init__(self, made: Bench, dice: random.Random, name: str) -> None:
        self._made = made
        self._dice = dice
        self._name = name
        self._undo: list[asyncio.Task[None]] = []
        self.tally: Counter[str] = Counter()

    async def run(self, moves: int) -> None:
        """Migrate so many times; after each one, exactly one copy beats. Raises AssertionError."""
        victim, home = await self._made.run_victim(), "a"
        for number in range(moves):
            home = await self._move(victim, home, number)
        assert self._made.read(victim, home).failures == 0
        lines = self._made.read_log(victim, home) or []
        assert [line.split()[1] for line in lines] == [str(1 + each) for each in range(len(lines))]
        await end_victim(self._made, victim, ["a", "b"])
        assert not await leftovers(self._made)

    async def _move(self, victim: Victim, home: str, number: int) -> str:
        other = "b" if home == "a" else "a"
        plans = [
            (self._dice.choice(FAULTS), self._dice.choice(BOUNDARIES)) for _ in range(self._dice.choice((1, 1, 2)))
        ]
        story = f"{self._name} move {number} from {home}: {plans}"
        self._made.gates.clear()
        for fault, boundary in plans:
            at = boundary.replace("X", home).replace("Y", other)
            self._made.gates.plan(at, self._damage(fault, home, other))
        before = max(self._made.read(victim, each).counts[0] for each in "ab")
        migration_id = f"{self._name}-{number}"
        await self._start(victim, home, migration_id)
        await self._made.settle(migration_id, source=home)
        self._made.gates.clear()
        await asyncio.gather(*self._undo)
        self._undo.clear()
        beating = await beating_on(self._made, victim)
        assert len(beating) == 1, f"{story}: beats on {beating}"
        assert self._made.read(victim, beating[0]).counts[0] > before, f"{story}: lost a part of its past"
        record = await self._made.record(migration_id, home)
        moved = record is not None and record.phase == types_pb2.MIGRATION_PHASE_DONE
        assert beating == [other if moved else home], f"{story}: beats on {beating}, the record says {record}"
        if record is not None and record.error.reason == types_pb2.ERROR_REASON_PEER_UNREACHABLE:
            await asyncio.sleep(LEASE_SECONDS + 0.2)  # until then the destination keeps a place for it
        self.tally["moved" if moved else "resumed"] += 1
        self.tally.update({f"with {fault}": 1 for fault, _ in plans})
        return beating[0]

    async def _start(self, victim: Victim, home: str, migration_id: str) -> None:
        options = Options(restore_mode=self._dice.choice((types_pb2.RESTORE_MODE_EAGER, types_pb2.RESTORE_MODE_LAZY)))
        async with asyncio.timeout(START_SECONDS):
            while True:
                try:
                    return await self._made.migrate(victim, migration_id=migration_id, options=options, source=home)
                except grpc.aio.AioRpcError as exc:
                    if exc.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                    await asyncio.sleep(0.1)
                    if self._made.gates.seen:  # it was asked for before the daemon died
                        return None

    def _damage(self, fault: str, home: str, other: str) -> Callable[[], Awaitable[Verdict | None]]:
        made, link, seconds = self._made, self._made.links[home], self._dice.uniform(0.1, MAX_CUT_SECONDS)

        async def happen() -> Verdict | None:
            match fault:
                case "kill-source-phauld":
                    await made.kill_daemon(home)
                case "kill-destination-phauld":
                    await made.kill_daemon(other)
                case "kill-both":
                    await made.kill_daemon(home)
                    await made.kill_daemon(other)
                case "kill-source-criu" | "kill-destination-criu":
                    with contextlib.suppress(KeyError):  # it has not started yet
                        made.gates.kill_criu(f"{home}:dump" if "source" in fault else f"{other}:restore")
                case "kill-destination-shim":
                    with contextlib.suppress(ValueError):  # it has not started yet
                        signal_one(made.nodes[other], "shim restore ")
                case "cut" | "stall":
                    link.cut() if fault == "cut" else link.stall()
                    self._undo.append(asyncio.create_task(self._mend(home, seconds)))
                case "lose":
                    return Verdict.LOSE
                case "repeat":
                    return Verdict.REPEAT
            return None

        return happen

    async def _mend(self, home: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._made.links[home].mend()


async def _lane(directory: Path, seed: int, moves: int, tally: Counter[str]) -> None:
    async with bench(directory) as made:
        await made.start()
        lane = Moves(made, random.Random(seed), f"r{seed}")
        try:
            await lane.run(moves)
        except BaseException:
            for name, node in made.nodes.items():
                print(f"--- {name}\n{(node.directory / 'phauld.log').read_text(errors='replace')[-20000:]}")
            raise
        finally:
            tally.update(lane.tally)


async def test_nothing_is_lost_and_nothing_is_doubled(
    pytestconfig: pytest.Config, tmp_path: Path, json_report: Report
) -> None:
    count, chosen = pytestconfig.getoption("--count"), pytestconfig.getoption("--seed")
    seed = chosen if chosen is not None else SEED if count is None else random.randrange(1 << 32)
    count = count or COUNT
    tally: Counter[str] = Counter()
    started = time.monotonic()
    print(f"\n{count} migrations, seed {seed}")
    try:
        async with asyncio.TaskGroup() as lanes:
            for lane in range(LANES):
                moves = count // LANES + (lane < count % LANES)
                lanes.create_task(_lane(tmp_path / str(lane), seed + lane, moves, tally))
    finally:
        done = tally["moved"] + tally["resumed"]
        print(f"{done} migrations in {time.monotonic() - started:.0f} s: {dict(sorted(tally.items()))}")
    json_report["random_faults"] = {"seed": seed, "migrations": done, "lost": 0, "doubled": 0, **tally}
