"""`Remote` over gRPC in this process, as far as it goes without criu: ids, openings, leases, and what is left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from phaul.v1 import remote_pb2, types_pb2
from phaul_client.errors import PeerRefused
from phauld import convert
from phauld.destination.incoming import Session
from phauld.journal import IncomingEntry
from phauld.trees.restore_slot import RestoreSlot
from phauld.trees.workload_spec import WorkloadSpec
from phauld.trees.workloads import Workloads
from tests.contract.remote_destination import Destination, destination, opening, piece, reason
from tests.node.criu_victims import no_leaks
from tests.nodes import until


async def test_a_session_is_opened_connected_and_aborted_and_nothing_is_left(there: Destination) -> None:
    async with there.remote() as remote:
        answer = await remote.open_session(opening())
        assert answer.session.phase == types_pb2.SESSION_PHASE_OPEN
        assert answer.destination.node_id == remote.destination_node_id == there.journal.node_id
        assert remote.page_socket.getblocking()
        assert len(there.records) == 1
        assert (await remote.get_session()).phase == types_pb2.SESSION_PHASE_OPEN
        assert (await remote.abort()).phase == types_pb2.SESSION_PHASE_ABORTED
        assert there.is_clean()
        assert (await remote.get_session()).phase == types_pb2.SESSION_PHASE_ABORTED
        assert (await remote.abort()).phase == types_pb2.SESSION_PHASE_ABORTED
        assert there.service.active == 0


@pytest.mark.parametrize("migration_id", ["", "a" * 65, "../victim", "a/../../victim", "a b"])
async def test_no_call_takes_what_is_no_id(there: Destination, migration_id: str) -> None:
    """It becomes part of a path that is removed with all that is below it."""
    calls = (
        there.stub.Abort(remote_pb2.AbortRequest(migration_id=migration_id)),
        there.stub.GetSession(remote_pb2.GetSessionRequest(migration_id=migration_id)),
        there.stub.RenewLease(remote_pb2.RenewLeaseRequest(migration_id=migration_id)),
    )
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await there.journal.get_incoming(migration_id) is None


async def test_no_process_and_no_descriptor_is_left(tmp_path: Path) -> None:
    with no_leaks():
        async with destination(tmp_path / "node-b") as there, there.remote() as remote:
            await remote.open_session(opening())
            await remote.abort()


@pytest.mark.parametrize("method", ["start_iter", "restore", "commit", "get_session", "put_images", "renew"])
async def test_an_id_that_was_never_here(there: Destination, method: str) -> None:
    async with there.remote("stranger") as remote:
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "start_iter": remote.start_iter,
            "restore": lambda: remote.restore(image_files=0, timeout_seconds=5),
            "commit": lambda: remote.commit(timeout_seconds=5),
            "get_session": remote.get_session,
            "put_images": lambda: remote.put_images([piece(image_name="core-1.img")]),
            "renew": lambda: remote._call(there.stub.RenewLease(remote_pb2.RenewLeaseRequest(migration_id="stranger"))),
        }
        assert await reason(calls[method]()) == "MIGRATION_NOT_FOUND"
    assert there.is_clean()


async def test_an_abort_of_an_unknown_id_is_for_ever(tmp_path: Path) -> None:
    async with destination(tmp_path / "node-b") as there, there.remote() as remote:
        assert (await remote.abort()).phase == types_pb2.SESSION_PHASE_ABORTED
        assert await reason(remote.open_session(opening())) == "WRONG_PHASE"
        assert there.is_clean()
    async with destination(tmp_path / "node-b") as there, there.remote() as remote:  # phauld was started anew
        assert (await remote.get_session()).phase == types_pb2.SESSION_PHASE_ABORTED
        assert await reason(remote.open_session(opening())) == "WRONG_PHASE"


async def test_an_abort_that_overtakes_the_opening_leaves_nothing(
    there: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, aborted = asyncio.Event(), asyncio.Event()
    start = Workloads.restore_under_shim

    async def slowly(self: Workloads, spec: WorkloadSpec, criu: Path, **options: Any) -> RestoreSlot:
        slot = await start(self, spec, criu, **options)
        begun.set()
        await aborted.wait()
        return slot

    monkeypatch.setattr(Workloads, "restore_under_shim", slowly)
    async with there.remote() as remote:
        opened = asyncio.create_task(remote.open_session(opening()))
        await begun.wait()
        assert (await remote.abort()).phase == types_pb2.SESSION_PHASE_ABORTED
        aborted.set()
        assert await reason(opened) == "WRONG_PHASE"
        assert there.is_clean()
        assert (await remote.get_session()).phase == types_pb2.SESSION_PHASE_ABORTED


async def test_a_restarted_phauld_aborts_what_was_open(tmp_path: Path) -> None:
    async with destination(tmp_path / "node-b") as there:
        async with there.remote() as remote:
            await remote.open_session(opening())
        await die(there.service._sessions._known.pop("move"))
        assert len(there.records) == 1
    async with destination(tmp_path / "node-b") as again, again.remote() as remote:
        assert (await remote.get_session()).phase == types_pb2.SESSION_PHASE_ABORTED
        assert again.is_clean()


async def test_a_restarted_phauld_forgets_a_slot_of_which_its_journal_never_heard(tmp_path: Path) -> None:
    """The one before was killed between the two."""
    async with destination(tmp_path / "node-b") as there:
        spec = WorkloadSpec(name="web", argv=())
        workloads = there.service._sessions._host.workloads
        slot = await workloads.restore_under_shim(spec, there.directory / "criu", migration_id="move")
        async with asyncio.timeout(10):
            while not (slot.directory / "shim.json").exists():  # noqa: ASYNC110 (it is another process)
                await asyncio.sleep(0.01)
        slot.take_swrk().close()
        assert len(there.records) == 1
    async with destination(tmp_path / "node-b") as again:
        assert again.records == []


async def die(session: Session) -> None:
    """What is left of a session of a phauld that is killed: its files. The kernel closes what it had open."""
    assert session.course._lease is not None
    assert session._held.tree.slot is not None
    session.course._lease.cancel()
    session._held.tree.slot.take_swrk().close()
    await session._held.stream.aclose()
    assert session._held.tree.slot._child is not None
    await session._held.tree.slot._child.wait()


async def test_the_same_opening_twice_gives_a_new_token_and_the_same_session(there: Destination) -> None:
    first = await there.stub.OpenSession(opening())
    second = await there.stub.OpenSession(opening())
    assert first.data_token != second.data_token
    assert len(there.data_port._expected) == 1
    assert len(there.records) == 1
    assert len(there.records) == 1


async def test_the_same_opening_twice_at_once(there: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
    look = there.journal.get_incoming

    async def slowly(migration_id: str) -> IncomingEntry | None:
        found = await look(migration_id)
        await asyncio.sleep(0.05)
        return found

    monkeypatch.setattr(there.journal, "get_incoming", slowly)
    answers = await asyncio.gather(*(there.stub.OpenSession(opening()) for _ in range(4)))
    assert {answer.session.phase for answer in answers} == {types_pb2.SESSION_PHASE_OPEN}
    assert len(there.data_port._expected) == 1
    assert len(there.records) == 1
    async with there.remote() as remote:
        await remote.abort()
    assert there.is_clean()


@pytest.mark.parametrize("migration_id", ["", "a/b", "../a", "a b", "a" * 65, "ä", "a\n"])
async def test_what_is_no_id_is_refused(there: Destination, migration_id: str) -> None:
    async with there.remote(migration_id) as remote:
        assert await reason(remote.open_session(opening(migration_id))) == "INVALID_ARGUMENT"
    assert there.is_clean()


async def test_another_node_is_not_this_one(there: Destination) -> None:
    async with there.remote() as remote:
        assert await reason(remote.open_session(opening(destination_node_id="other"))) == "NODE_MISMATCH"
        await remote.open_session(opening())
        remote._destination_node_id = "other"
        assert await reason(remote.get_session()) == "NODE_MISMATCH"
        assert await reason(remote.commit(timeout_seconds=5)) == "NODE_MISMATCH"


async def test_too_many(there: Destination) -> None:
    for migration_id in ("one", "two"):
        await there.stub.OpenSession(opening(migration_id))
    async with there.remote("three") as remote:
        assert await reason(remote.open_session(opening("three"))) == "TOO_MANY_MIGRATIONS"
    await there.stub.OpenSession(opening("two"))  # a repetition needs no room
    await there.stub.Abort(remote_pb2.AbortRequest(migration_id="one"))
    await there.stub.OpenSession(opening("three"))


async def test_a_name_that_is_taken(there: Destination) -> None:
    spec = types_pb2.WorkloadSpec(name="web", argv=["web"])
    await there.stub.OpenSession(opening("one", workload=spec))
    async with there.remote("two") as remote:
        assert await reason(remote.open_session(opening("two", workload=spec))) == "WORKLOAD_EXISTS"
        assert await reason(remote.get_session()) == "MIGRATION_NOT_FOUND"
    assert len(there.records) == 1


async def test_a_shim_that_does_not_start_leaves_nothing(there: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phauld.trees.shims._SHIM", ("/nonexistent",))
    async with there.remote() as remote:
        with pytest.raises(PeerRefused, match="nonexistent"):
            await remote.open_session(opening())
    assert there.is_clean()


# Leases


async def test_a_silent_source_loses_its_session(tmp_path: Path) -> None:
    async with destination(tmp_path / "node-b") as there:
        answer = await there.stub.OpenSession(opening(lease=convert.duration(0.001)))
        assert convert.seconds_of(answer.lease) == 1.0  # the shortest there is
        await until(lambda: there.service.active == 0)
        await until(there.is_clean)
        async with there.remote() as remote:
            assert (await remote.get_session()).phase == types_pb2.SESSION_PHASE_ABORTED
            with pytest.raises(grpc.aio.AioRpcError):
                await there.stub.RenewLease(remote_pb2.RenewLeaseRequest(migration_id="move"))
            assert await reason(remote.start_iter()) == "LEASE_EXPIRED"
            assert await reason(remote.restore(image_files=0, timeout_seconds=5)) == "LEASE_EXPIRED"
            assert await reason(remote.commit(timeout_seconds=5)) == "WRONG_PHASE"


async def test_a_source_that_lives_keeps_its_session(there: Destination) -> None:
    async with there.remote() as remote:
        await remote.open_session(opening(lease=convert.duration(2)))
        await asyncio.sleep(2.5)
        assert (await remote.get_session()).phase == types_pb2.SESSION_PHASE_OPEN
    await until(lambda: there.service.active == 0)  # it is gone now


async def test_a_lease_has_a_longest_and_a_default(there: Destination) -> None:
    assert convert.seconds_of((await there.stub.OpenSession(opening("a", lease=convert.duration(1e6)))).lease) == 3600
    assert convert.seconds_of((await there.stub.OpenSession(opening("b"))).lease) == 30
