"""What goes with a tree, as its coordinator gets it, and what is told of it once it runs elsewhere."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from phaul.v1 import migrations_pb2, types_pb2
from phaul_client.addresses import Address
from phaul_client.case import Case
from phaul_client.commit import Phase
from phaul_client.containers.links import Links
from phaul_client.coordinator import Coordinator
from phaul_client.movers import Addresses
from phauld.node import Node
from phauld.observer import NOBODY
from phauld.options import parse_options
from phauld.source.belongings import Belongings
from phauld.source.report import Report
from phauld.source.target import Target
from phauld.sync_records import State, SyncRecords
from phauld.trees.workload_records import Workload
from phauld.trees.workload_spec import WorkloadSpec
from tests.idle_node import idle_node

NOTHING: Any = None
OPTIONS = parse_options(types_pb2.Options())


def belongings(directory: Path, workload: Workload | None = None) -> tuple[Belongings, Report, Node]:
    node = idle_node(directory, sync=SyncRecords(directory / "sync", ()))
    target = Target(pid=42, identity=None, process_name="count", workload=workload)
    report = Report(migrations_pb2.Migration(migration_id="m1", destination_address="b:1"), NOBODY)
    return Belongings(target, node, report), report, node


def coordinator(phase: Phase) -> Coordinator:
    return Coordinator(Case(migration_id="m1", remote=NOTHING, journal=NOTHING), phase)


def test_a_recovery_gets_what_the_journal_knows(tmp_path: Path) -> None:
    kept, _, _ = belongings(tmp_path)
    recovery = coordinator(Phase.COMMITTED)
    kept.find(recovery, {"addresses": ["10.0.0.7/24@eth0"]}, OPTIONS)
    assert type(recovery.addresses) is Addresses
    assert list(recovery.addresses.addresses) == [Address("10.0.0.7", 24, "eth0")]
    kept.find(recovery, {"container": {"links": ["veth7"]}}, OPTIONS)
    assert type(recovery.addresses) is Links
    assert recovery.hooks.may_be_committed  # nobody knows


async def test_what_runs_on_here_has_left_nothing(tmp_path: Path) -> None:
    kept, report, _ = belongings(tmp_path)
    recovery = coordinator(Phase.ROLLED_BACK)
    kept.find(recovery, {"container": {"links": [], "runtime": "no such thing", "id": "web"}}, OPTIONS)
    await kept.part(recovery)  # it would fail if it looked for the runtime
    assert not report.record.problems


def test_directories_are_an_older_copy_once_it_runs_elsewhere(tmp_path: Path) -> None:
    kept, report, node = belongings(tmp_path)
    report.record.destination.node_name = "b"
    kept.forget(["/srv/data"])
    known = node.sync.get("/srv/data")
    assert known is not None
    assert (known.state, known.node) == (State.LEFT, "b")


def test_a_record_that_cannot_be_written_does_not_undo_a_move(tmp_path: Path) -> None:
    spec = WorkloadSpec(name="counter", argv=("count",))
    gone = Workload(directory=tmp_path / "gone", spec=spec, state="running", pid=42, created_at=0.0)
    kept, _, node = belongings(tmp_path, gone)
    kept.forget(["/srv/data"])
    assert node.sync.get("/srv/data") is not None


async def test_nothing_is_told_of_files_that_there_are_not(tmp_path: Path) -> None:
    kept, report, _ = belongings(tmp_path)
    async with kept.telling():
        await asyncio.sleep(0)
        assert report.record.status_text == ""


def test_what_stays_is_given_back_by_the_migration_that_took_it(tmp_path: Path) -> None:
    here = Workload(
        directory=tmp_path, spec=WorkloadSpec(name="counter", argv=("count",)), state="running", pid=42, created_at=0.0
    )
    kept, _, _ = belongings(tmp_path / "node", here)
    leaving = tmp_path / "leaving.json"
    leaving.write_text('{"migration_id": "another"}')
    kept.stay()
    assert leaving.exists()
    leaving.write_text('{"migration_id": "m1"}')
    kept.stay()
    assert not leaving.exists()
