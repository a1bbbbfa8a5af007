"""Looks at the end of a point which copies beat, whether anything is lost or doubled, and what is left."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import grpc

from phaul.v1 import migrations_pb2, node_pb2, types_pb2
from tests.faults.bench import LEASE_SECONDS, START_SECONDS, Bench
from tests.faults.gates import until
from tests.faults.victims import Victim, gaps

CLEAN_SECONDS: Final = 20.0
BEAT_SECONDS: Final = 30.0  #: patience with who is to beat, on a busy machine
HELD_SECONDS: Final = 3.0  #: who is held would have beaten by then
_NOT_OVER: Final = (node_pb2.WORKLOAD_STATE_RUNNING, node_pb2.WORKLOAD_STATE_ARRIVING)
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


async def judge(bench: Bench, victim: Victim, migration_id: str, *, source: str = "a") -> Judgement:
    """Look which copies beat, whether anything is lost or doubled, and what is left; ends the victim."""
    destination = "b" if source == "a" else "a"
    record = await bench.record(migration_id, source) if migration_id else None
    held = record is not None and record.phase in _HELD
    beating = await beating_on(bench, victim, HELD_SECONDS if held else BEAT_SECONDS)
    complaints = _complaints(bench, victim, source, destination, beating)
    outcome = "held" if held else "moved" if beating == [destination] else "resumed"
    done = record is not None and record.phase == types_pb2.MIGRATION_PHASE_DONE
    if not held and done != (outcome == "moved"):
        complaints.append(f"the record says {_phase(record)}, but it runs on {beating}")
    intact = await _is_intact(bench, victim, beating[0]) if len(beating) == 1 else held
    if not held:
        await end_victim(bench, victim, beating)
    return Judgement(
        outcome=outcome,
        alive=len(beating),
        data_intact=intact,
        leftovers=() if held else await leftovers(bench),
        phase=_phase(record),
        reason=types_pb2.ErrorReason.Name(record.error.reason).removeprefix("ERROR_REASON_")
        if record is not None and record.HasField("error")
        else "",
        complaints=tuple(complaints),
    )


async def beating_on(bench: Bench, victim: Victim, seconds: float = BEAT_SECONDS) -> list[str]:
    """The nodes on which every part of it goes on, as soon as there is one. Raises Wrong if only a part does."""
    before = {name: bench.read(victim, name).counts for name in bench.nodes}
    deadline = time.monotonic() + seconds
    while True:
        await asyncio.sleep(0.1)
        now = {name: bench.read(victim, name).counts for name in bench.nodes}
        going = {name: [new > old for new, old in zip(now[name], before[name], strict=True)] for name in now}
        if any(all(each) for each in going.values()) and not any(any(each) != all(each) for each in going.values()):
            return [name for name, each in going.items() if all(each)]
        if time.monotonic() > deadline:
            if any(any(each) != all(each) for each in going.values()):
                raise Wrong(f"only a part of {victim.name} goes on: {going}")
            return []


def _complaints(bench: Bench, victim: Victim, source: str, destination: str, beating: list[str]) -> list[str]:
    if victim.outside_pid is not None:
        return [] if beating != [source] or not any(bench.read(victim, destination).counts) else ["the copy has run"]
    logs = {name: bench.read_log(victim, name) for name in (source, destination)}
    found = [f"{name}: {gap}" for name, lines in logs.items() if lines for gap in gaps(lines)]
    if beating == [source] and any(bench.read(victim, destination).counts):
        found.append("the copy at the destination has run")
    if beating == [destination]:
        ours, theirs = logs[source] or [], logs[destination] or []
        if ours != theirs[: len(ours)]:
            found.append(f"it ran on at the source: {len(ours)} lines there, {len(theirs)} here")
    return found


async def _is_intact(bench: Bench, victim: Victim, name: str) -> bool:
    before = bench.read(victim, name).checks
    await until(
        lambda: all(new > old for new, old in zip(bench.read(victim, name).checks, before, strict=True)),
        START_SECONDS,
    )
    return bench.read(victim, name).failures == 0


async def end_victim(bench: Bench, victim: Victim, beating: list[str]) -> None:
    """Stop the victim where it runs; forget it everywhere."""
    for name in beating:
        if victim.outside_pid is not None and name == "a":
            await bench.nodes[name].run(["kill", "-KILL", str(victim.outside_pid)])
            continue
        listed = await bench.node_service(name).ListWorkloads(node_pb2.ListWorkloadsRequest(), timeout=10)
        for workload in listed.workloads:
            if _is_of(victim, workload) and workload.state == node_pb2.WORKLOAD_STATE_RUNNING:
                stop = node_pb2.StopWorkloadRequest(name=workload.spec.name, signal=9)
                with _dropped_meanwhile():
                    await bench.node_service(name).StopWorkload(stop, timeout=20)
    for name, node in bench.nodes.items():
        for workload in await _ended_workloads(bench, victim, name):
            request = node_pb2.RemoveWorkloadRequest(name=workload.spec.name)
            with _dropped_meanwhile():
                await bench.node_service(name).RemoveWorkload(request, timeout=10)
        (node.root / victim.file.relative_to("/")).unlink(missing_ok=True)
        if name in ("a", *beating):  # where it never ran, a log is a leftover
            (node.root / victim.log.relative_to("/")).unlink(missing_ok=True)


async def _ended_workloads(bench: Bench, victim: Victim, name: str) -> list[node_pb2.Workload]:
    """Once none of the victim runs; one that is about to be restored runs until its lease is over."""
    deadline = time.monotonic() + LEASE_SECONDS + CLEAN_SECONDS
    while True:
        listed = await bench.node_service(name).ListWorkloads(node_pb2.ListWorkloadsRequest(), timeout=10)
        ours = [each for each in listed.workloads if _is_of(victim, each)]
        ended = [each for each in ours if each.state not in _NOT_OVER]
        if len(ended) == len(ours) or time.monotonic() > deadline:
            return ended
        await asyncio.sleep(0.1)


async def leftovers(bench: Bench) -> tuple[str, ...]:
    """What there is more than in the beginning, once it had time to go: processes, mounts, rules, files."""
    deadline = time.monotonic() + CLEAN_SECONDS
    while True:
        found = [each for name in bench.nodes for each in await _leftovers_of(bench, name)]
        if not found or time.monotonic() > deadline:
            return tuple(found)
        await asyncio.sleep(0.1)


async def _leftovers_of(bench: Bench, name: str) -> list[str]:
    more = (await bench.nodes[name].inventory()).more_than(bench.baseline[name])
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


def _phase(record: migrations_pb2.Migration | None) -> str:
    if record is None:
        return ""
    return types_pb2.MigrationPhase.Name(record.phase).removeprefix("MIGRATION_PHASE_")
