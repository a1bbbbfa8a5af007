"""The record of an outgoing migration: what it says at which point, and who is told."""

from __future__ import annotations

import asyncio

from phaul.v1 import migrations_pb2, types_pb2
from phaul_client.commit import Phase
from phaul_client.errors import OutcomeUnknown
from phaul_client.serving import Progress
from phaul_client.timeline import Step
from phaul_criu.stats import DumpStats
from phauld import convert
from phauld.observer import Observer
from phauld.source.endings import Ending
from phauld.source.meter import Meter, Sample, rate
from phauld.source.report import Report

SOURCE = types_pb2.NodeInfo(node_name="a")


class Listener(Observer):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def migration_started(self, migration: migrations_pb2.Migration) -> None:
        self.heard.append("started")

    def phase_left(self, migration: migrations_pb2.Migration, seconds: float) -> None:
        self.heard.append(types_pb2.MigrationPhase.Name(migration.phase).removeprefix("MIGRATION_PHASE_"))

    def migration_ended(self, migration: migrations_pb2.Migration) -> None:
        self.heard.append("ended")


class Last:
    """A last dump that came so far."""

    def __init__(self, *, dump_stats: DumpStats | None, pause_seconds: float | None, steps: list[Step]) -> None:
        self.dump_stats = dump_stats
        self.pause_seconds = pause_seconds
        self.steps = steps
        self.image_bytes = 1000


def report(listener: Listener | None = None) -> Report:
    record = migrations_pb2.Migration(migration_id="m1", source=SOURCE)
    record.destination.node_name = "b"
    return Report(record, listener or Listener())


def stats(pages_written: int) -> DumpStats:
    return DumpStats(
        freezing_microseconds=0,
        frozen_microseconds=20_000,
        memdump_microseconds=5_000,
        memwrite_microseconds=10_000,
        pages_scanned=100,
        pages_skipped_parent=1,
        pages_written=pages_written,
        pages_lazy=0,
        shpages_scanned=0,
        shpages_skipped_parent=0,
        shpages_written=0,
    )


async def test_each_phase_is_left_once_and_a_final_one_is_not_told_too_early() -> None:
    listener = Listener()
    told = report(listener)
    told.begun()
    for phase in (Phase.OPENING, Phase.COMMITTED, Phase.CONFIRMED, Phase.DONE):
        told.on_phase(phase)
    assert told.record.phase == types_pb2.MIGRATION_PHASE_CONFIRMED
    assert not told.record.in_doubt
    told.moved(4711, "")
    assert not told.record.HasField("finished_at")
    told.over()
    assert told.is_over
    told.told()
    assert listener.heard == ["started", "PREFLIGHT", "OPENING", "COMMITTED", "CONFIRMED", "ended"]
    assert (told.record.status_text, told.record.destination_pid) == ("runs on b as PID 4711", 4711)


async def test_who_spoke_for_the_destination_is_named() -> None:
    told = report()
    told.record.pages_missing = 7
    told.moved(0, "an operator")
    assert told.record.status_text == "killed here, as an operator decided: the destination did not answer"
    assert told.record.pages_missing == 0


async def test_a_doubt_is_one_until_it_is_taken_up_again() -> None:
    told = report()
    told.on_phase(Phase.COMMITTED)
    assert told.record.in_doubt
    told.ended(Ending(types_pb2.MIGRATION_PHASE_HELD, OutcomeUnknown("m1")))
    assert told.record.phase == types_pb2.MIGRATION_PHASE_HELD
    assert told.record.error.reason == types_pb2.ERROR_REASON_OUTCOME_UNKNOWN
    told.over()
    told.again()
    assert not told.is_over
    assert not told.record.HasField("error")


def test_the_last_dump_is_a_round_and_its_images_count() -> None:
    told = report()
    steps = [Step("freeze and dump", 12.0, 12.5), Step("restore", 12.5, 13.0, "b")]
    told.on_last_step(Last(dump_stats=stats(10), pause_seconds=1.5, steps=steps))
    last = told.record.rounds[0]
    assert (last.index, last.final, last.bytes_sent) == (1, True, 10 * 4096)
    assert last.bandwidth_bytes_per_second == 4096 * 1000
    assert told.record.bytes_sent == 10 * 4096 + 1000
    assert convert.seconds_of(told.record.pause) == 1.5
    assert [(step.name, step.node_name) for step in told.record.timeline] == [
        ("freeze and dump", "a"),
        ("restore", "b"),
    ]


def test_a_dump_that_never_was_adds_nothing() -> None:
    told = report()
    told.on_last_step(Last(dump_stats=None, pause_seconds=None, steps=[]))
    assert not told.record.rounds
    assert not told.record.HasField("pause")
    assert told.record.bytes_sent == 0


def test_problems_are_of_this_node() -> None:
    told = report()
    told.warn("container-left", "web", "its record stays", "delete it")
    told.fail("peer-unreachable", "b:1", "no answer", "")
    assert [(each.severity, each.node_name) for each in told.record.problems] == [
        (types_pb2.SEVERITY_WARNING, "a"),
        (types_pb2.SEVERITY_ERROR, "a"),
    ]


async def test_who_waits_hears_of_a_change() -> None:
    told = report()
    waiting = asyncio.create_task(told.changed(60.0))
    await asyncio.sleep(0)
    Meter(told).on_progress(Progress(sent_bytes=5, wire_bytes=3, pages_missing=2))
    async with asyncio.timeout(10):
        await waiting
    assert told.record.pages_missing == 2
    await told.changed(0.0)  # nobody does anything: it ends all the same


def test_a_rate_needs_two_looks() -> None:
    first, last = Sample(10.0, 1000), Sample(12.0, 5000)
    assert rate([first]) == 0
    assert rate([first, Sample(11.0, 1000), last]) == 2000
